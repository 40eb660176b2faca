"""Planted PII: reproducible, distinct, at the stated counts, with twins that never appear."""

import collections
import json
import random
import re
import sys

import numpy as np
import pytest

from dpjax.data import Record, byte_tokenizer, load_planted_pii, plant_pii
from dpjax.data.pii import KINDS, LOCALES, luhn_digit
from dpjax.errors import DpjaxError

RECORDS = [Record(f"an ordinary message {i}", f"user {i % 7}") for i in range(200)]


def plant(**changes):
    arguments = {"repetitions": {1: 20, 4: 10}, "seed": 5} | changes
    return plant_pii(RECORDS, **arguments)


def luhn_holds(number):
    digits = [int(d) for d in number if d.isdigit()]
    total = sum(digits[-1::-2]) + sum(sum(divmod(2 * d, 10)) for d in digits[-2::-2])
    return total % 10 == 0


def test_counts_users_and_order_of_the_originals():
    mixed, planted = plant()
    assert len(mixed) == 200 + 20 + 40 and len(planted.inserted) == len(planted.held_out) == 30
    seen = collections.Counter(record.text for record in mixed)
    for secret in planted.inserted:
        assert seen[secret.text] == secret.repetitions
        assert sum(record.user == secret.user for record in mixed) == secret.repetitions
    assert [r for r in mixed if not r.user.startswith("planted:")] == RECORDS


def test_positions_are_spread_and_repetitions_not_in_a_row():
    mixed, planted = plant(repetitions={40: 2})
    places = np.flatnonzero([r.user.startswith("planted:") for r in mixed])
    assert places.min() < 40 and places.max() > 240 and 100 < places.mean() < 180
    order = [r.user for r in mixed if r.user.startswith("planted:")]
    assert order != sorted(order)


def test_twins_share_the_template_but_never_appear():
    mixed, planted = plant(num_held_out_twins=45)
    everything = "\n".join(record.text for record in mixed)
    by_id = {secret.secret_id: secret for secret in planted.inserted}
    assert len(planted.held_out) == 45
    for twin in planted.held_out:
        original = by_id[twin.twin_of]
        assert (twin.kind, twin.locale, twin.variant) == (
            original.kind,
            original.locale,
            original.variant,
        )
        assert twin.secret != original.secret and twin.secret_bits == original.secret_bits
        assert twin.secret not in everything and twin.repetitions == 0
    assert plant(num_held_out_twins=0)[1].held_out == ()


def test_secrets_and_prefixes_are_distinct_and_the_text_is_whole():
    _, planted = plant(repetitions={1: 400})
    secrets = planted.inserted + planted.held_out
    assert len({s.secret for s in secrets}) == len({s.prefix for s in secrets}) == 800
    assert {(s.locale, s.kind) for s in secrets} == {(a, b) for a in LOCALES for b in KINDS}
    for s in secrets:
        assert s.text.startswith(s.prefix + s.secret) and len(s.text) > len(s.prefix + s.secret)
        assert "{" not in s.text


def test_the_same_seed_gives_the_same_and_another_seed_another():
    assert plant() == plant()
    assert plant()[1].inserted != plant(seed=6)[1].inserted
    # The answer key does not depend on the private records.
    assert plant_pii(RECORDS[:3], repetitions={1: 20, 4: 10}, seed=5)[1] == plant()[1]


def test_no_global_random_state_is_read_or_set():
    random.seed(1)
    np.random.seed(1)
    first = plant()
    state = random.getstate(), np.random.get_state()[1].tolist()
    random.seed(2)
    np.random.seed(2)
    assert plant() == first
    random.seed(1)
    np.random.seed(1)
    plant()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state


def test_formats_of_the_numbers():
    _, planted = plant(repetitions={1: 200})
    patterns = {
        ("en_US", "phone"): r"[2-9]\d\d-[2-9]\d\d-\d{4}",
        ("zh_CN", "phone"): r"1[3-9]\d{9}",
        ("en_US", "card"): r"4\d{3}( \d{4}){3}",
        ("zh_CN", "card"): r"62\d{2}( \d{4}){3}",
        ("en_US", "account"): r"\d{10}",
        ("zh_CN", "account"): r"\d{12}",
        ("zh_CN", "name"): r"[\u4e00-\u9fff]{2,5}",
        ("en_US", "diagnosis"): r".+ since \d{4}-\d\d",
        ("zh_CN", "diagnosis"): r".+（\d{4}年\d{1,2}月）",
    }
    for s in planted.inserted + planted.held_out:
        if (s.locale, s.kind) in patterns:
            assert re.fullmatch(patterns[s.locale, s.kind], s.secret), s
        if s.kind == "card":
            assert luhn_holds(s.secret)
    assert luhn_digit("400000000000000") == "2"  # a published test number, 4000 0000 0000 0002


def test_digits_are_uniform_and_bits_are_those_of_the_space():
    _, planted = plant(repetitions={1: 2000}, kinds=["account"], locales=["en_US"])
    counts = np.zeros((10, 10))
    for s in planted.inserted:
        assert s.secret_bits == pytest.approx(10 * np.log2(10))
        for place, digit in enumerate(s.secret):
            counts[place, int(digit)] += 1
    statistic = ((counts - 200) ** 2 / 200).sum(1)  # chi squared, 9 degrees of freedom
    assert (statistic < 33.7).all()  # p = 1e-4 each


def test_each_repetition_count_holds_the_same_mixture():
    _, planted = plant(repetitions={1: 10, 16: 10})
    mixtures = [
        sorted((s.locale, s.kind) for s in planted.inserted if s.repetitions == count)
        for count in (1, 16)
    ]
    assert mixtures[0] == mixtures[1] and len(set(mixtures[0])) == 10


def test_save_is_private_utf8_and_exact(tmp_path):
    path = tmp_path / "planted.json"
    _, planted = plant()
    path.write_text("old, and readable by all")
    path.chmod(0o644)
    planted.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_planted_pii(path) == planted
    text = path.read_text(encoding="utf-8")
    chinese = next(s for s in planted.inserted if s.locale == "zh_CN")
    assert chinese.secret in text and "\\u" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["planted.json"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "dpjax planted pii 1"}'])
def test_loading_something_else_is_refused(tmp_path, content):
    path = tmp_path / "planted.json"
    path.write_text(content)
    with pytest.raises(DpjaxError, match="not a file of planted secrets"):
        load_planted_pii(path)
    with pytest.raises(DpjaxError, match="cannot be read"):
        load_planted_pii(tmp_path / "absent")
    path.write_text(json.dumps({"format": "dpjax planted pii 1", "inserted": [{"secret_id": 1}]}))
    with pytest.raises(DpjaxError):
        load_planted_pii(path)


def test_a_secret_that_would_be_cut_off_is_refused():
    _, planted = plant()
    tokenizer = byte_tokenizer()
    needed = max(
        1 + len((s.prefix + s.secret).encode()) for s in planted.inserted + planted.held_out
    )
    planted.check_fits(tokenizer, needed)
    with pytest.raises(DpjaxError, match=f"needs {needed} tokens; sequence_length is {needed - 1}"):
        planted.check_fits(tokenizer, needed - 1)
    assert needed <= 64, "every template should fit 64 bytes"


@pytest.mark.parametrize(
    "changes",
    [
        {"repetitions": {}},
        {"repetitions": {0: 3}},
        {"repetitions": {2: 0}},
        {"locales": ["de_DE"]},
        {"locales": "en_US"},
        {"kinds": []},
        {"kinds": ["passport"]},
        {"num_held_out_twins": -1},
    ],
)
def test_bad_arguments_are_refused_in_one_line(changes):
    with pytest.raises(DpjaxError) as info:
        plant(**changes)
    assert "\n" not in str(info.value)


def test_planting_twice_and_exhausting_a_space_are_refused(monkeypatch):
    monkeypatch.setattr("dpjax.data.pii._YEARS", range(2000, 2001))  # 32 * 12 values are left
    mixed, _ = plant()
    with pytest.raises(DpjaxError, match="original records"):
        plant_pii(mixed, repetitions={1: 1}, seed=0)
    with pytest.raises(DpjaxError, match="plant fewer"):
        plant_pii([], repetitions={1: 200}, seed=0, kinds=["diagnosis"], locales=["zh_CN"])


def test_missing_faker_names_the_command(monkeypatch):
    for name in [n for n in sys.modules if n == "faker" or n.startswith("faker.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "faker", None)
    with pytest.raises(DpjaxError, match=re.escape("pip install 'dpjax[pii]'")):
        plant()
