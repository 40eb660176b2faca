"""One configuration couples the parts; what does not fit is refused."""

import dataclasses

import dp_accounting
import jax
import pytest

from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.sampling import FixedSizeSampler, PoissonSampler, ShuffledSampler

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
