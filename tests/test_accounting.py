"""Epsilon against published values, closed forms and a numerical integral of our own."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from dpjax import accounting
from dpjax.accounting import (
    calibrate_iterations,
    calibrate_noise_multiplier,
    epsilon,
    epsilon_curve,
    gaussian_dp_mu,
    untruncate,
)
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD


def poisson(noise_multiplier, probability, count):
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    sampled = dp_accounting.PoissonSampledDpEvent(probability, gaussian)
    return dp_accounting.SelfComposedDpEvent(sampled, count)


def gaussian_delta(mu, e):
    """Balle and Wang (2018), Theorem 8."""
    upper = stats.norm.cdf(mu / 2 - e / mu)
    return upper - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)


@pytest.mark.parametrize(
    ("noise", "probability", "steps", "delta", "by_rdp", "by_pld"),
    [
        (1.5, 0.04, 2250, 1e-5, 7.329, 6.769),
        # 256 of 60,000, 60 epochs: the tutorial of TensorFlow Privacy, with today's conversion.
        (1.1, 256 / 60000, 14062, 1e-5, 2.597, 2.382),
    ],
)
def test_published_values(noise, probability, steps, delta, by_rdp, by_pld):
    event = poisson(noise, probability, steps)
    assert epsilon(event, delta) == pytest.approx(by_rdp, abs=1.5e-3)
    assert epsilon(event, delta, "pld") == pytest.approx(by_pld, abs=1.5e-3)


def test_rdp_of_the_subsampled_gaussian_by_direct_integration():
    """Renyi divergence of the mixture at order 8, integrated, converted by hand: an upper bound."""
    noise, q, steps, delta, order = 2.0, 0.05, 400, 1e-6, 8.0

    def integrand(x):
        ratio = (1 - q) + q * math.exp((2 * x - 1) / (2 * noise**2))
        return stats.norm.pdf(x, 0, noise) * ratio**order

    moment, _ = integrate.quad(integrand, -40, 60, limit=400)
    divergence = steps * math.log(moment) / (order - 1)
    conversion = math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1)
    by_hand = divergence + conversion
    found = epsilon(poisson(noise, q, steps), delta)
    # The accountant takes the best order, so it may only be lower, and not by much here.
    assert 0.8 * by_hand < found <= by_hand * (1 + 1e-6)


@pytest.mark.parametrize("noise", [0.8, 1.0, 3.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_pld_of_a_gaussian_is_the_closed_form(noise, delta):
    exact = optimize.brentq(lambda e: gaussian_delta(1 / noise, e) - delta, 0, 100)
    found = epsilon(dp_accounting.GaussianDpEvent(noise), delta, "pld")
    assert exact <= found + 1e-9 and found == pytest.approx(exact, rel=2e-3)
    assert epsilon(dp_accounting.GaussianDpEvent(noise), delta) >= exact


def test_truncation_is_paid_for():
    plain = poisson(1.0, 0.01, 500)

    def cut(size):
        one = dp_accounting.TruncatedSubsampledGaussianDpEvent(10_000, 0.01, size, 1.0)
        return dp_accounting.SelfComposedDpEvent(one, 500)

    base_rdp, base_pld = epsilon(plain, 1e-6), epsilon(plain, 1e-6, "pld")
    previous = math.inf
    for size in (160, 170, 200):
        by_rdp, by_pld = epsilon(cut(size), 1e-6), epsilon(cut(size), 1e-6, "pld")
        assert base_rdp <= by_rdp <= previous and by_pld >= base_pld - 1e-6
        previous = by_rdp
    assert epsilon(cut(200), 1e-6) == pytest.approx(base_rdp, rel=1e-4)
    assert epsilon(cut(105), 1e-6) == math.inf  # cut all the time: the union bound says nothing
    exact = 500 * stats.binom.sf(160, 10_001, 0.01)
    assert untruncate(cut(160)).probability == pytest.approx(exact)


def test_truncated_rdp_satisfies_its_own_inequality():
    one = dp_accounting.TruncatedSubsampledGaussianDpEvent(10_000, 0.01, 170, 1.0)
    event = dp_accounting.SelfComposedDpEvent(one, 500)
    found = epsilon(event, 1e-6)
    cut = untruncate(event).probability
    spent = 1e-6 - (1 + math.exp(found)) * cut
    assert 0 < spent < 1e-6
    assert epsilon(poisson(1.0, 0.01, 500), spent) <= found + 1e-6


def test_both_accountants_agree_on_what_replace_one_means():
    """dp_accounting's PLD reads the multiplier as stddev / clip norm there: twice too much."""
    for relation in ("replace_one", "replace_special"):
        mechanism = DPSGD(
            1.0, 0.1, 40, noise_multiplier=2.0, sampling="shuffled", population=100,
            neighboring_relation=relation,
        )  # fmt: skip
        by_rdp, by_pld = mechanism.epsilon(1e-5), mechanism.epsilon(1e-5, "pld")
        exact = optimize.brentq(lambda e: gaussian_delta(math.sqrt(4) / 2.0, e) - 1e-5, 0, 100)
        assert by_pld == pytest.approx(exact, rel=5e-3) and exact <= by_rdp <= 1.15 * exact
    double = DPSGD(1.0, 0.1, 40, noise_multiplier=2.0, sampling="shuffled", population=100,
                   neighboring_relation="replace_one")  # fmt: skip
    single = DPSGD(1.0, 0.1, 40, noise_multiplier=2.0, sampling="shuffled", population=100)
    assert double.stddev == 2 * single.stddev


def test_fixed_size_has_its_own_epsilon_and_no_pld():
    fixed = DPSGD(1.0, 0.04, 500, noise_multiplier=1.5, sampling="fixed_size", population=1000)
    sampled = DPSGD(1.0, 0.04, 500, noise_multiplier=1.5)
    assert fixed.epsilon(1e-5) > sampled.epsilon(1e-5)
    with pytest.raises(DpjaxError, match="no proven bound for SampledWithoutReplacement"):
        fixed.epsilon(1e-5, "pld")


def test_shuffling_claims_no_amplification():
    shuffled = DPSGD(1.0, 0.01, 100, noise_multiplier=1.5, sampling="shuffled", population=1000)
    one_epoch = epsilon(dp_accounting.GaussianDpEvent(1.5), 1e-5)
    assert shuffled.epsilon(1e-5) == pytest.approx(one_epoch)
    assert shuffled.epsilon(1e-5) > 2 * DPSGD(1.0, 0.01, 100, noise_multiplier=1.5).epsilon(1e-5)


@pytest.mark.parametrize(
    ("event", "relation", "words"),
    [
        (poisson(1.0, 0.1, 3), "replace_one", "samples by Poisson"),
        (
            dp_accounting.SampledWithoutReplacementDpEvent(
                100, 10, dp_accounting.GaussianDpEvent(1.0)
            ),
            "add_or_remove_one",
            "fixed-size sampling",
        ),
    ],
)
def test_a_relation_without_a_proof_is_refused(event, relation, words):
    with pytest.raises(DpjaxError, match=words):
        epsilon(event, 1e-5, "rdp", relation)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_calibration_is_private_and_tight(accountant):
    noise = calibrate_noise_multiplier(lambda s: poisson(s, 0.02, 300), 3.0, 1e-5, accountant)
    assert epsilon(poisson(noise, 0.02, 300), 1e-5, accountant) <= 3.0
    assert epsilon(poisson(noise * 0.995, 0.02, 300), 1e-5, accountant) > 3.0


def test_a_numerical_bound_without_a_sensible_grid_is_refused_at_once():
    """Of noise this small PLD would take minutes; calibration steps over it."""
    event = DPSGD(1.0, 0.3, 4, noise_multiplier=0.005).dp_event
    assert epsilon(event, 1e-3) > 1e4
    with pytest.raises(DpjaxError, match="above 100 by RDP"):
        epsilon(event, 1e-3, "pld")
    # The first noise multiplier that is tried, 1, is hopeless.
    made = lambda noise: dp_accounting.GaussianDpEvent(noise / 12)  # noqa: E731
    assert epsilon(made(1.0), 1e-3) > 100
    noise = calibrate_noise_multiplier(made, 2.0, 1e-3, "pld")
    assert accounting.gaussian_epsilon(12 / noise, 1e-3) == pytest.approx(2.0, abs=0.01)


def test_calibrated_iterations_are_the_last_that_fit():
    count = calibrate_iterations(lambda n: poisson(1.0, 0.02, n), 2.0, 1e-5)
    assert epsilon(poisson(1.0, 0.02, count), 1e-5) <= 2.0
    assert epsilon(poisson(1.0, 0.02, count + 1), 1e-5) > 2.0


def test_curve_equals_epsilon_at_every_point():
    counts = np.array([0, 1, 7, 300])
    one = poisson(1.2, 0.03, 1).event
    curve = epsilon_curve(one, counts, 1e-5)
    expected = [0.0] + [epsilon(poisson(1.2, 0.03, int(n)), 1e-5) for n in counts[1:]]
    np.testing.assert_allclose(curve, expected, rtol=1e-9)
    assert np.all(np.diff(curve) > 0)


def test_gaussian_dp_mu_of_a_gaussian_is_its_own():
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(4.0), 4)
    mu, regret = gaussian_dp_mu(event, 10_000)
    assert mu == pytest.approx(0.5, rel=2e-3) and abs(regret) < 0.02


def test_no_noise_is_no_guarantee():
    assert DPSGD(float("inf"), 0.1, 3, noise_multiplier=0.0).epsilon(1e-5) == math.inf
    assert epsilon(dp_accounting.NoOpDpEvent(), 1e-5) == 0.0
    assert accounting.epsilon(dp_accounting.NonPrivateDpEvent(), 1e-5, "pld") == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_a_delta_that_means_nothing_is_refused(delta):
    with pytest.raises(DpjaxError, match="delta is"):
        epsilon(poisson(1.0, 0.1, 1), delta)
