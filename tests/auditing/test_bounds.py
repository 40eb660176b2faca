"""Epsilon lower bounds: published vectors, another library, coverage of a known epsilon."""

import math

import dp_accounting
import numpy as np
import pytest
from jax_privacy import auditing as statistics
from scipy import stats

from dpjax import accounting
from dpjax.auditing.bounds import (
    Guesses,
    audit_coins,
    guess_coins,
    mechanism_family,
    one_run,
    one_run_gaussian,
    one_run_p_value,
    one_run_profile,
    rejects_trade_off,
)
from dpjax.auditing.results import EpsilonBound, verdict
from dpjax.auditing.two_samples import GUESS_FRACTIONS, clopper_pearson, gaussian_dp
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.trade_off import GaussianTradeOff, ProfileTradeOff, event_trade_off


def test_check_vectors():
    guesses = Guesses(1000, 100, 90)
    assert one_run(guesses, 1e-5).epsilon_lower == pytest.approx(1.626143, abs=2e-6)
    assert one_run_gaussian(guesses, 1e-5).epsilon_lower == pytest.approx(2.456405, abs=2e-6)
    found = clopper_pearson(900, 1000, 100, 1000, 1e-5)
    assert found.epsilon_lower == pytest.approx(1.989695, abs=2e-6)
    assert one_run(guesses, 1e-5).ceiling == pytest.approx(5.78, abs=0.01)


def accusations(guesses):
    """Scores that jax_privacy counts as these guesses; it knows accusations alone."""
    m, r, v = guesses
    rest = m - r
    inside = np.arange(v + rest // 2) < v
    outside = np.arange(r - v + rest - rest // 2) < r - v
    return statistics.CanaryScoreAuditor(inside, outside)


@pytest.mark.parametrize(
    "guesses",
    [(1000, 100, 90), (200, 100, 70), (50, 20, 20), (5000, 50, 49), (100, 40, 21), (30, 5, 1)],
)
@pytest.mark.parametrize(("delta", "confidence"), [(1e-5, 0.95), (1e-2, 0.9), (1e-7, 0.99)])
def test_one_run_is_that_of_jax_privacy_where_it_has_it(guesses, delta, confidence):
    guesses = Guesses(*guesses)
    theirs = accusations(guesses)
    rule = {"threshold_strategy": statistics.Explicit(0.5)}
    expected = theirs.epsilon_one_run(1 - confidence, delta, **rule)
    assert one_run(guesses, delta, confidence).epsilon_lower == pytest.approx(expected, abs=3e-6)
    expected = theirs.epsilon_one_run_fdp(1 - confidence, delta, **rule)
    found = one_run_gaussian(guesses, delta, confidence).epsilon_lower
    assert found == pytest.approx(expected, abs=3e-6)


def test_p_value_by_summing_every_outcome():
    m, r, v, epsilon, delta = 40, 12, 10, 0.7, 1e-3
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = max(sum(mass[max(v - i, 0) : v]) / i for i in range(1, v + 1))
    expected = sum(mass[v:]) + 2 * m * delta * alpha
    assert one_run_p_value(Guesses(m, r, v), epsilon, delta) == pytest.approx(expected, rel=1e-9)
    # Without delta: randomised response itself reaches it, so nothing smaller would be valid.
    assert one_run_p_value(Guesses(m, r, v), epsilon, 0.0) == pytest.approx(sum(mass[v:]))


def test_guesses_at_both_ends_are_counted():
    included = np.array([True, True, False, True, False, False])
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert guess_coins(scores, included, 2, 2) == (6, 4, 4)
    assert guess_coins(scores, included, 3, 3) == (6, 6, 4)
    assert guess_coins(scores, ~included, 2, 2) == (6, 4, 0)
    assert guess_coins(scores, included, 0, 1) == (6, 1, 1)
    # Two tails show more than one with as many guesses at each: here, twice the evidence.
    both, one = Guesses(1000, 100, 95), Guesses(1000, 50, 48)
    assert one_run(both, 1e-5).epsilon_lower > one_run(one, 1e-5).epsilon_lower


def test_equal_scores_do_not_betray_the_coins():
    included = np.random.default_rng(0).random(1000) < 0.5
    guesses = guess_coins(np.zeros(1000), included, 100, 100)
    assert abs(guesses.num_correct - 100) < 4 * math.sqrt(200) / 2


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_coverage_of_one_run_against_the_gaussian_mechanism(mu):
    """1000 repeats with an attacker who sees every canary's own noisy coordinate."""
    rng = np.random.default_rng(1)
    delta, confidence, m, repeats = 1e-5, 0.9, 200, 1000
    truth = accounting.gaussian_epsilon(mu, delta)
    passed = dict.fromkeys(("one_run", "gaussian", "fdp at the truth"), 0)
    largest = 0.0
    for _ in range(repeats):
        included = rng.random(m) < 0.5
        scores = mu * included + rng.normal(size=m)
        guesses = guess_coins(scores, included, 30, 30)
        passed["one_run"] += one_run(guesses, delta, confidence).epsilon_lower > truth
        found = one_run_gaussian(guesses, delta, confidence).epsilon_lower
        passed["gaussian"] += found > truth
        passed["fdp at the truth"] += rejects_trade_off(GaussianTradeOff(mu), guesses, confidence)
        largest = max(largest, found)
    # Allowed are 10%, and three standard deviations of the count.
    assert max(passed.values()) <= 100 + 3 * math.sqrt(90)
    assert largest > 0.45 * truth  # a bound of zero would be covered too


def test_coverage_of_many_runs_and_of_the_gaussian_fit():
    rng = np.random.default_rng(2)
    mu, delta, confidence = 1.0, 1e-5, 0.9
    truth = accounting.gaussian_epsilon(mu, delta)
    passed, fitted, best = 0, 0, 0.0
    for _ in range(1000):
        inside, outside = rng.normal(mu, 1, 200), rng.normal(0, 1, 200)
        found = clopper_pearson(
            int(np.sum(inside > 1.5)), 200, int(np.sum(outside > 1.5)), 200, delta, confidence
        )
        passed += found.epsilon_lower > truth
        fitted += gaussian_dp(inside, outside, delta, confidence).epsilon_lower > truth
        best = max(best, found.epsilon_lower)
    assert max(passed, fitted) <= 100 + 3 * math.sqrt(90)
    assert best > 1.0


def test_thresholds_that_were_tried_are_paid_for_and_named():
    one = clopper_pearson(900, 1000, 100, 1000, 1e-5)
    ten = clopper_pearson(900, 1000, 100, 1000, 1e-5, num_tried=10)
    assert 0 < ten.epsilon_lower < one.epsilon_lower and ten.ceiling < one.ceiling
    strict = clopper_pearson(900, 1000, 100, 1000, 1e-5, 1 - 0.05 / 10)
    assert ten.epsilon_lower == pytest.approx(strict.epsilon_lower)
    assert (one.threshold_rule, ten.threshold_rule) == ("fixed before", "best of 10, each paid for")


def test_a_bound_below_the_truth_by_half_would_pass_it():
    """The power of the coverage test: the same bounds against half the true epsilon."""
    rng = np.random.default_rng(3)
    mu, delta, m = 2.0, 1e-5, 1000
    wrong = accounting.gaussian_epsilon(mu / 4, delta)
    passed = 0
    for _ in range(100):
        included = rng.random(m) < 0.5
        guesses = guess_coins(mu * included + rng.normal(size=m), included, 50, 50)
        passed += one_run_gaussian(guesses, delta, 0.9).epsilon_lower > wrong
    assert passed > 90


def test_several_numbers_of_guesses_pay_for_the_choice():
    one = one_run(Guesses(1000, 100, 90), 1e-5)
    several = one_run(Guesses(1000, 100, 90), 1e-5, num_tried=6)
    harder = one_run(Guesses(1000, 100, 90), 1e-5, 1 - 0.05 / 6)
    assert several.epsilon_lower == pytest.approx(harder.epsilon_lower, abs=1e-6)
    assert several.epsilon_lower < one.epsilon_lower and several.ceiling < one.ceiling
    assert one.threshold_rule == "fixed before" and "best of 6" in several.threshold_rule
    rng = np.random.default_rng(0)
    included = rng.random(300) < 0.5
    scores = rng.normal(size=300)
    passed = 0
    for seed in range(300):
        coins = np.random.default_rng(seed).random(300) < 0.5
        passed += audit_coins(scores, coins, delta=1e-6)[0].epsilon_lower > 0
    assert passed <= 15 + 3 * math.sqrt(15)  # no information: more than zero in at most 5%
    assert len(GUESS_FRACTIONS) == 6
    assert {b.method for b in audit_coins(scores, included, delta=1e-6)} == {
        "one_run",
        "one_run_fdp_gaussian",
        "gaussian_dp",
    }


def test_trade_off_of_an_event_lies_just_below_the_exact_one():
    rates = np.concatenate([[0.0, 1.0], np.geomspace(1e-6, 0.999, 50)])
    composed = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(2.0), 9)
    exact = GaussianTradeOff(1.5)(rates)
    found = event_trade_off(composed)(rates)
    assert np.all(found <= exact + 1e-6) and np.all(found >= exact - 0.01)
    # Of one (epsilon, delta) pair, by its definition.
    pair = ProfileTradeOff(((0.5, 0.01),))
    for x in (0.0, 0.02, 0.3, 0.9):
        expected = max(0, 1 - 0.01 - math.exp(0.5) * x, math.exp(-0.5) * (1 - 0.01 - x))
        assert float(pair(x)) == pytest.approx(expected)
    assert float(ProfileTradeOff(((900.0, 0.0),))(0.0)) == 1.0  # exp overflows
    assert float(ProfileTradeOff(())(0.3)) == 0.0


def test_profile_bound_is_the_gaussian_one_for_one_gaussian_release():
    guesses = Guesses(1000, 100, 90)

    def family(noise):
        return GaussianTradeOff(1 / noise), accounting.gaussian_epsilon(1 / noise, 1e-5)

    found = one_run_profile(guesses, family, 1.0, 1e-5, tolerance=1e-4)
    expected = one_run_gaussian(guesses, 1e-5)
    assert found.epsilon_lower <= expected.epsilon_lower + 1e-6
    assert found.epsilon_lower > expected.epsilon_lower - 2e-3
    assert 0.7 * expected.ceiling < found.ceiling < expected.ceiling + 1e-6
    assert one_run_profile(Guesses(1000, 100, 50), family, 1.0, 1e-5).epsilon_lower == 0.0


def test_profile_bound_of_subsampled_training_can_be_above_the_gaussian():
    """With sampling the privacy loss is no Gaussian's: the family is the mechanism's own."""
    mechanism = DPSGD(1.0, 0.25, 4, noise_multiplier=0.8)
    family = mechanism_family(mechanism, 1e-5)
    curve, epsilon = family(0.8)
    assert epsilon == pytest.approx(mechanism.epsilon(1e-5, "pld"))
    assert not rejects_trade_off(curve, Guesses(1000, 100, 60))
    assert rejects_trade_off(curve, Guesses(1000, 100, 100))


def test_gaussian_fit_and_clopper_pearson_against_scipy():
    lower = stats.beta.ppf(0.025, 900, 101)
    upper = stats.beta.ppf(0.975, 101, 900)
    expected = math.log((lower - 1e-5) / upper)
    assert clopper_pearson(900, 1000, 100, 1000, 1e-5).epsilon_lower == pytest.approx(expected)
    rng = np.random.default_rng(0)
    bound = gaussian_dp(rng.normal(2, 1, 5000), rng.normal(0, 1, 5000), 1e-5)
    truth = accounting.gaussian_epsilon(2.0, 1e-5)
    assert 0.6 * truth < bound.epsilon_lower < truth
    assert bound.ceiling > bound.epsilon_lower and "Gaussian" in bound.assumption


def test_a_bound_with_an_assumption_cannot_falsify():
    bounds = [
        EpsilonBound("gaussian_dp", 9.0, 9.5, 1e-5, 0.95, "x", 10, assumption="Gaussian"),
        EpsilonBound("one_run", 1.0, 5.7, 1e-5, 0.95, "x", 10),
    ]
    assert verdict(bounds, 2.0) == "not falsified"
    assert verdict(bounds, 0.9) == "FALSIFIED"
    assert verdict(bounds, None) == "not falsified"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: guess_coins(np.array([1.0, np.nan]), np.array([True, False]), 1), "1 NaN of 2"),
        (lambda: guess_coins(np.zeros(0), np.zeros(0, bool), 1), "at least one"),
        (lambda: guess_coins(np.zeros(3), np.zeros(3), 1), "must be bool[3]"),
        (lambda: guess_coins(np.zeros(3), np.zeros(2, bool), 1), "must be bool[3]"),
        (lambda: guess_coins(np.zeros(3), np.zeros(3, bool), 2, 2), "num_high is 2"),
        (lambda: one_run(Guesses(10, 5, 6), 1e-5), "6 right of 5"),
        (lambda: one_run(Guesses(10, 5, 4), 1.0), "delta is 1.0"),
        (lambda: one_run(Guesses(10, 5, 4), 1e-5, 95), "confidence is 95"),
        (lambda: one_run_gaussian(Guesses(10, 5, 4), 0.0), "delta is 0.0"),
        (lambda: clopper_pearson(5, 4, 0, 4, 1e-5), "num_true_positives is 5"),
        (lambda: audit_coins(np.zeros(3), np.zeros(3, bool), delta=0.1, guess_fraction=0), "0;"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(DpjaxError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
