"""Samplers: the probabilities that the accountant assumes, with power to tell others."""

import dataclasses

import jax
import numpy as np
import pytest

from dpjax import sampling
from dpjax.errors import DpjaxError
from dpjax.sampling import (
    CyclicPoissonSampler,
    CyclicSampler,
    FixedSizeSampler,
    PoissonSampler,
    ShuffledSampler,
    TruncatedPoissonSampler,
    composed_dp_event,
)

KEY = jax.random.key(0)


def rows(sampler, step):
    batch = sampler.batch(step)
    return batch.indices[~batch.is_padding_example]


def counts(sampler, steps):
    total = np.zeros(sampler.population)
    for step in range(steps):
        np.add.at(total, rows(sampler, step), 1)
    return total


def test_poisson_inclusion_has_the_stated_probability_and_spread():
    sampler = PoissonSampler(500, KEY, sampling_probability=0.06)
    steps = 400
    sizes = np.array([len(rows(sampler, step)) for step in range(steps)])
    expected, spread = 500 * 0.06, np.sqrt(500 * 0.06 * 0.94)
    error = spread / np.sqrt(steps)
    assert abs(sizes.mean() - expected) < 5 * error
    for wrong in (2 / 3, 3 / 2):
        assert abs(sizes.mean() - wrong * expected) > 20 * error
    assert 0.85 < sizes.std() / spread < 1.15  # a fixed size would have no spread
    each = counts(sampler, steps)
    assert 0.85 < each.std() / np.sqrt(steps * 0.06 * 0.94) < 1.15  # nobody is favoured


def test_poisson_draws_are_independent_over_examples_and_steps():
    sampler = PoissonSampler(300, KEY, sampling_probability=0.3)
    taken = np.zeros((400, 300))
    for step in range(400):
        taken[step, rows(sampler, step)] = 1
    for pairs in (taken[:, :-1] * taken[:, 1:], taken[:-1] * taken[1:]):
        both = pairs.mean()
        assert abs(both - 0.09) < 5 * np.sqrt(0.09 * 0.91 / pairs.size)


@pytest.mark.parametrize("probability", [1.0, 1e-5, 0.999999])
def test_extreme_probabilities(probability):
    sampler = PoissonSampler(2000, KEY, sampling_probability=probability)
    sizes = [len(rows(sampler, step)) for step in range(50)]
    assert abs(np.mean(sizes) - 2000 * probability) < 6 * np.sqrt(2000 * probability) / 7 + 0.3
    if probability == 1.0:
        assert set(sizes) == {2000}


def test_threshold_never_exceeds_the_accounted_probability():
    """A float32 uniform would sample q = 1e-7 with probability 1.19e-7, 19% too often."""
    bits = np.arange(0, 2**32, 2**12, dtype=np.uint64).astype(np.uint32)
    for probability in (1e-7, 1e-3, 0.04, 0.5):
        realised = np.floor(probability * 2**32) / 2**32
        assert probability - 2.4e-10 <= realised <= probability
        share = len(sampling._poisson_sample(bits, probability)) / len(bits)
        assert abs(share - probability) < 2**-19


def test_physical_shape_is_constant_and_padding_is_marked():
    sampler = PoissonSampler(1000, KEY, 16, sampling_probability=0.05)
    shapes = {sampler.batch(step).indices.shape for step in range(300)}
    assert shapes == {(sampler.physical_batch_size,)} and sampler.physical_batch_size % 16 == 0
    batch = sampler.batch(0)
    assert len(set(rows(sampler, 0))) == (~batch.is_padding_example).sum()


def test_an_overfull_poisson_batch_drops_nobody(monkeypatch):
    full = PoissonSampler(400, KEY, sampling_probability=0.5)
    expected = [rows(full, step) for step in range(20)]
    monkeypatch.setattr(sampling, "_OVERFLOW_PROBABILITY", 0.999)
    tight = PoissonSampler(400, KEY, sampling_probability=0.5)
    assert tight.physical_batch_size < 200
    for step in range(20):
        np.testing.assert_array_equal(rows(tight, step), expected[step])


def test_truncation_keeps_a_uniform_subset():
    sampler = TruncatedPoissonSampler(60, KEY, sampling_probability=0.5, truncated_batch_size=10)
    steps = 900
    each = counts(sampler, steps)
    assert each.sum() == 10 * steps  # 30 expected: practically always cut
    expected = steps / 6
    assert np.abs(each - expected).max() < 5 * np.sqrt(expected)


def test_truncated_is_plain_poisson_where_nothing_is_cut():
    plain = PoissonSampler(200, KEY, sampling_probability=0.1)
    cut = TruncatedPoissonSampler(200, KEY, sampling_probability=0.1, truncated_batch_size=90)
    for step in range(20):
        np.testing.assert_array_equal(rows(plain, step), rows(cut, step))


def test_fixed_size_subsets_are_uniform_and_without_repeats():
    sampler = FixedSizeSampler(50, KEY, fixed_batch_size=5)
    assert all(len(set(rows(sampler, step))) == 5 for step in range(50))
    each = counts(sampler, 1000)
    assert np.abs(each - 100).max() < 5 * np.sqrt(100)


def test_shuffled_epochs_are_partitions_in_new_orders():
    sampler = ShuffledSampler(23, KEY, 4, fixed_batch_size=5)
    epochs = [[rows(sampler, 5 * e + i) for i in range(5)] for e in range(4)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(23))
        assert [len(b) for b in epoch] == [5, 5, 5, 5, 3]
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    assert composed_dp_event(sampler, 2.0, 11).count == 3


def test_cyclic_groups_are_a_partition_that_takes_turns():
    sampler = CyclicSampler(23, KEY, 4, fixed_batch_size=5)
    assert sampler.num_groups == 5 and sampler.expected_batch_size == 4.6
    groups = [set(rows(sampler, step)) for step in range(15)]
    assert sorted(i for group in groups[:5] for i in group) == list(range(23))
    assert sorted(len(group) for group in groups[:5]) == [4, 4, 5, 5, 5]
    assert groups[:5] == groups[5:10] == groups[10:]
    assert {sampler.batch(step).indices.shape for step in range(5)} == {(8,)}
    # Nobody's group is a matter of its place in the data.
    assert groups[0] != {0, 1, 2, 3, 4}


@pytest.mark.parametrize("steps", [1, 5, 6, 11, 15])
def test_cyclic_sampling_costs_one_event_for_each_participation(steps):
    sampler = CyclicSampler(23, KEY, fixed_batch_size=5)
    most = int(counts(sampler, steps).max())
    assert composed_dp_event(sampler, 2.0, steps).count == most == sampler.num_events(steps)


def test_cyclic_poisson_keeps_to_its_group_and_its_probability():
    sampler = CyclicPoissonSampler(203, KEY, sampling_probability=0.3, num_groups=4)
    steps = 480
    taken = np.zeros((4, 203))
    for step in range(steps):
        taken[step % 4, rows(sampler, step)] += 1
    home = taken.argmax(axis=0)
    assert np.all(np.count_nonzero(taken, axis=0) == 1)  # never in another group's turn
    assert sorted(np.bincount(home)) == [50, 51, 51, 51]
    each = taken.sum(axis=0) / (steps / 4)
    spread = np.sqrt(0.3 * 0.7 / (steps / 4))
    assert np.abs(each - 0.3).max() < 4.5 * spread  # 203 examples
    assert abs(each.mean() - 0.3) < 5 * spread / np.sqrt(203)
    for wrong in (2 / 3, 3 / 2):
        assert abs(each.mean() - 0.3 * wrong) > 15 * spread / np.sqrt(203)
    assert 0.8 < each.std() / spread < 1.2
    assert sampler.expected_batch_size == pytest.approx(203 * 0.3 / 4)
    assert [sampler.num_events(n) for n in (0, 1, 4, 5, 9)] == [0, 1, 1, 2, 3]
    sizes = {len(rows(sampler, step)) for step in range(40)}
    assert len(sizes) > 5 and {len(sampler.batch(s).indices) for s in range(40)} == {
        sampler.physical_batch_size
    }


@pytest.mark.parametrize(
    "sampler",
    [
        PoissonSampler(90, KEY, sampling_probability=0.2),
        TruncatedPoissonSampler(90, KEY, sampling_probability=0.2, truncated_batch_size=20),
        FixedSizeSampler(90, KEY, fixed_batch_size=9),
        ShuffledSampler(90, KEY, fixed_batch_size=9),
        CyclicSampler(90, KEY, fixed_batch_size=9),
        CyclicPoissonSampler(90, KEY, sampling_probability=0.5, num_groups=4),
    ],
    ids=lambda s: s.name,
)
class TestEverySampler:
    def test_position_is_the_step_alone(self, sampler):
        forwards = [sampler.batch(step) for step in range(6)]
        backwards = [sampler.batch(step) for step in reversed(range(6))][::-1]
        for a, b in zip(forwards, backwards, strict=True):
            np.testing.assert_array_equal(a.indices, b.indices)

    def test_another_key_draws_other_rows(self, sampler):
        other = dataclasses.replace(sampler, key=jax.random.key(1))
        assert any(not np.array_equal(rows(sampler, s), rows(other, s)) for s in range(5))

    def test_the_key_is_neither_shown_nor_optional(self, sampler):
        assert "key" not in repr(sampler).lower().replace("key=none", "")
        with pytest.raises(DpjaxError, match="key is None"):
            dataclasses.replace(sampler, key=None).batch(0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PoissonSampler(0, KEY, sampling_probability=0.1), "population is 0"),
        (lambda: PoissonSampler(9, KEY, sampling_probability=0.0), "sampling_probability is 0.0"),
        (lambda: PoissonSampler(9, KEY, sampling_probability=1.1), "sampling_probability is 1.1"),
        (lambda: FixedSizeSampler(9, KEY, fixed_batch_size=10), "fixed_batch_size is 10"),
        (lambda: CyclicSampler(9, KEY, fixed_batch_size=0), "fixed_batch_size is 0"),
        (
            lambda: CyclicPoissonSampler(9, KEY, sampling_probability=0.1, num_groups=10),
            "num_groups is 10",
        ),
        (
            lambda: TruncatedPoissonSampler(9, KEY, sampling_probability=0.1),
            "truncated_batch_size is 0",
        ),
    ],
)
def test_bad_input_is_one_line(make, words):
    with pytest.raises(DpjaxError, match=words):
        make()
