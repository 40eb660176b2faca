"""Invented records: varied, learnable but not by one word, with exactly known personal data."""

import collections
import functools
import itertools
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from dpjax.data import (
    DOMAIN_LABELS,
    DOMAINS,
    DomainRecord,
    domain_records,
    read_domain_records,
    records_from,
    write_domain_records,
)
from dpjax.data import domains as domains_module
from dpjax.data.pii import LOCALES, luhn_digit
from dpjax.errors import DpjaxError

NUM_RECORDS = 2000
every_table = pytest.mark.parametrize(
    ("domain", "locale"), [(domain, locale) for domain in DOMAINS for locale in LOCALES]
)

# What no text may say: the label itself, as an English or a Chinese writer would name it.
CHINESE_NAMES = {
    "medical": ["心内科", "心血管科", "呼吸科", "消化科", "骨科", "神经科", "神经内科"],
    "financial": ["未授权交易", "盗刷", "账户费用", "房贷服务", "债务催收", "征信报告"],
    "support": ["退货", "退款", "物流问题", "配送问题", "账户访问", "技术故障", "订阅变更"],
}


@functools.cache
def records_of(domain, locale, seed=11):
    return domain_records(domain, NUM_RECORDS, seed=seed, locale=locale)


def without_personal(record, mark="<{}>"):
    text = record.text
    for span in reversed(record.spans):
        text = text[: span.start] + mark.format(span.kind) + text[span.end :]
    return text


def words(locale):
    """How a text is cut into what a rule could look for."""
    if locale == "zh_CN":
        return {"analyzer": "char", "ngram_range": (1, 2)}
    return {"token_pattern": r"[a-zA-Z0-9$]+"}


# Shape of the records


@every_table
def test_lengths_labels_and_locale(domain, locale):
    records = records_of(domain, locale)
    assert 5 <= len(DOMAIN_LABELS[domain]) <= 6
    counts = collections.Counter(record.label for record in records)
    assert set(counts) == set(DOMAIN_LABELS[domain])
    assert max(abs(n - NUM_RECORDS / len(counts)) for n in counts.values()) < 80  # 4.5 stddev
    lengths = [
        len(r.text) if locale == "zh_CN" else len(r.text.split())
        for r in records
        if (r.domain, r.locale) == (domain, locale)
    ]
    low, high = (60, 150) if locale == "zh_CN" else (40, 90)
    assert len(lengths) == NUM_RECORDS
    assert np.mean([low <= length <= high for length in lengths]) > 0.95
    assert min(lengths) > 0.7 * low and max(lengths) < 1.2 * high
    for record in records:
        chinese = len(re.findall("[\u4e00-\u9fff]", without_personal(record, "")))
        prose = re.sub(r"[\W\d_]", "", without_personal(record, ""))
        assert chinese == 0 if locale == "en_US" else chinese > 0.85 * len(prose) > 20


@every_table
def test_texts_are_finished(domain, locale):
    for record in records_of(domain, locale):
        text = without_personal(record, "X")
        assert not re.search(r"[{}|_=+]|//|  |\bNone\b|[.。，,;；:：]{2}", text), text
        assert text.strip() == text and text[-1] in ".?!。？！", text
        if locale == "en_US":
            assert not re.search(r"\b[Aa] (?!one|un)[aeiou]|(^|[.?!] )[a-z]", text), text
        else:
            assert " " not in without_personal(record, ""), text


@pytest.mark.parametrize(
    ("locale", "agent", "customer"),
    [("en_US", "Agent: ", "Customer: "), ("zh_CN", "客服：", "顾客：")],
)
def test_dialogues_take_turns(locale, agent, customer):
    for record in records_of("support", locale):
        turns = record.text.split("\n")
        speakers = [turn.startswith(agent) for turn in turns]
        assert len(turns) >= 3 and all(turn.startswith((agent, customer)) for turn in turns)
        assert all(a != b for a, b in itertools.pairwise(speakers))
    for domain in ("medical", "financial"):
        assert not any("\n" in record.text for record in records_of(domain, locale))


@every_table
def test_no_label_names_itself(domain, locale):
    names = [label.replace("_", "[ _-]") for label in DOMAIN_LABELS[domain]]
    pattern = re.compile("|".join(names + CHINESE_NAMES[domain]), re.IGNORECASE)
    assert not [r.text for r in records_of(domain, locale) if pattern.search(r.text)]


@every_table
def test_variety(domain, locale):
    """Few repeats, even with all numbers masked, and no sentence in a large part of the records."""
    texts = [re.sub(r"\d+", "0", without_personal(r)) for r in records_of(domain, locale)]
    assert 1 - len(set(texts)) / len(texts) < 0.005
    sentences = collections.Counter(
        sentence
        for text in texts
        for sentence in set(re.split(r"(?<=[.?!。？！\n])\s*", text)) - {""}
    )
    assert len(sentences) > 1500
    # The common ones are those that hold personal data, and greetings.
    assert sentences.most_common(1)[0][1] < 0.16 * NUM_RECORDS
    alone = [count for count in sentences.values() if count == 1]
    assert len(alone) > 0.3 * len(sentences)
    tokens = CountVectorizer(**words(locale)).fit(texts).vocabulary_
    assert len(tokens) > 350


# Labels


@every_table
def test_labels_can_be_learned_but_not_perfectly(domain, locale):
    records = records_of(domain, locale)
    texts, labels = [r.text for r in records], [r.label for r in records]
    tokens = {"analyzer": "char", "ngram_range": (1, 3)} if locale == "zh_CN" else {}
    vectorizer = TfidfVectorizer(sublinear_tf=True, **tokens)
    train = vectorizer.fit_transform(texts[:1500])
    model = LogisticRegression(C=10, max_iter=1000).fit(train, labels[:1500])
    accuracy = model.score(vectorizer.transform(texts[1500:]), labels[1500:])
    assert 0.85 < accuracy < 0.99, accuracy


@every_table
def test_no_single_word_gives_a_label_away(domain, locale):
    records = records_of(domain, locale)
    labels = np.array([r.label for r in records])
    texts = [without_personal(r, "") for r in records]
    has_word = CountVectorizer(binary=True, **words(locale)).fit_transform(texts).tocsc()
    rates = np.stack(
        [
            np.asarray(has_word[labels == label].mean(axis=0)).ravel()
            for label in DOMAIN_LABELS[domain]
        ]
    )
    for number, label in enumerate(DOMAIN_LABELS[domain]):
        others = np.delete(rates, number, axis=0).mean(0)
        # "This label if and only if the word is there", both sides weighted equally.
        balanced = (1 + np.abs(rates[number] - others)) / 2
        assert balanced.max() < 0.75, label
        # No word that is in most of a label's records is its own.
        assert not ((rates[number] > 0.5) & (others < 0.05)).any(), label
    # The best rule of one word among all labels, with the best answer on either side. Labels are
    # about as frequent as each other, and guessing one gives 0.2.
    best = (rates.max(0) + (1 - rates).max(0)) / len(rates)
    assert best.max() < 0.4
    # Nor do a label's three most telling words find it.
    for number, label in enumerate(DOMAIN_LABELS[domain]):
        others = np.delete(rates, number, axis=0).mean(0)
        three = np.argsort(others - rates[number])[:3]
        found = np.asarray(has_word[:, three].sum(axis=1)).ravel() > 0
        recall = found[labels == label].mean()
        assert (recall + 1 - found[labels != label].mean()) / 2 < 0.9, label


@every_table
def test_a_small_share_mixes_in_the_next_label(domain, locale, monkeypatch):
    mixed = records_of(domain, locale)
    monkeypatch.setattr(domains_module, "_MIXED_SHARE", 0.0)
    pure = domain_records(domain, NUM_RECORDS, seed=11, locale=locale)
    share = np.mean([a.text != b.text for a, b in zip(mixed, pure, strict=True)])
    assert 0.015 < share < 0.045
    assert [(r.user, r.label) for r in mixed] == [(r.user, r.label) for r in pure]


# Personal data


@every_table
def test_spans_are_exact_sorted_and_apart(domain, locale):
    records = records_of(domain, locale)
    for record in records:
        end = 0
        for span in record.spans:
            assert end <= span.start < span.end
            assert record.text[span.start : span.end] == span.value
            end = span.end
        # Nothing of the person stands outside of the spans.
        rest = without_personal(record, "<>")
        assert not any(s.value in rest for s in record.spans)
        assert not re.search(r"\d{6}|@", rest), rest
    assert np.mean([len(r.spans) for r in records]) >= 3
    kinds = collections.Counter(span.kind for r in records for span in r.spans)
    assert len(kinds) >= 5 and min(kinds.values()) > 0.05 * NUM_RECORDS
    assert ("mrn" in kinds and "dob" in kinds) if domain == "medical" else "account" in kinds


@every_table
def test_people_have_fixed_values_and_share_none(domain, locale):
    records = records_of(domain, locale)
    values, owners = collections.defaultdict(set), collections.defaultdict(set)
    for record in records:
        for span in record.spans:
            values[record.user, span.kind].add(span.value)
            if span.kind != "dob":
                owners[span.value].add(record.user)
    assert all(len(found) == 1 for found in values.values())
    assert all(len(found) == 1 for found in owners.values())
    assert not any(value in record.user for record in records for value in owners)


def test_records_per_user_are_bounded_and_skewed():
    for most in (1, 2, 4, 10):
        records = domain_records("financial", 1000, seed=2, max_records_per_user=most)
        counts = collections.Counter(collections.Counter(r.user for r in records).values())
        assert max(counts) <= most and (most == 1 or counts[1] > 0.55 * sum(counts.values()))
        assert most > 4 or max(counts) == most
        assert list(dict.fromkeys(r.user for r in records)) == [
            f"financial-en_US-2-{number}" for number in range(sum(counts.values()))
        ]


def test_formats_and_check_digits():
    patterns = {
        ("en_US", "id_number"): r"9\d\d-[0-4]\d-\d{4}",
        ("zh_CN", "id_number"): r"99\d{4}(19[4-9]\d|200[0-4])\d{7}[\dX]",
        ("en_US", "phone"): r"[2-9]\d\d-[2-9]\d\d-\d{4}",
        ("zh_CN", "phone"): r"1[3-9]\d{9}",
        ("en_US", "account"): r"\d{10}",
        ("zh_CN", "account"): r"\d{12}",
        ("en_US", "dob"): r"[A-Z][a-z]+ \d{1,2}, (19[4-9]\d|200[0-4])",
        ("zh_CN", "dob"): r"(19[4-9]\d|200[0-4])年\d{1,2}月\d{1,2}日",
        ("en_US", "address"): r"\d{1,3} \w+ \w+, Apt \d{1,3}, [\w ]+",
        ("zh_CN", "address"): r"[\u4e00-\u9fff]+路\d{1,3}号\d{3}室",
        ("zh_CN", "name"): r"[\u4e00-\u9fff]{2,5}",
        ("en_US", "name"): r"[A-Z]\w+ [A-Z][\w']+",
    }
    seen = set()
    for domain in DOMAINS:
        for locale in LOCALES:
            for record in records_of(domain, locale):
                personal = {span.kind: span.value for span in record.spans}
                for kind, value in personal.items():
                    seen.add((locale, kind))
                    if (locale, kind) in patterns:
                        assert re.fullmatch(patterns[locale, kind], value), value
                    if kind == "card":
                        digits = value.replace(" ", "")
                        assert len(digits) == 16 and luhn_digit(digits[:-1]) == digits[-1]
                    if kind == "mrn":
                        assert re.fullmatch(r"\d{8}", value)
                    if kind == "email":  # names reserved for examples, RFC 2606
                        assert re.fullmatch(
                            r"[a-z.]+\d+@(mail\.|post\.)?example\.(com|org|net)", value
                        )
                    if (locale, kind) == ("zh_CN", "id_number"):
                        # ISO 7064: with its check character (X is ten) the sum is 1 modulo 11.
                        numbers = [10 if c == "X" else int(c) for c in value]
                        assert sum(n * 2 ** (17 - i) for i, n in enumerate(numbers)) % 11 == 1
                        born = re.search(r"(\d+)年(\d+)月(\d+)日", personal.get("dob", ""))
                        if born:
                            year, month, day = map(int, born.groups())
                            assert value[6:14] == f"{year}{month:02d}{day:02d}"
    assert len(seen) == 2 * 9


def test_ages_are_right():
    checked = 0
    for record in domain_records("medical", 1500, seed=4, locale="zh_CN"):
        match = re.search(r"(\d{4})年(\d+)月(\d+)日.*?，(\d+)岁，身份证号\d{6}(\d{8})", record.text)
        if match:
            year, month, day, age, born = match.groups()
            visit = f"{year}{int(month):02d}{int(day):02d}"
            assert int(age) == (int(visit) - int(born)) // 10000 >= 18
            checked += 1
    assert checked > 50


def test_values_are_uniform():
    digits = np.zeros((8, 10))
    for record in records_of("medical", "en_US"):
        for span in record.spans:
            if span.kind == "mrn":
                for place, digit in enumerate(span.value):
                    digits[place, int(digit)] += 1
    expected = digits[0].sum() / 10  # repeats of a person make it a little wider
    assert expected > 100 and (((digits - expected) ** 2 / expected).sum(1) < 50).all()


# Reproducibility


@every_table
def test_a_longer_list_starts_with_the_shorter(domain, locale):
    longer = domain_records(domain, 200, seed=8, locale=locale)
    assert domain_records(domain, 100, seed=8, locale=locale) == longer[:100]
    assert domain_records(domain, 1, seed=8, locale=locale) == longer[:1]


def test_seeds_domains_and_locales_are_populations_of_their_own():
    lists = [domain_records("medical", 100, seed=seed) for seed in (0, 1)]
    lists += [domain_records("support", 100, seed=0)]
    people = [{s.value for r in records for s in r.spans if s.kind != "dob"} for records in lists]
    assert not people[0] & people[1] and not people[0] & people[2]
    assert len({r.user for records in lists for r in records}) == sum(
        len({r.user for r in records}) for records in lists
    )


def test_another_process_gives_the_same():
    program = (
        "import sys; from dpjax.data import domain_records\n"
        "for locale in ('en_US', 'zh_CN'):\n"
        "  for record in domain_records('support', 20, seed=5, locale=locale):\n"
        "    sys.stdout.buffer.write((repr(record) + '\\n').encode())"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, timeout=120
    ).stdout.decode()
    here = [r for locale in LOCALES for r in domain_records("support", 20, seed=5, locale=locale)]
    assert output == "".join(repr(record) + "\n" for record in here)


def test_no_global_random_state_is_read_or_set():
    random.seed(1)
    np.random.seed(1)
    state = random.getstate(), np.random.get_state()[1].tolist()
    first = domain_records("financial", 20, seed=0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state
    random.seed(2)
    np.random.seed(2)
    assert domain_records("financial", 20, seed=0) == first


# Files


@every_table
def test_files_are_exact_private_and_readable_as_records(domain, locale, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("old, and readable by all")
    path.chmod(0o644)
    records = domain_records(domain, 30, seed=1, locale=locale)
    write_domain_records(path, records)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]
    assert read_domain_records(path) == records
    assert all(
        isinstance(s, domains_module.Span) for r in read_domain_records(path) for s in r.spans
    )
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert list(first) == ["text", "user", "label", "domain", "locale", "spans"]
    assert first["spans"][0] == list(records[0].spans[0])
    plain = records_from(path, user_field="user")
    assert [(r.text, r.user) for r in plain] == [(r.text, r.user) for r in records]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("old")
    records = domain_records("support", 2, seed=0)
    with pytest.raises(TypeError):
        write_domain_records(path, [records[0], records[1]._replace(label=object())])
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]
    with pytest.raises(DpjaxError, match="no records"):
        write_domain_records(path, [])
    with pytest.raises(DpjaxError, match="cannot be written"):
        write_domain_records(tmp_path / "absent" / "records.jsonl", records)


def test_bad_files_are_refused_in_one_line_without_content(tmp_path):
    path = tmp_path / "records.jsonl"
    good = domain_records("support", 1, seed=0)[0]
    span = list(good.spans[0])

    def line(**changes):
        return json.dumps(good._asdict() | changes)

    bad_lines = [
        "",
        "{",
        "[]",
        "{}",
        '"text"',
        "[" * 10**5,
        line(domain="legal"),
        line(label="cardiology"),
        line(locale="de_DE"),
        line(user=7),
        line(spans={}),
        line(spans=[span[:3]]),
        line(spans=[[span[0] + 1, *span[1:]]]),
        line(spans=[span, span]),
        line(spans=[[*span[:2], "shoe size", span[3]]]),
        line(spans=[["0", *span[1:]]]),
    ]
    for bad in bad_lines:
        path.write_text(line() + "\n" + bad + "\n", encoding="utf-8")
        with pytest.raises(DpjaxError, match="line 2 is not a domain record") as info:
            read_domain_records(path)
        message = str(info.value)
        assert "\n" not in message and not any(s.value in message for s in good.spans)
    path.write_bytes(b"")
    with pytest.raises(DpjaxError, match="holds no records"):
        read_domain_records(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(DpjaxError, match="not UTF-8"):
        read_domain_records(path)
    with pytest.raises(DpjaxError, match="cannot be read"):
        read_domain_records(tmp_path / "absent")


# Errors


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"domain": "legal"}, "domain is 'legal'; pass one of medical, financial, support"),
        ({"locale": "de_DE"}, "locale is 'de_DE'; pass one of en_US, zh_CN"),
        ({"num_records": 0}, "num_records is 0; pass an integer of at least 1"),
        ({"num_records": 2.5}, "num_records is 2.5"),
        ({"num_records": True}, "num_records is True"),
        ({"max_records_per_user": 0}, "max_records_per_user is 0"),
        ({"seed": -1}, "seed is -1; pass an integer of at least 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(changes, named):
    arguments = {"domain": "medical", "num_records": 2, "seed": 0} | changes
    with pytest.raises(DpjaxError, match=re.escape(named)) as info:
        domain_records(**arguments)
    assert "\n" not in str(info.value)


def test_used_up_values_are_refused(monkeypatch):
    monkeypatch.setattr(domains_module, "_name", lambda locale, rng: ("Ann Lee", 1))
    with pytest.raises(DpjaxError, match="name values of en_US are used up; ask for fewer"):
        domain_records("medical", 20, seed=0)


def test_missing_faker_names_the_command(monkeypatch):
    for name in [n for n in sys.modules if n == "faker" or n.startswith("faker.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "faker", None)
    with pytest.raises(DpjaxError, match=re.escape("pip install 'dpjax[pii]'")):
        domain_records("medical", 1, seed=0)


def test_records_are_tuples_of_named_fields():
    record = domain_records("medical", 1, seed=0)[0]
    assert isinstance(record, DomainRecord) and record.text == record[0]
    assert record._fields == ("text", "user", "label", "domain", "locale", "spans")
