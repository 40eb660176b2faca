"""Recognisers of personal values that have a form: numbers and e-mail addresses.

Names, addresses and illnesses have none; a model trained for them finds those (e.g. Presidio).
"""

import re

from dpjax.data.domains import Span
from dpjax.data.pii import luhn_digit

# Tried in this order at every place; the first that fits takes it.
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("email", r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"),
    ("id_number", r"\d{3}-\d{2}-\d{4}"),
    ("phone", r"(?:\+?1[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"),
    ("id_number", r"\d{17}[\dXx]"),
    ("card", r"\d{4}(?P<gap>[ -]?)\d{4}(?P=gap)\d{4}(?P=gap)\d{4}(?:(?P=gap)\d{1,3})?"),
    ("phone", r"1[3-9]\d{9}"),
    ("account", r"\d{9,16}"),
    ("mrn", r"\d{7,8}"),
)
# No digit, letter or hyphenated number may touch a value: half of a longer number is none.
_ANY = re.compile(
    r"(?<![A-Za-z0-9@])(?<!\d[-.])(?:"
    + "|".join(f"(?P<k{n}>{pattern})" for n, (_, pattern) in enumerate(_PATTERNS))
    + r")(?![A-Za-z0-9@])(?![-.]\d)"
)
RECOGNISED_KINDS = tuple(dict.fromkeys(kind for kind, _ in _PATTERNS))


def recognise_pii(text: str) -> list[Span]:
    """Values in a text that look like personal ones, in order, apart from each other.

    Kinds: "email", "phone" (North American, or Chinese mobile), "card" (16 to 19 digits that pass
    Luhn's check), "id_number" (US social security form, or 18 characters as in China), "account"
    (other numbers of 9 to 16 digits) and "mrn" (7 or 8 digits, as medical record numbers). Form is
    all that is looked at: an order number of 10 digits is an "account" too.

    Example:
      >>> [(s.kind, s.value) for s in recognise_pii("Ann, 555-201-3344, ann@example.org.")]
      [('phone', '555-201-3344'), ('email', 'ann@example.org')]
    """
    found = []
    for match in _ANY.finditer(text):
        kind = _PATTERNS[int(str(match.lastgroup)[1:])][0]
        value = match.group()
        if kind == "card":
            digits = re.sub(r"\D", "", value)
            if luhn_digit(digits[:-1]) != digits[-1]:
                if value != digits:
                    continue
                kind = "account"
        found.append(Span(match.start(), match.end(), kind, value))
    return found
