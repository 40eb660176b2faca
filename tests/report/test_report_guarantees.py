"""Group and attack bounds against closed forms and against slow direct computation."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import optimize, stats

from dpjax import accounting
from dpjax.errors import DpjaxError
from dpjax.report.guarantees import (
    LARGEST_GROUP,
    group_guarantee,
    privacy_curve,
    true_positive_rate_bound,
)
from dpjax.types import NeighboringRelation

GAUSSIAN = dp_accounting.GaussianDpEvent
DELTA = 1e-5


def gaussian_delta(mu, epsilon):
    """Balle and Wang (2018), Theorem 8."""
    return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(
        -mu / 2 - epsilon / mu
    )


def poisson(probability, noise_multiplier, count):
    sampled = dp_accounting.PoissonSampledDpEvent(probability, GAUSSIAN(noise_multiplier))
    return dp_accounting.SelfComposedDpEvent(sampled, count)


def test_curve_of_the_gaussian_mechanism():
    curve = privacy_curve(GAUSSIAN(1.5))
    assert curve.delta(1.0) == pytest.approx(gaussian_delta(1 / 1.5, 1.0), rel=1e-3)
    epsilon = curve.epsilon(DELTA)
    assert gaussian_delta(1 / 1.5, epsilon) == pytest.approx(DELTA, rel=1e-2)


@pytest.mark.parametrize("size", [2, 5])
def test_group_of_gaussian_releases_has_joint_sensitivity(size):
    # 9 releases of noise 6 are one of noise 2; a group of k has k times the sensitivity.
    event = dp_accounting.SelfComposedDpEvent(GAUSSIAN(6.0), 9)
    found = group_guarantee(event, size, DELTA)
    exact = optimize.brentq(lambda e: gaussian_delta(size / 2.0, e) - DELTA, 0.0, 60.0)
    assert exact <= found.epsilon <= exact * 1.01


def test_group_under_poisson_sampling_of_one_iteration_matches_integration():
    """One release, both directions, by the hockey-stick integral on a fine grid."""
    probability, noise, size, epsilon = 0.3, 1.2, 3, 1.0
    grid = np.linspace(-15.0, 20.0, 400_001)
    weights = stats.binom.pmf(range(size + 1), size, probability)
    mixed = sum(w * stats.norm.pdf(grid, i, noise) for i, w in enumerate(weights))
    plain = stats.norm.pdf(grid, 0.0, noise)
    step = grid[1] - grid[0]
    exact = max(
        np.sum(np.maximum(a - math.exp(epsilon) * b, 0.0)) * step
        for a, b in ((mixed, plain), (plain, mixed))
    )
    found = privacy_curve(poisson(probability, noise, 1), size, 4e-3).delta(epsilon)
    assert exact * (1 - 1e-6) <= found <= exact * 1.01


def test_groups_lie_between_one_unit_and_the_generic_conversion():
    event = poisson(0.05, 1.5, 40)
    one = accounting.epsilon(event, DELTA, "pld")
    pair = group_guarantee(event, 2, DELTA).epsilon
    four = group_guarantee(event, 4, DELTA).epsilon
    assert one < pair < four
    # A group cannot do better than its members k times over at a smaller delta.
    generic = 2 * accounting.epsilon(event, DELTA / 50, "pld")
    assert pair < generic
    assert one <= group_guarantee(event, 1, DELTA).epsilon * (1 + 1e-6) <= 1.01 * one


def test_generic_conversion_is_sound_for_a_gaussian():
    """Fixed-size sampling of everything is a Gaussian, whose exact group curve is known."""
    everything = dp_accounting.SampledWithoutReplacementDpEvent(100, 100, GAUSSIAN(8.0))
    relation = NeighboringRelation.REPLACE_ONE
    found = group_guarantee(everything, 2, DELTA, relation)
    exact = optimize.brentq(lambda e: gaussian_delta(2 / 8.0, e) - DELTA, 0.0, 60.0)
    assert found.method.startswith("generic")
    assert exact < found.epsilon < 6 * exact


def test_truncation_is_paid_for():
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(500, 0.05, 60, 2.0)
    curve = privacy_curve(event)
    assert curve.truncated == pytest.approx(stats.binom.sf(60, 501, 0.05))
    plain = privacy_curve(poisson(0.05, 2.0, 1))
    for delta in (1e-4, 1e-6):
        found = curve.epsilon(delta)
        assert plain.epsilon(delta) <= found
        assert plain.delta(found) + (1 + math.exp(found)) * curve.truncated <= delta * (1 + 1e-9)
    assert curve.epsilon(curve.truncated) == math.inf


def test_a_group_beyond_the_limit_has_no_number():
    found = group_guarantee(GAUSSIAN(50.0), LARGEST_GROUP + 1, DELTA)
    assert found.epsilon is None and "assume no protection" in found.method
    with pytest.raises(DpjaxError, match="size is 0"):
        group_guarantee(GAUSSIAN(50.0), 0, DELTA)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_membership_bound_covers_the_best_test(mu):
    """Neyman and Pearson: the best test against a Gaussian reaches Phi(Phi^-1(a) + mu)."""
    curve = privacy_curve(GAUSSIAN(1 / mu))
    best = stats.norm.cdf(stats.norm.ppf(0.01) + mu)
    assert best <= true_positive_rate_bound(curve, 0.01) <= best * 1.1


@pytest.mark.parametrize(
    ("noise_multiplier", "count", "interval"), [(50.0, 300, 2e-4), (1.0, 100, 2e-3)], ids=str
)
def test_rounding_of_losses_costs_groups_under_one_percent(noise_multiplier, count, interval):
    """Also where epsilon is tiny, and losses far below the coarse interval."""
    event = poisson(0.005, noise_multiplier, count)
    fine = privacy_curve(event, 2, interval).epsilon(DELTA)
    assert group_guarantee(event, 2, DELTA).epsilon <= 1.01 * fine
