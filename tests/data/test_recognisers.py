"""Recognisers against the marked values of invented records, and against look-alikes."""

import collections

import pytest

from dpjax.data import domain_records
from dpjax.data.recognisers import RECOGNISED_KINDS, recognise_pii


@pytest.mark.parametrize("locale", ["en_US", "zh_CN"])
@pytest.mark.parametrize("domain", ["medical", "financial", "support"])
def test_precision_and_recall_on_marked_records(domain, locale):
    counts = collections.Counter()
    for record in domain_records(domain, 300, seed=5, locale=locale):
        truth = {(s.start, s.end, s.kind) for s in record.spans if s.kind in RECOGNISED_KINDS}
        found = {(s.start, s.end, s.kind) for s in recognise_pii(record.text)}
        counts.update(hit=len(truth & found), missed=len(truth - found), wrong=len(found - truth))
        assert all(record.text[s.start : s.end] == s.value for s in recognise_pii(record.text))
    assert counts["hit"] > 300
    assert counts["hit"] / (counts["hit"] + counts["missed"]) > 0.99
    assert counts["hit"] / (counts["hit"] + counts["wrong"]) > 0.99


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("call (202) 555-0143 or +1 202 555 0143", ["phone", "phone"]),
        ("a card, 4111 1111 1111 1111", ["card"]),
        ("not a card, 4111 1111 1111 1112", []),  # Luhn's check fails, and it is no one number
        ("unspaced 4111111111111111", ["card"]),
        ("unspaced 4111111111111112", ["account"]),
        ("me.too+x@mail.example.co.uk!", ["email"]),
        ("ssn 123-45-6789", ["id_number"]),
        ("part 123-45-6789-01", []),
        ("id 11010519491231002X", ["id_number"]),
        ("in 2024 at 10:30, 50 mg, v1.2.3, 3.14159265", []),
        ("abc12345678", []),
        ("order 123456", []),
        ("", []),
    ],
)
def test_forms(text, kinds):
    assert [span.kind for span in recognise_pii(text)] == kinds
