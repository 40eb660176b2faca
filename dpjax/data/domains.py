"""Invented clinical notes, bank complaints and support dialogues, in English and Chinese.

Real ones are private and cannot be shipped. Each record is put together from sentence templates
(``domain_templates.py``), carries a public label, and holds personal data whose places are known.
Nothing here is a real person's: names are drawn from Faker's word lists, numbers from digits, and
identity numbers from ranges that are issued to nobody.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpjax.data.domain_templates import TABLES
from dpjax.data.domain_words import EVERYDAY
from dpjax.data.pii import _MAX_DRAWS, LOCALES, _account, _card, _digits, _name, _phone
from dpjax.errors import DpjaxError

DOMAINS = ("medical", "financial", "support")

# In a circle: a few records mix a label's content with that of the next one.
LABELS: dict[str, tuple[str, ...]] = {
    "medical": ("cardiology", "pulmonology", "gastroenterology", "orthopedics", "neurology"),
    "financial": ("unauthorized_transactions", "account_fees", "mortgage_servicing",
                  "debt_collection", "credit_reporting"),
    "support": ("returns_and_refunds", "delivery_problem", "account_access", "technical_fault",
                "subscription_change"),
}  # fmt: skip

_MIXED_SHARE = 0.03  # of the records
_VAGUE_SHARE = 0.25  # of the slots that have a label's content
_RETURN_SHARE = 0.3  # of the records, where somebody has one already and may have more
_SPEAKERS = {"en_US": {"A": "Agent: ", "C": "Customer: "}, "zh_CN": {"A": "客服：", "C": "顾客："}}
# Drawn once a record: a dialogue is about one thing, bought in one shop.
_FIXED = ("bank", "shop", "product", "part")
_PERSONAL = ("name", "dob", "id_number", "phone", "email", "address", "account", "card", "mrn")
_SLOT = re.compile(r"\{(\w+)\}|\{(\d+)-(\d+)(?:/(\d+))?\}")
_SENTENCE_START = re.compile(r"(^|[.?!] )([a-z])")

_FIRST_BIRTH, _LAST_BIRTH = (datetime.date(y, 1, 1).toordinal() for y in (1940, 2005))
_FIRST_VISIT, _LAST_VISIT = (datetime.date(y, 1, 1).toordinal() for y in (2023, 2025))

_Slots = dict[str, tuple[str, ...]]


class _Person(NamedTuple):
    birth: datetime.date
    values: dict[str, str]  # of each kind


class Span(NamedTuple):
    """Where a personal value stands in a text.

    Attributes:
      start: first character, counted in Unicode code points.
      end: one beyond the last.
      kind: "name", "dob", "id_number", "phone", "email", "address", "account", "card" or "mrn".
      value: ``text[start:end]``.

    Example:
      >>> Span(5, 17, "phone", "202-555-0143").kind
      'phone'
    """

    start: int
    end: int
    kind: str
    value: str


class DomainRecord(NamedTuple):
    """One invented record.

    Attributes:
      text: a note or complaint of one paragraph, or a dialogue with a line per turn.
      user: whose record it is. It names domain, locale, seed and a number, and nothing private.
      label: one of ``LABELS[domain]``, in English for every locale.
      domain: one of ``DOMAINS``.
      locale: "en_US" or "zh_CN".
      spans: the personal values, in order and apart from each other. All are the user's own.

    Example:
      >>> DomainRecord("Call 202-555-0143.", "u", "neurology", "medical", "en_US", ()).label
      'neurology'
    """

    text: str
    user: str
    label: str
    domain: str
    locale: str
    spans: tuple[Span, ...]


def domain_records(
    domain: str,
    num_records: int,
    *,
    seed: int,
    locale: str = "en_US",
    max_records_per_user: int = 4,
) -> list[DomainRecord]:
    """Invents labelled records with personal data in known places.

    English records have about 40 to 90 words, Chinese ones about 60 to 150 characters. Labels are
    drawn uniformly. In 3% of the records about half of the content belongs to the next label.

    Args:
      domain: "medical", "financial" or "support".
      num_records: how many, at least 1.
      seed: decides everything, 0 or more. Seeds, domains and locales are populations of their own.
      locale: "en_US" or "zh_CN".
      max_records_per_user: most records of one person; about 70% of the people have one.

    Returns:
      The records. A person's records are scattered among the others.

    Raises:
      DpjaxError: without Faker, for an unknown domain or locale, a count below 1 or a negative
        seed, or if more people are asked for than there are names (690,000 in English, 52,000 in
        Chinese).

    Guarantee:
      - Record ``i`` depends on the arguments and ``i`` alone, not on ``num_records``.
      - A person has the same values in all records, and no two people of one call share one, but
        for the date of birth. Values were drawn uniformly (again, where one had been given out).
      - Equal arguments give equal results, on every platform; no global random state is read or
        set. Names change with Faker's word lists, so that its version is pinned.

    Example:
      >>> records = domain_records("support", 3, seed=0)
      >>> records == domain_records("support", 9, seed=0)[:3]
      True
      >>> span = records[0].spans[0]
      >>> records[0].text[span.start : span.end] == span.value
      True
    """
    _check_choice("domain", domain, DOMAINS)
    _check_choice("locale", locale, LOCALES)
    _check_integer("num_records", num_records, 1)
    _check_integer("max_records_per_user", max_records_per_user, 1)
    _check_integer("seed", seed, 0)
    shared, by_label = _tables(domain, locale)
    labels = LABELS[domain]

    def stream(number: int, index: int) -> np.random.Generator:
        place = (DOMAINS.index(domain), LOCALES.index(locale), number, index)
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))

    owners = stream(0, 0)
    people: list[_Person] = []
    counts: list[int] = []  # records of each
    may_return: list[int] = []  # who has fewer than may be had
    seen: set[str] = set()
    records = []
    for index in range(num_records):
        if may_return and owners.random() < _RETURN_SHARE:
            place = int(owners.integers(len(may_return)))
        else:
            place = len(may_return)
            may_return.append(len(people))
            people.append(_person(locale, stream(1, len(people)), seen))
            counts.append(0)
        owner = may_return[place]
        counts[owner] += 1
        if counts[owner] == max_records_per_user:
            may_return[place] = may_return[-1]
            may_return.pop()
        rng = stream(2, index)
        number = int(rng.integers(len(labels)))
        own, neighbor = (by_label[labels[(number + step) % len(labels)]] for step in (0, 1))
        template = _compose((shared, own, neighbor), locale, people[owner], rng)
        text, spans = _insert_personal(template, people[owner].values)
        user = f"{domain}-{locale}-{seed}-{owner}"
        records.append(DomainRecord(text, user, labels[number], domain, locale, spans))
    return records


def label_phrases(domain: str, locale: str = "en_US") -> dict[str, dict[str, tuple[str, ...]]]:
    """What sets the records of each label apart: label -> slot -> its phrases, without people.

    Public knowledge, such as a textbook has. ``{20-80/20}`` in a phrase is an integer in steps
    of 20.

    Example:
      >>> label_phrases("medical")["neurology"]["sign"][0]
      'throbbing headache on one side'
    """
    _check_choice("domain", domain, DOMAINS)
    _check_choice("locale", locale, LOCALES)
    return {label: dict(slots) for label, slots in _tables(domain, locale)[1].items()}


def write_domain_records(path: str | os.PathLike[str], records: Sequence[DomainRecord]) -> None:
    """Writes jsonl (UTF-8) that only the owner may read, whole or not at all.

    A line is an object of the fields of ``DomainRecord``; a span is ``[start, end, kind, value]``.
    ``records_from(path, user_field="user")`` reads text and user.

    Raises:
      DpjaxError: if there are no records or the file cannot be written.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "notes.jsonl"
      >>> write_domain_records(path, domain_records("medical", 2, seed=0))
      >>> oct(path.stat().st_mode & 0o777), len(path.read_text(encoding="utf-8").splitlines())
      ('0o600', 2)
    """
    path = Path(path)
    if not records:
        raise DpjaxError(f"there are no records to write to {path}; pass at least one")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        # The mode is set when the file is made: a later chmod would leave a moment to read it.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                for record in records:
                    file.write(json.dumps(record._asdict(), ensure_ascii=False) + "\n")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DpjaxError(f"{path} cannot be written ({error.strerror}); check the path") from error


def read_domain_records(path: str | os.PathLike[str]) -> list[DomainRecord]:
    """Reads what ``write_domain_records`` wrote.

    Raises:
      DpjaxError: if the file is missing, empty, or a line is not such a record or has a span that
        is not where it says. The message names the line and none of its content.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "notes.jsonl"
      >>> records = domain_records("financial", 2, seed=0, locale="zh_CN")
      >>> write_domain_records(path, records)
      >>> read_domain_records(path) == records
      True
    """
    path = Path(path)
    records = []
    number = 0
    try:
        # newline="\n": splitlines would also split on U+2028, legal inside JSON.
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                records.append(_record(json.loads(line)))
    except OSError as error:
        raise DpjaxError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError:
        raise DpjaxError(f"{path} is not UTF-8; write the records again") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DpjaxError(
            f"{path} line {number} is not a domain record ({type(error).__name__}); write the"
            " records again"
        ) from None
    if not records:
        raise DpjaxError(f"{path} holds no records; check that it was written completely")
    return records


def _record(fields: dict[str, object]) -> DomainRecord:
    spans = fields["spans"]
    strings = [fields[name] for name in DomainRecord._fields[:-1]]
    if not isinstance(spans, list) or not all(isinstance(value, str) for value in strings):
        raise TypeError
    text, user, label, domain, locale = map(str, strings)
    record = DomainRecord(text, user, label, domain, locale, tuple(Span(*s) for s in spans))
    if label not in LABELS[domain] or locale not in LOCALES:
        raise ValueError
    end = 0
    for span in record.spans:
        value = text[span.start : span.end]
        if not end <= span.start < span.end or value != span.value or span.kind not in _PERSONAL:
            raise ValueError
        end = span.end
    return record


def _check_choice(argument: str, chosen: str, known: Sequence[str]) -> None:
    if chosen not in known:
        raise DpjaxError(f"{argument} is {chosen!r}; pass one of {', '.join(known)}")


def _check_integer(argument: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise DpjaxError(f"{argument} is {value!r}; pass an integer of at least {least}")


@functools.cache
def _everyday(locale: str) -> _Slots:
    return _slots(EVERYDAY[locale], locale)


@functools.cache
def _tables(domain: str, locale: str) -> tuple[_Slots, dict[str, _Slots]]:
    """The slots of all labels, and those of each label."""
    sections: dict[str, _Slots] = {}
    for section in re.split(r"\n(?=\[)", TABLES[domain, locale].strip()):
        head, body = section.split("\n", 1)
        sections[head.strip("[]")] = _slots(body, locale)
    shared = _everyday(locale) | sections.pop("shared")
    return shared, sections


def _slots(body: str, locale: str) -> _Slots:
    slots = {}
    for slot, items in re.findall(r"(\w+)\s=\s((?:(?!\w+\s=\s).)*)", body, re.DOTALL):
        joined = " ".join(items.split()) if locale == "en_US" else "".join(items.split())
        slots[slot] = tuple(item.strip() for item in joined.split("|") if item.strip())
    return slots


def _compose(
    tables: tuple[_Slots, _Slots, _Slots], locale: str, person: _Person, rng: np.random.Generator
) -> str:
    """A record whose only open slots are the personal ones."""
    shared, own, neighbor = tables
    # Drawn first, so that a different share leaves all other records as they are.
    is_mixed = rng.random() < _MIXED_SHARE
    visit = _day(rng, _FIRST_VISIT, _LAST_VISIT)
    used: set[str] = set()
    fixed: dict[str, str] = {}

    def choose(slot: str) -> str:
        items = shared.get(slot, ())
        if slot in own:
            source = neighbor if is_mixed and rng.random() < 0.5 else own
            items = items if items and rng.random() < _VAGUE_SHARE else source[slot]
        items = [item for item in items if item not in used] or list(items)
        item = items[int(rng.integers(len(items)))]
        used.add(item)
        return item

    def fill(match: re.Match[str]) -> str:
        slot, low, high, step = match.groups()
        if low is not None:
            numbers = range(int(low), int(high) + 1, int(step or 1))
            return str(numbers[int(rng.integers(len(numbers)))])
        if slot in _PERSONAL:
            return match.group()
        if slot == "date":
            return _written(_day(rng, _FIRST_VISIT, _LAST_VISIT), locale, with_year=False)
        if slot == "visit":
            return _written(visit, locale, with_year=True)
        if slot == "age":
            had_birthday = (visit.month, visit.day) >= (person.birth.month, person.birth.day)
            return str(visit.year - person.birth.year - (not had_birthday))
        once = "product" if slot == "gadget" else slot
        if once in fixed:
            return fixed[once]
        filled = _SLOT.sub(fill, choose(slot))
        if once in _FIXED:
            fixed[once] = filled
        return filled

    turns: list[tuple[str, str]] = []
    for section in choose("plan").split("+"):
        for turn in _SLOT.sub(fill, choose(section)).split("//"):
            speaker, spoken = "", turn.strip()
            if spoken[:2] in ("A:", "C:"):
                speaker, spoken = spoken[0], spoken[2:].strip()
            if locale == "en_US":
                spoken = _SENTENCE_START.sub(lambda m: m[1] + m[2].upper(), spoken)
            if turns and turns[-1][0] == speaker:
                spoken = turns.pop()[1] + (" " if locale == "en_US" else "") + spoken
            turns.append((speaker, spoken))
    return "\n".join(_SPEAKERS[locale].get(speaker, "") + spoken for speaker, spoken in turns)


def _insert_personal(template: str, values: dict[str, str]) -> tuple[str, tuple[Span, ...]]:
    text, spans, done = "", [], 0
    for match in _SLOT.finditer(template):
        text += template[done : match.start()]
        value = values[match[1]]
        spans.append(Span(len(text), len(text) + len(value), match[1], value))
        text += value
        done = match.end()
    return text + template[done:], tuple(spans)


def _day(rng: np.random.Generator, first: int, end: int) -> datetime.date:
    return datetime.date.fromordinal(int(rng.integers(first, end)))


def _written(day: datetime.date, locale: str, *, with_year: bool) -> str:
    if locale == "zh_CN":
        return f"{day.year}年" * with_year + f"{day.month}月{day.day}日"
    month = _everyday(locale)["month"][day.month - 1]
    return f"{month} {day.day}" + f", {day.year}" * with_year


def _person(locale: str, rng: np.random.Generator, seen: set[str]) -> _Person:
    """New values of every kind; all but the date of birth are nobody else's."""

    def new(kind: str, draw: Callable[[], str]) -> str:
        for _ in range(_MAX_DRAWS):
            value = draw()
            if value not in seen:
                seen.add(value)
                return value
        raise DpjaxError(f"the {kind} values of {locale} are used up; ask for fewer records")

    birth = _day(rng, _FIRST_BIRTH, _LAST_BIRTH)
    name = new("name", lambda: _name(locale, rng)[0])
    values = {
        "name": name,
        "dob": _written(birth, locale, with_year=True),
        "id_number": new("id_number", lambda: _id_number(locale, birth, rng)),
        "phone": new("phone", lambda: _phone(locale, rng)[0]),
        "email": new("email", lambda: _email(locale, name, rng)),
        "address": new("address", lambda: _address(locale, rng)),
        "account": new("account", lambda: _account(locale, rng)[0]),
        "card": new("card", lambda: _card(locale, rng)[0]),
        "mrn": new("mrn", lambda: _digits(rng, 8)),
    }
    return _Person(birth, values)


def _pick(slot: str, locale: str, rng: np.random.Generator) -> str:
    items = _everyday(locale)[slot]
    return items[int(rng.integers(len(items)))]


def _id_number(locale: str, birth: datetime.date, rng: np.random.Generator) -> str:
    if locale == "en_US":
        # Area 9xx is never a social security number; groups to 49 are no taxpayer number either.
        return f"9{_digits(rng, 2)}-{rng.integers(1, 50):02d}-{_digits(rng, 4)}"
    # No region has a code that starts with 99.
    number = f"99{_digits(rng, 4)}{birth:%Y%m%d}{rng.integers(1, 1000):03d}"
    return number + resident_check_digit(number)


def resident_check_digit(digits: str) -> str:
    """The last character of a Chinese resident identity number (GB 11643-1999; ISO 7064, 11-2).

    Example:
      >>> resident_check_digit("11010519491231002")
      'X'
    """
    total = sum(int(digit) * 2 ** (17 - place) for place, digit in enumerate(digits))
    return "10X98765432"[total % 11]


def _email(locale: str, name: str, rng: np.random.Generator) -> str:
    if locale == "en_US":
        letters = ".".join(re.sub("[^a-z]", "", part) for part in name.lower().split())
        letters += _digits(rng, 3)
    else:
        letters = _pick("syllable", locale, rng) + _pick("syllable", locale, rng) + _digits(rng, 5)
    return f"{letters}@{_pick('mailbox', locale, rng)}"


def _address(locale: str, rng: np.random.Generator) -> str:
    street, way, town = (_pick(slot, locale, rng) for slot in ("street", "way", "town"))
    number = rng.integers(1, 1000)
    if locale == "en_US":
        return f"{number} {street} {way}, Apt {rng.integers(1, 400)}, {town}"
    return f"{town}{way}{street}路{number}号{rng.integers(101, 1000)}室"
