"""Integer noise against its probabilities, and its accounting against sums over the integers."""

import math
import random
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from dpjax import DpjaxError, discrete_accounting, discrete_noise
from dpjax.discrete_noise import (
    centred,
    discrete_gaussian_table,
    exact_discrete_gaussian,
    noise_table,
    skellam_table,
)


def gaussian_pmf(scale_squared, reach=80):
    """float64[2 reach + 1], from its definition."""
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-(x**2) / (2 * scale_squared))
    return weights / weights.sum()


def skellam_pmf(variance, reach=80):
    return stats.skellam.pmf(np.arange(-reach, reach + 1), variance / 2, variance / 2)


PMF = {"discrete_gaussian": gaussian_pmf, "skellam": skellam_pmf}


def p_value(draws, pmf):
    """Chi-square of draws against a pmf on -80..80, bins of at least 10 expected draws."""
    expected = pmf * len(draws)
    counts = np.bincount(np.clip(draws, -80, 80) + 80, minlength=161)
    common = expected >= 10
    found = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], max(len(draws) - expected[common].sum(), 1e-9))
    return stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize("noise", ["discrete_gaussian", "skellam"])
@pytest.mark.parametrize("variance", [0.3, 4.7])
def test_draws_follow_the_distribution(noise, variance):
    """Rejects two thirds and three halves of the variance."""
    draws = np.asarray(noise_table(noise, variance).sample(jax.random.key(1), (60_000,)))
    assert p_value(draws, PMF[noise](variance)) > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert p_value(draws, PMF[noise](wrong * variance)) < 1e-30


@pytest.mark.parametrize("noise", ["discrete_gaussian", "skellam"])
@pytest.mark.parametrize("variance", [0.01, 2.3, 900.0])
def test_thresholds_are_the_distribution_function(noise, variance):
    table = noise_table(noise, variance)
    reach = table.largest
    below = np.array([int(a) << 64 | int(b) << 32 | int(c) for a, b, c in table.thresholds], object)
    found = (below / 2**96).astype(np.float64)
    half = PMF[noise](variance, reach)[reach:]
    expected = np.cumsum(half * np.where(np.arange(reach + 1) == 0, 1, 2))[:reach]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert np.all(np.diff(below) >= 0) and 2**96 - below[-1] < 2**96 * 1e-20
    assert table.total_variation < 1e-23


def test_variances_small_and_large():
    assert skellam_table(7.25).variance == pytest.approx(7.25, rel=1e-12)
    x = np.arange(-80, 81)
    for variance in (0.2, 1.0):
        expected = (gaussian_pmf(variance) * x**2).sum()
        assert discrete_gaussian_table(variance).variance == pytest.approx(expected, rel=1e-12)
        assert expected < variance  # Canonne et al. (2020), corollary 9
    for noise in ("discrete_gaussian", "skellam"):
        draws = np.asarray(noise_table(noise, 1e6).sample(jax.random.key(0), (20_000,)))
        assert abs(draws.std() / 1e3 - 1) < 0.03 and abs(draws.mean()) < 40
        assert stats.kstest(draws / 1e3, "norm").pvalue > 1e-3


def test_a_sum_of_skellams_is_one():
    """What clients add together: n shares of variance v / n."""
    share = skellam_table(3.0 / 8)
    draws = np.asarray(share.sample(jax.random.key(2), (8, 40_000))).sum(0)
    assert p_value(draws, skellam_pmf(3.0)) > 1e-3
    assert p_value(draws, skellam_pmf(2.0)) < 1e-30


@pytest.mark.parametrize("scale_squared", [Fraction(1, 3), Fraction(9, 4), 20.0])
def test_exact_draws_follow_the_distribution(scale_squared, monkeypatch):
    """With a seeded source in place of the system's: the algorithm is the same."""
    monkeypatch.setattr(discrete_noise.secrets, "randbelow", random.Random(5).randrange)
    draws = exact_discrete_gaussian(scale_squared, 6000)
    assert p_value(draws, gaussian_pmf(float(scale_squared))) > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert p_value(draws, gaussian_pmf(wrong * float(scale_squared))) < 1e-12


def test_exact_draws_come_from_the_system():
    one, other = exact_discrete_gaussian(100.0, 50), exact_discrete_gaussian(100.0, 50)
    assert not np.array_equal(one, other)


def test_centred_numbers():
    for bits in (8, 17, 32):
        whole = np.array([0, 1, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))], np.int64)
        sent = jnp.asarray((whole % 2**bits).astype(np.uint32))
        np.testing.assert_array_equal(centred(sent, bits), whole)


def divergence(p, q, order):
    """Renyi divergence of two pmfs by summation, in float64."""
    keep = (p > 0) & (q > 0)
    logs = order * np.log(p[keep]) + (1 - order) * np.log(q[keep])
    return np.logaddexp.reduce(logs) / (order - 1)


def shifted(pmf, shift, order):
    return divergence(pmf[shift:], pmf[: len(pmf) - shift], order)


@pytest.mark.parametrize("variance, shift", [(4.0, 1), (30.0, 1), (30.0, 3), (100.0, 4)])
def test_skellams_bound_against_summation(variance, shift):
    """Above the truth at every order, and not by much where the noise is large."""
    orders = np.array([2, 3, 5, 10])
    bound = discrete_accounting.skellam_renyi(orders, variance, shift, shift)
    truth = np.array([shifted(skellam_pmf(variance, 150), shift, a) for a in orders])
    assert np.all(truth <= bound)
    assert np.all(bound / truth < (1.25 if variance >= 30 else 2.0))
    # Coordinates add up: the L1 and L2 norms of the shift (1, 3).
    both = [shifted(skellam_pmf(variance, 150), s, 5) for s in (1, 3)]
    assert (
        sum(both) <= discrete_accounting.skellam_renyi(np.array([5]), variance, 4, math.sqrt(10))[0]
    )


@pytest.mark.parametrize("scale_squared, summands", [(0.5, 3), (0.5, 12), (1.0, 6), (2.0, 1)])
def test_bound_of_summed_gaussians_against_summation(scale_squared, summands):
    pmf = total = gaussian_pmf(scale_squared, 100)
    for _ in range(summands - 1):
        total = np.convolve(total, pmf)
    # Far out, convolution leaves rounding only.
    total = np.where(total > 1e-40, total, 0.0)
    orders = np.array([2.0, 4.0, 7.0])
    for shift in (1, 2):
        truth = np.array([shifted(total, shift, a) for a in orders])
        bound = discrete_accounting.summed_discrete_gaussian_renyi(
            orders, scale_squared, summands, shift, shift, 1
        )
        assert np.all(truth <= bound * (1 + 1e-9))
        if summands == 1:  # Canonne et al. (2020), proposition 5: equality
            np.testing.assert_allclose(truth, bound, rtol=1e-6)
        if scale_squared >= 1:
            assert np.all(bound / truth < 1.1)


def test_epsilon_against_the_loss_distribution_of_dp_accounting():
    """One discrete Gaussian, one coordinate, four releases: never below, and close."""
    made = privacy_loss_distribution.from_discrete_gaussian_mechanism(
        5.0, 1, value_discretization_interval=1e-4
    ).self_compose(4)
    exact = made.get_epsilon_for_delta(1e-5)
    orders = np.arange(2, 200, dtype=np.float64)
    divergences = discrete_accounting.summed_discrete_gaussian_renyi(orders, 25.0, 1, 1, 1, 1)
    found = discrete_accounting.renyi_epsilon(orders, 4 * divergences, 1e-5)
    assert exact < found < 1.15 * exact
    # At this variance Skellam noise costs hardly more than a Gaussian.
    skellam = discrete_accounting.renyi_epsilon(
        orders, 4 * discrete_accounting.skellam_renyi(orders, 25.0, 1, 1), 1e-5
    )
    assert found < skellam < 1.2 * found


def test_what_is_refused():
    for make in (skellam_table, discrete_gaussian_table):
        with pytest.raises(DpjaxError, match="variance on the integer grid"):
            make(1e-5)
    with pytest.raises(DpjaxError, match="use 'discrete_gaussian' or 'skellam'"):
        noise_table("laplace", 1.0)
    with pytest.raises(DpjaxError, match="scale_squared is 0"):
        exact_discrete_gaussian(0, 1)
    with pytest.raises(DpjaxError, match="from 0.25 on"):
        discrete_accounting.summed_discrete_gaussian_renyi(np.array([2.0]), 0.2, 5, 1, 1, 1)
