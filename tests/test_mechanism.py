"""One configuration couples the parts; what does not fit is refused."""

import dataclasses

import dp_accounting
import jax
import numpy as np
import pytest

from dpjax import accounting
from dpjax.adaptive import AdaptiveClipping
from dpjax.correlated_noise import CorrelatedNoise
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.releases import released_dp_event
from dpjax.sampling import (
    CyclicPoissonSampler,
    CyclicSampler,
    FixedSizeSampler,
    PoissonSampler,
    ShuffledSampler,
)
from dpjax.strategies import BandedToeplitz, BufferedToeplitz, Dense, Tree

BASE = {"l2_clip_norm": 1.0, "sampling_probability": 0.1, "iterations": 10}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "give either the noise multiplier or both targets"),
        ({"noise_multiplier": 1.0, "target_epsilon": 1.0}, "give either"),
        ({"target_epsilon": 1.0}, "target_delta is missing"),
        ({"target_delta": 1e-5}, "target_epsilon is missing"),
        ({"target_epsilon": 0.0, "target_delta": 1e-5}, "target_epsilon is 0.0"),
        ({"target_epsilon": 1.0, "target_delta": 0.01, "population": 100}, "not below 1/n"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier is inf"),
        ({"noise_multiplier": 1.0, "l2_clip_norm": float("inf")}, "l2_clip_norm is inf"),
        ({"noise_multiplier": 1.0, "l2_clip_norm": 0.0}, "l2_clip_norm is 0.0"),
        ({"noise_multiplier": 1.0, "iterations": 0}, "iterations is 0"),
        ({"noise_multiplier": 1.0, "sampling_probability": 0.0}, "sampling_probability is 0.0"),
        ({"noise_multiplier": 1.0, "sampling": "lottery"}, "sampling is 'lottery'"),
        ({"noise_multiplier": 1.0, "sampling": "shuffled"}, "population is None"),
        ({"noise_multiplier": 1.0, "truncated_batch_size": 9}, "truncated_batch_size is 9"),
        (
            {"noise_multiplier": 1.0, "neighboring_relation": "replace_one"},
            "poisson sampling has no proven accounting",
        ),
        (
            {
                "noise_multiplier": 1.0, "sampling": "shuffled", "population": 100,
                "neighboring_relation": "add_or_remove_one",
            },
            "shuffled sampling has no proven accounting",
        ),
        (
            {
                "noise_multiplier": 1.0, "sampling": "fixed_size", "population": 100,
                "neighboring_relation": "add_or_remove_one",
            },
            "fixed_size sampling has no proven accounting",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_one_line(changes, words):
    with pytest.raises(DpjaxError, match=words) as caught:
        DPSGD(**{**BASE, **changes})
    assert "\n" not in str(caught.value)


def test_the_event_is_built_from_the_sampler_that_runs():
    mechanism = DPSGD(**BASE, noise_multiplier=1.3)
    sampler = mechanism.sampler(500, jax.random.key(0))
    expected = dp_accounting.SelfComposedDpEvent(sampler.dp_event(1.3), 10)
    assert mechanism.dp_event == expected
    assert mechanism.stddev == 1.3


@pytest.mark.parametrize(
    "other",
    [
        ShuffledSampler(500, fixed_batch_size=50),
        FixedSizeSampler(500, fixed_batch_size=50),
        PoissonSampler(500, sampling_probability=0.2),
    ],
    ids=lambda s: s.name,
)
def test_another_sampler_is_refused(other):
    with pytest.raises(DpjaxError, match="but the mechanism accounts for"):
        DPSGD(**BASE, noise_multiplier=1.3).check_sampler(other)


def test_another_population_is_refused():
    with pytest.raises(DpjaxError, match="has 400 examples"):
        DPSGD(**BASE, noise_multiplier=1.0, population=500).sampler(400, jax.random.key(0))


def test_noise_follows_the_sensitivity_of_what_is_clipped():
    mechanism = DPSGD(**{**BASE, "l2_clip_norm": 3.0}, noise_multiplier=2.0, normalize_by=8.0)
    grad_fn = mechanism.clipped_grad(lambda p, x: p * x)
    assert mechanism.stddev == 2.0 * grad_fn.sensitivity("add_or_remove_one") == 0.75
    fixed = dataclasses.replace(
        mechanism, sampling="fixed_size", population=100, neighboring_relation=None
    )
    assert fixed.stddev == 1.5


def test_curve_ends_at_epsilon_and_calibration_is_kept():
    mechanism = DPSGD(**BASE, target_epsilon=2.0, target_delta=1e-5)
    assert mechanism.epsilon(1e-5) <= 2.0
    curve = mechanism.epsilon_curve(1e-5)
    assert curve[0] == 0 and curve[-1] == pytest.approx(mechanism.epsilon(1e-5))
    assert hash(mechanism) == hash(dataclasses.replace(mechanism, noise_multiplier=None))


def test_a_sampler_with_the_same_event_but_other_turns_is_refused():
    """Twice the batch is twice the epochs, at the same cost of one."""
    mechanism = DPSGD(**BASE, noise_multiplier=1.0, sampling="shuffled", population=100)
    for size, population in ((20, 100), (10, 50), (5, 50)):
        with pytest.raises(DpjaxError, match="the mechanism (accounts|was accounted) for"):
            mechanism.check_sampler(ShuffledSampler(population, fixed_batch_size=size))
    mechanism.check_sampler(mechanism.sampler(100, jax.random.key(0)))


CYCLIC = {**BASE, "iterations": 24, "sampling": "cyclic", "population": 80}  # ten groups


@pytest.mark.parametrize(
    "noise", [CorrelatedNoise(num_bands=4), CorrelatedNoise("blt"), CorrelatedNoise("tree")]
)
@pytest.mark.parametrize("relation", ["replace_special", "replace_one"])
def test_correlated_noise_is_one_event_scaled_to_all_participations(noise, relation):
    mechanism = DPSGD(
        **{**CYCLIC, "l2_clip_norm": 3.0}, noise_multiplier=1.5, normalize_by=8.0,
        neighboring_relation=relation, correlated_noise=noise,
    )  # fmt: skip
    one = dp_accounting.GaussianDpEvent(1.5)
    assert {mechanism.dp_event_after(n) for n in range(1, 25)} == {one}
    assert mechanism.dp_event_after(0) == dp_accounting.NoOpDpEvent()
    assert mechanism.dp_event_after(25) == dp_accounting.NonPrivateDpEvent()
    curve = mechanism.epsilon_curve(1e-5)
    expected = accounting.epsilon(one, 1e-5)
    np.testing.assert_allclose(curve, [0.0] + [expected] * 24)
    # Brute force: the sampler's own turns, every example, the dense matrix, opposite gradients.
    matrix = mechanism.strategy.strategy_matrix()
    sampler, most = mechanism.sampler(80, jax.random.key(0)), 0.0
    taken = np.zeros((24, 80))
    for step in range(24):
        batch = sampler.batch(step)
        taken[step, batch.indices[~batch.is_padding_example]] = 1
    change = (2 if relation == "replace_one" else 1) * 3.0 / 8.0
    most = np.linalg.norm(matrix @ (change * taken), axis=0).max()
    assert mechanism.stddev == pytest.approx(1.5 * most)


def test_a_target_is_calibrated_for_the_whole_run():
    banded = CorrelatedNoise(num_bands=4)
    mechanism = DPSGD(**CYCLIC, target_epsilon=2.0, target_delta=1e-5, correlated_noise=banded)
    assert mechanism.epsilon(1e-5) <= 2.0
    independent = DPSGD(**CYCLIC, target_epsilon=2.0, target_delta=1e-5)
    # Three participations: independent noise pays for them in its multiplier.
    assert independent.noise_multiplier == pytest.approx(
        mechanism.noise_multiplier * np.sqrt(3), rel=1e-3
    )
    assert independent.dp_event == dp_accounting.SelfComposedDpEvent(
        dp_accounting.GaussianDpEvent(independent.noise_multiplier), 3
    )
    assert hash(mechanism) == hash(dataclasses.replace(mechanism, noise_multiplier=None))


def test_a_ready_strategy_is_the_same_mechanism():
    planned = DPSGD(**CYCLIC, noise_multiplier=1.0, correlated_noise=CorrelatedNoise("blt"))
    given = dataclasses.replace(planned, correlated_noise=planned.strategy)
    assert given.strategy == planned.strategy and given.stddev == planned.stddev


def test_amplified_banded_noise_composes_the_turns_of_a_group():
    """Choquette-Choo et al. (2023), theorem 4: as DP-SGD with fewer steps and a larger share."""
    mechanism = DPSGD(
        1.0, 0.1, 22, noise_multiplier=1.2, sampling="cyclic_poisson", population=200,
        correlated_noise=CorrelatedNoise(num_bands=5),
    )  # fmt: skip
    sampled = dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(1.2))
    assert mechanism.dp_event == dp_accounting.SelfComposedDpEvent(sampled, 5)
    assert mechanism.dp_event_after(11) == dp_accounting.SelfComposedDpEvent(sampled, 3)
    assert mechanism.expected_batch_size == pytest.approx(20)
    sampler = mechanism.sampler(200, jax.random.key(0))
    assert isinstance(sampler, CyclicPoissonSampler) and sampler.num_groups == 5
    columns = np.linalg.norm(mechanism.strategy.strategy_matrix(), axis=0)
    assert mechanism.stddev == pytest.approx(1.2 * columns.max())
    gram = mechanism.strategy.strategy_matrix()
    gram = gram.T @ gram
    assert np.all(gram[np.abs(np.subtract.outer(range(22), range(22))) >= 5] == 0)
    curve = mechanism.epsilon_curve(1e-5)
    assert curve[-1] == pytest.approx(mechanism.epsilon(1e-5)) and curve[1] == curve[5] < curve[6]


def test_no_guarantee_without_a_proof():
    none = dp_accounting.NonPrivateDpEvent()
    poisson = PoissonSampler(80, sampling_probability=0.1)
    groups = CyclicPoissonSampler(80, sampling_probability=0.4, num_groups=4)
    for sampler, strategy in [
        (poisson, Tree(9)),
        (ShuffledSampler(80, fixed_batch_size=8), Tree(9)),
        (groups, Tree(9)),
        (groups, BandedToeplitz((1.0, 0.5, 0.4, 0.3, 0.2), 9)),
        (CyclicSampler(80, fixed_batch_size=8), Tree(3)),
    ]:
        assert released_dp_event(sampler, 1.0, 4, strategy) == none


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": "shuffled"}, "with shuffled sampling"),
        ({"sampling": "poisson"}, "with poisson sampling"),
        ({"sampling": "fixed_size"}, "with fixed_size sampling"),
        ({"adaptive_clipping": AdaptiveClipping()}, "is not proven"),
        ({"neighboring_relation": "add_or_remove_one"}, "no proven accounting"),
        ({"correlated_noise": CorrelatedNoise(num_bands=11)}, "returns after 10 of 24"),
        ({"correlated_noise": Tree(23)}, "for 23 iterations, the mechanism for 24"),
        ({"correlated_noise": BandedToeplitz((1.0, -0.5) * 6, 24)}, "use at most 10 bands"),
        ({"correlated_noise": Dense(((1.0,),))}, "is a Dense"),
        ({"sampling": "cyclic_poisson", "correlated_noise": None}, "correlated_noise is None"),
        ({"sampling": "cyclic_poisson", "correlated_noise": Tree(24)}, "banded noise only"),
        (
            {"sampling": "cyclic_poisson", "correlated_noise": CorrelatedNoise("blt")},
            "banded noise only",
        ),
        (
            {"sampling": "cyclic_poisson", "correlated_noise": CorrelatedNoise(num_bands=11)},
            "use at most 10 bands",
        ),
        (
            {
                "sampling": "cyclic_poisson", "correlated_noise": CorrelatedNoise(num_bands=4),
                "neighboring_relation": "replace_one",
            },
            "no proven accounting",
        ),
        (
            {"correlated_noise": BufferedToeplitz((0.5,), (0.5,), 24), "population": None},
            "population is None",
        ),
    ],
)  # fmt: skip
def test_what_correlated_noise_does_not_cover_is_refused(changes, words):
    given = {"correlated_noise": CorrelatedNoise(num_bands=4), **CYCLIC, **changes}
    with pytest.raises(DpjaxError, match=words) as caught:
        DPSGD(**given, noise_multiplier=1.0)
    assert "\n" not in str(caught.value)
