"""Dataset: batches, splits without leakage, stable bounds, fingerprints, refusals."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from dpjax.data import NO_USER, ArrayDataset, Dataset
from dpjax.errors import DpjaxError


def make(num=60, length=4, users=None, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 50, (num, length)).astype(np.int32)
    users = np.arange(num) if users is None else np.asarray(users)
    return Dataset(
        tokens, np.ones((num, length), bool), users, record_ids=tokens @ [1, 50, 2500, 9]
    )


def one_line(info):
    text = str(info.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_take_returns_rows_with_repeats_and_dtypes():
    data = make()
    batch = data.take(np.array([3, 3, 59]))
    np.testing.assert_array_equal(batch["tokens"], data.tokens[[3, 3, 59]])
    assert batch["tokens"].dtype == np.int32 and batch["loss_mask"].dtype == np.bool_
    assert data.take([])["tokens"].shape == (0, 4)


@pytest.mark.parametrize("indices", [[-1], [60], [True] * 60, [0.5]])
def test_take_refuses_what_numpy_would_misread(indices):
    with pytest.raises(DpjaxError):
        make().take(indices)


def test_a_batch_is_a_copy_and_the_dataset_is_read_only():
    data = make()
    before = data.fingerprint()
    data.take([0])["tokens"][:] = 99
    assert data.fingerprint() == before
    with pytest.raises(ValueError):
        data.tokens[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"


def test_repr_shows_no_private_row():
    data = make(length=4)
    assert "array" not in repr(data) and "60" in repr(data)
    assert repr(ArrayDataset({"x": np.arange(3)})) == "ArrayDataset('arrays', examples=3)"


def test_fraction_split_never_divides_a_person_and_covers_everything():
    data = make(400, users=np.repeat(np.arange(100), 4))
    train, held_out = data.split(0.25, seed=1)
    assert not set(train.user_ids) & set(held_out.user_ids)
    assert len(train) + len(held_out) == 400
    assert 50 < len(held_out) < 150
    assert data.split(0.25, seed=1)[1].fingerprint() == held_out.fingerprint()
    assert data.split(0.25, seed=2)[1].fingerprint() != held_out.fingerprint()


def test_fraction_split_of_others_is_unchanged_when_one_person_leaves():
    # A permutation of row numbers, the obvious way, fails this.
    data = make(400, users=np.repeat(np.arange(100), 4))
    for person in (0, 37, 99):
        without = data.select(np.flatnonzero(data.user_ids != person))
        whole = set(data.split(0.25, seed=1)[1].user_ids) - {person}
        assert set(without.split(0.25, seed=1)[1].user_ids) == whole


def test_split_without_users_keeps_duplicates_and_chunks_together():
    rows = np.tile(np.arange(50), 2)
    data = Dataset(rows[:, None], np.ones((100, 1), bool), np.full(100, NO_USER), record_ids=rows)
    for held_out in (0.3, 20):
        train, test = data.split(held_out, seed=0)
        assert not set(train.tokens[:, 0]) & set(test.tokens[:, 0])


def test_a_user_and_a_record_with_one_number_are_two_people():
    data = Dataset(
        np.zeros((2, 1), int), np.ones((2, 1), bool), np.array([7, NO_USER]), np.array([7, 7])
    )
    assert np.unique(data.people()).size == 2


def test_count_split_is_exact_for_single_records_and_never_above():
    assert len(make(100).split(13, seed=4)[1]) == 13
    heavy = make(100, users=[0] * 60 + list(range(1, 41)))
    assert len(heavy.split(30, seed=0)[1]) == 30
    assert len(make(100, users=np.repeat(np.arange(20), 5)).split(13, seed=0)[1]) == 10


@pytest.mark.parametrize("held_out", [0, 1.0, -0.1, 60, True, 2.5])
def test_split_refuses_bad_amounts(held_out):
    with pytest.raises(DpjaxError, match="held_out"):
        make(60).split(held_out, seed=0)


def test_split_refuses_to_leave_a_part_empty():
    with pytest.raises(DpjaxError, match="1 people"):
        make(users=np.zeros(60, int)).split(0.5, seed=0)


def test_bound_contributions_counts_order_and_stability():
    users = np.array([5] * 30 + [6] * 3 + [NO_USER] * 27)
    data = make(users=users)
    bounded = data.bound_contributions(4, seed=0)
    values, counts = np.unique(bounded.user_ids, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {5: 4, 6: 3, NO_USER: 27}
    assert bounded.max_examples_per_user == 4 and data.max_examples_per_user is None
    assert bounded.preprocessing[-1]["private"] is True
    positions = [data.tokens.tolist().index(row) for row in bounded.tokens.tolist()]
    assert positions == sorted(positions)
    # Not simply the first four, and what stays of person 5 does not depend on person 6.
    assert positions[:4] != [0, 1, 2, 3]
    alone = data.select(np.flatnonzero(users != 6)).bound_contributions(4, seed=0)
    np.testing.assert_array_equal(alone.tokens[:4], bounded.tokens[:4])
    with pytest.raises(DpjaxError, match="at least 1"):
        data.bound_contributions(0, seed=0)


def test_bound_contributions_chooses_evenly():
    data = make(users=np.zeros(60, int))
    kept = np.zeros(60)
    for seed in range(400):
        chosen = data.bound_contributions(6, seed=seed).tokens
        kept += (data.tokens[:, None] == chosen[None]).all(-1).any(1)
    # Each row stays 40 times in 400 on average, standard deviation 6.
    assert kept.min() > 40 - 5 * 6 and kept.max() < 40 + 5 * 6


def test_fingerprint_sees_every_private_field_and_no_name():
    data = make()
    same = dataclasses.replace(data, name="renamed", unit="other words")
    assert same.fingerprint() == data.fingerprint() and len(data.fingerprint()) == 64
    changed = []
    for field in ("tokens", "loss_mask", "user_ids"):
        array = np.array(getattr(data, field))
        array.flat[-1] ^= True
        changed.append(dataclasses.replace(data, **{field: array}).fingerprint())
    reshaped = Dataset(data.tokens.reshape(30, 8), np.ones((30, 8), bool), np.arange(30))
    changed += [reshaped.fingerprint(), data.select(np.arange(60)[::-1]).fingerprint()]
    assert len({*changed, data.fingerprint()}) == 6


def test_fingerprint_is_equal_in_another_process_and_byte_order():
    code = (
        "import numpy as np; from dpjax.data import Dataset;"
        "t = np.arange(12).reshape(3, 4).astype('>i8');"
        "print(Dataset(t, t > 0, np.arange(3, dtype='>i4')).fingerprint())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    tokens = np.arange(12).reshape(3, 4)
    assert Dataset(tokens, tokens > 0, np.arange(3)).fingerprint() == out


def test_validate_names_record_position_and_token():
    data = make()
    data.validate(50)
    tokens = np.array(data.tokens)
    tokens[17, 2] = 50
    with pytest.raises(DpjaxError, match="record 17 holds token 50 at position 2") as info:
        dataclasses.replace(data, tokens=tokens).validate(50)
    assert "raise its vocabulary_size" in one_line(info)
    tokens[17, 2] = -1
    with pytest.raises(DpjaxError, match="token -1"):
        dataclasses.replace(data, tokens=tokens).validate(50)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": np.zeros((60, 4))},
        {"tokens": np.zeros(60, int)},
        {"tokens": np.full((60, 4), 2**32 + 1)},  # would wrap to the valid token 1
        {"loss_mask": np.ones((60, 3), bool)},
        {"user_ids": np.zeros(59, int)},
        {"record_ids": np.zeros(60)},
    ],
)
def test_constructor_refuses_wrong_arrays_in_one_line(change):
    with pytest.raises(DpjaxError) as info:
        dataclasses.replace(make(), **change)
    one_line(info)


def test_array_dataset_takes_nested_arrays_and_checks_lengths():
    data = ArrayDataset({"x": {"a": np.arange(6).reshape(3, 2)}, "y": np.arange(3)})
    batch = data.take([2, 0])
    assert batch["x"]["a"].tolist() == [[4, 5], [0, 1]] and batch["y"].tolist() == [2, 0]
    assert len(data) == 3
    changed = ArrayDataset({"x": {"a": np.arange(6).reshape(3, 2)}, "y": np.array([0, 1, 3])})
    assert changed.fingerprint() != data.fingerprint()
    for bad in ({}, {"x": np.arange(3), "y": np.arange(2)}, {"x": np.float32(1)}):
        with pytest.raises(DpjaxError):
            ArrayDataset(bad)
    with pytest.raises(DpjaxError):
        data.take([3])
