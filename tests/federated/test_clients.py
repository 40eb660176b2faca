"""How a cohort's tables are laid out: nothing lost, nothing of others, few shapes."""

import time

import jax
import numpy as np
import pytest

from dpjax.errors import DpjaxError
from dpjax.federated import Clients, CohortShape, clients_by

SIZES = (7, 1, 0, 12, 4, 5, 3, 0, 9, 2, 6)


def population(sizes=SIZES, seed=0):
    """An example's number is its value."""
    rows = np.split(np.random.default_rng(seed).permutation(sum(sizes)), np.cumsum(sizes)[:-1])
    names = tuple(f"c{n}" for n in range(len(sizes)))
    return Clients({"x": np.arange(sum(sizes)) + 100}, tuple(rows), names)


def trained_on(cohort):
    """client -> list of batches, each a list of example numbers."""
    found = {}
    for s, c in zip(*np.nonzero(cohort.is_client), strict=True):
        first, count = cohort.first_step[s, c], cohort.num_steps[s, c]
        found[int(cohort.client[s, c])] = [
            [int(cohort.examples["x"][s, r]) - 100 for r in rows[rows >= 0]]
            for rows in cohort.batches[s, first : first + count]
        ]
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "work",
    [
        {"batch_size": 3},
        {"batch_size": 3, "epochs": 3},
        {"batch_size": None, "epochs": 2},
        {"batch_size": 4, "epochs": 2, "drop_remainder": True},
        {"batch_size": 2, "epochs": 2, "max_steps": 4},
    ],
)
def test_every_client_trains_on_its_own_examples_once_an_epoch(work, shards):
    people = population()
    ids = [3, 8, 2, 0, 10, 1, 5]
    cohort = people.cohort(ids, jax.random.key(0), num_shards=shards, **work)
    found = trained_on(cohort)
    assert sorted(found) == sorted(ids) and cohort.num_clients == len(ids)
    for k in ids:
        size, own = SIZES[k], set(people.rows[k].tolist())
        width = work["batch_size"] or max(size, 1)
        per_epoch = -(-size // width)
        if work.get("drop_remainder") and size >= width:
            per_epoch = size // width
        steps = min(work.get("epochs", 1) * per_epoch, work.get("max_steps", 10**9))
        assert len(found[k]) == steps
        for first in range(0, steps, max(per_epoch, 1)):
            epoch = [x for rows in found[k][first : first + per_epoch] for x in rows]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= own
            if first + per_epoch <= steps:  # not cut
                assert len(epoch) == min(size, per_epoch * width)
        at = tuple(np.argwhere(cohort.client == k)[0])
        assert (cohort.num_examples[at], cohort.steps_per_epoch[at]) == (size, per_epoch)
    # What is not a client's is marked as nobody's, and has no steps.
    assert np.all(cohort.client[~cohort.is_client] == len(people))
    assert not np.any(cohort.num_steps[~cohort.is_client])


def test_shuffles_are_the_clients_own():
    """They depend on the key and the client; not on the others, the shards or the numbering."""
    people = population()
    alone = trained_on(people.cohort([3], jax.random.key(5), batch_size=5, epochs=2))[3]
    among = people.cohort(range(11), jax.random.key(5), batch_size=5, epochs=2, num_shards=4)
    assert trained_on(among)[3] == alone
    turned = Clients(people.examples, people.rows[::-1], people.names[::-1])
    again = trained_on(turned.cohort([7], jax.random.key(5), batch_size=5, epochs=2))[7]
    assert again == alone
    other = trained_on(people.cohort([3], jax.random.key(6), batch_size=5, epochs=2))[3]
    assert other != alone
    flat = [x for rows in alone for x in rows]
    assert flat[:12] != flat[12:] and set(flat[:12]) == set(flat[12:])


def test_shuffles_are_uniform():
    """Of five examples, each comes first equally often: chi-squared with 4 degrees of freedom."""
    people = population((5,))
    firsts = np.zeros(5)
    for number in range(2000):
        order = trained_on(people.cohort([0], jax.random.key(number), batch_size=5))[0][0]
        firsts[people.rows[0].tolist().index(order[0])] += 1
    assert np.sum((firsts - 400) ** 2 / 400) < 18.5  # one in a thousand


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_no_cohort_outgrows_the_shapes(shards):
    rng = np.random.default_rng(0)
    sizes = np.round(rng.lognormal(1.5, 1.3, 120)).astype(int)
    people = population(sizes.tolist())
    for work in ({"batch_size": 4, "epochs": 2}, {"batch_size": 3, "max_steps": 2}):
        shapes = people.shapes(num_shards=shards, **work)
        assert len(shapes) <= 4 and list(shapes) == sorted(shapes)
        largest = np.argsort(-sizes)
        found = set()
        for number in range(60):
            count = rng.integers(0, 121)
            # At random, or the worst: the largest of all.
            ids = largest[:count] if number % 3 == 0 else rng.permutation(120)[:count]
            cohort = people.cohort(ids, jax.random.key(0), num_shards=shards, **work)
            found.add(
                CohortShape(
                    cohort.client.shape[1],
                    cohort.batches.shape[1],
                    cohort.examples["x"].shape[1],
                    cohort.batches.shape[2],
                )
            )
            loads = cohort.num_steps.sum(axis=1)
            assert loads.max() - loads.min() <= max(cohort.num_steps.max(), 1)
            # Largest first, so that those side by side are alike.
            assert np.all(np.diff(cohort.num_steps, axis=1) <= 0)
        assert found <= set(shapes)


def test_a_known_cohort_size_spares_padding():
    people = population((10,) * 400)
    usual = people.cohort(range(50), jax.random.key(0), batch_size=5, cohort_size=50)
    assert usual.batches.shape == (1, 100, 5) and usual.client.shape == (1, 50)
    assert people.cohort(range(51), jax.random.key(0), batch_size=5).client.shape == (1, 100)
    # Poisson sampling draws a few more now and then: one more shape, not one more for each number.
    more = {
        people.cohort(range(n), jax.random.key(0), batch_size=5, cohort_size=50).batches.shape
        for n in range(51, 79)
    }
    assert len(more) == 1


def test_ten_thousand_clients_are_laid_out_quickly():
    sizes = np.random.default_rng(0).integers(0, 60, 10_000)
    people = population(sizes.tolist())
    start = time.process_time()
    cohort = people.cohort(range(10_000), jax.random.key(0), batch_size=10, num_shards=8)
    assert time.process_time() - start < 3  # 0.2 s on an idle core
    assert cohort.num_steps.sum() == (-(-sizes // 10)).sum()


def test_one_client_for_each_owner():
    people = clients_by({"x": np.arange(6)}, [3, 1, 3, 2, 3, 1], min_size=2)
    assert people.names == ("1", "3")
    assert [r.tolist() for r in people.rows] == [[1, 5], [0, 2, 4]]


def test_refusals():
    people = population()
    key = jax.random.key(0)
    for options, message in (
        ({"chosen": [1, 1]}, "distinct numbers"),
        ({"chosen": [11]}, "below 11"),
        ({"chosen": [1], "batch_size": 0}, "batch_size is 0"),
        ({"chosen": [1], "epochs": 0}, "epochs 0"),
        ({"chosen": [1], "cohort_size": 0}, "cohort_size is 0"),
        ({"chosen": [3, 0], "shape": CohortShape(1, 9, 40, 3)}, "has room for"),
        ({"chosen": [3, 0], "shape": CohortShape(2, 9, 40, 2)}, "has room for"),
    ):
        with pytest.raises(DpjaxError, match=message):
            people.cohort(key=key, **({"batch_size": 3} | options))
    for rows, names, message in (
        (([0], [0]), ("a", "b"), "held twice"),
        (([0], [9]), ("a", "b"), "row 9 of 3"),
        (([0], [1]), ("a", "a"), "distinct names"),
    ):
        with pytest.raises(DpjaxError, match=message):
            Clients({"x": np.arange(3)}, rows, names)
    with pytest.raises(DpjaxError, match="give owners"):
        clients_by({"x": np.arange(3)})
    with pytest.raises(DpjaxError, match="lower min_size"):
        clients_by({"x": np.arange(3)}, [1, 2, 3], min_size=2)
