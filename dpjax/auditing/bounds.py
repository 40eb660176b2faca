"""Lower bounds on epsilon from what an attacker got right, each with its ceiling.

In *one run* m canaries are each put in by a fair coin of their own, and an attacker guesses some of
the coins: the ``num_high`` highest scores "in", the ``num_low`` lowest "out", and abstains from the
rest. Bounds from many runs: ``two_samples.py``.

How many guesses are made is fixed before the scores are seen. Several numbers may be tried where
the significance is divided by how many (``num_tried``).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from dpjax import accounting
from dpjax.auditing.results import EpsilonBound
from dpjax.auditing.two_samples import (
    GUESS_FRACTIONS,
    check_design,
    check_scores,
    gaussian_dp,
    paid_threshold_rule,
)
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.trade_off import GaussianTradeOff, TradeOff, event_trade_off


class Guesses(NamedTuple):
    """Outcome of guessing coins."""

    num_canaries: int
    num_guesses: int
    num_correct: int


def guess_coins(
    scores: np.ndarray, included: np.ndarray, num_high: int, num_low: int = 0
) -> Guesses:
    """Guesses the highest scores in, the lowest out, and counts what was right.

    Of equal scores at the edge, those with the lowest index are guessed: an order that must not
    depend on the coins.

    Args:
      scores: float[m], higher means more like a member; no NaN.
      included: bool[m], the coins.
      num_high, num_low: how many to guess, fixed before the scores were seen.

    Example:
      >>> included = np.array([True, False, True, False])
      >>> guess_coins(np.array([3.0, 2.0, 1.0, 0.0]), included, num_high=2, num_low=1)
      Guesses(num_canaries=4, num_guesses=3, num_correct=2)
    """
    scores, included = check_scores("scores", scores), np.asarray(included)
    if included.dtype != np.bool_ or included.shape != scores.shape:
        raise DpjaxError(
            f"included is {included.dtype}{list(included.shape)}; it must be bool"
            f"{list(scores.shape)}, one coin for each score"
        )
    if min(num_high, num_low) < 0 or not 1 <= num_high + num_low <= len(scores):
        raise DpjaxError(
            f"num_high is {num_high}, num_low is {num_low}; together they must be 1 to "
            f"{len(scores)}, the number of canaries"
        )
    order = np.argsort(-scores, kind="stable")
    right = np.sum(included[order[:num_high]])
    right += np.sum(~included[order[len(scores) - num_low :]])
    return Guesses(len(scores), num_high + num_low, int(right))


def one_run(
    guesses: Guesses,
    delta: float,
    confidence: float = 0.95,
    *,
    num_tried: int = 1,
) -> EpsilonBound:
    """Bound from the coins guessed in one run; assumes nothing of the mechanism.

    Args:
      guesses: from `guess_coins`; both tails count.
      delta: of the bound, in [0, 1).
      confidence: that the bound is at most the true epsilon.
      num_tried: how many numbers of guesses were looked at.

    Source: Steinke et al. (2023), theorem 5.2.

    Example:
      >>> bound = one_run(Guesses(1000, 100, 90), 1e-5)
      >>> print(f"{bound.epsilon_lower:.4f} of at most {bound.ceiling:.2f}")
      1.6261 of at most 5.78
    """
    _check(guesses, delta, confidence, num_tried)
    significance = (1 - confidence) / num_tried
    found, ceiling = (
        _one_run(kind, delta, significance) for kind in (guesses, _all_right(guesses))
    )
    return EpsilonBound(
        "one_run",
        found,
        ceiling,
        delta,
        confidence,
        paid_threshold_rule(num_tried),
        *guesses,
    )


def one_run_p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Largest probability of so many right guesses under any (epsilon, delta)-DP mechanism.

    jax_privacy has this statistic for accusations alone; here guesses may be at both ends.

    Source: Steinke et al. (2023), theorem 5.2.

    Example:
      >>> print(f"{one_run_p_value(Guesses(10, 10, 10), 0.0, 0.0):.6f}")  # ten fair coins
      0.000977
    """
    m, r, v = guesses
    q = special.expit(epsilon)
    beta = float(stats.binom.sf(v - 1, r, q))
    if delta == 0 or v == 0:
        return min(1.0, beta)
    i = np.arange(1, v + 1)
    alpha = float(np.max((stats.binom.sf(v - i - 1, r, q) - beta) / i, initial=0.0))
    return min(1.0, beta + 2 * m * delta * alpha)


def one_run_gaussian(
    guesses: Guesses, delta: float, confidence: float = 0.95, *, num_tried: int = 1
) -> EpsilonBound:
    """Bound from one run on the supposition that the trade-off function is a Gaussian's.

    Source: Mahloujifar et al. (2024), algorithm 2.

    Example:
      >>> bound = one_run_gaussian(Guesses(1000, 100, 90), 1e-5)
      >>> print(f"{bound.epsilon_lower:.4f}")
      2.4564
    """
    _check(guesses, delta, confidence, num_tried)
    if delta <= 0:
        raise DpjaxError(f"delta is {delta}; a Gaussian has a finite epsilon only above 0")
    significance = (1 - confidence) / num_tried
    found, ceiling = (
        accounting.gaussian_epsilon(mu, delta) if mu > 0 else 0.0
        for mu in (
            _largest_refuted_mu(kind, significance) for kind in (guesses, _all_right(guesses))
        )
    )
    return EpsilonBound(
        "one_run_fdp_gaussian",
        found,
        ceiling,
        delta,
        confidence,
        paid_threshold_rule(num_tried),
        *guesses,
        assumption="the privacy loss is that of a Gaussian mechanism",
    )


def rejects_trade_off(
    trade_off: TradeOff, guesses: Guesses, confidence: float = 0.95, *, num_tried: int = 1
) -> bool:
    """Whether these guesses refute that the mechanism's trade-off function is at least this one.

    This is the sharpest test of a claim from one run: it uses the whole privacy profile, not one
    point of it.

    Source: Mahloujifar et al. (2024), algorithm 2, with f(1 - r) for the blow-up's inverse, which
      holds for symmetric f.

    Example:
      >>> from dpjax.trade_off import GaussianTradeOff
      >>> guesses = Guesses(1000, 100, 90)
      >>> [rejects_trade_off(GaussianTradeOff(mu), guesses) for mu in (0.1, 2.0)]
      [True, False]
    """
    m, r, v = guesses
    significance = (1 - confidence) / num_tried
    correct, wrong = significance * v / m, significance * (r - v) / m
    for i in range(v - 1, -1, -1):
        least = max(wrong, float(trade_off(np.asarray(1 - min(correct, 1.0)))))
        if least == wrong:
            break  # neither can change from here on
        correct = min(correct + i / (r - i) * (least - wrong), 1.0)
        wrong = least
    return correct + wrong > r / m


def one_run_profile(
    guesses: Guesses,
    family: Callable[[float], tuple[TradeOff, float]],
    start: float,
    delta: float,
    confidence: float = 0.95,
    *,
    num_tried: int = 1,
    tolerance: float = 0.05,
) -> EpsilonBound:
    """Bound from one run on the accountant's own privacy-loss curve.

    Supposes that the mechanism is what it says with another amount of noise, and finds the least
    noise that the guesses refute.

    Args:
      family: noise multiplier -> (trade-off function, epsilon at ``delta``) of the whole run; see
        `mechanism_family`.
      start: the claimed noise multiplier. What is searched is a quarter of it to 32 times it.
      tolerance: relative, of the noise multiplier. The bound is that of a refuted noise multiplier,
        so that it errs on the low side.

    Example:
      >>> def family(noise):  # one Gaussian release
      ...     return GaussianTradeOff(1 / noise), accounting.gaussian_epsilon(1 / noise, 1e-5)
      >>> bound = one_run_profile(Guesses(1000, 100, 90), family, 1.0, 1e-5, tolerance=1e-4)
      >>> print(f"{bound.epsilon_lower:.2f}")  # that of the Gaussian curve
      2.46
    """
    _check(guesses, delta, confidence, num_tried)

    def search(kind: Guesses, tolerance: float) -> float:
        def refuted(noise: float) -> bool:
            return rejects_trade_off(family(noise)[0], kind, confidence, num_tried=num_tried)

        # Outwards from the claim: little noise makes privacy losses that take long to compose.
        yes = no = start
        if refuted(start):
            while refuted(no):
                if no < start / 4:
                    return family(no)[1]
                yes, no = no, no / 1.5
        else:
            while not refuted(yes):
                if yes > 32 * start:
                    return 0.0
                yes, no = 1.5 * yes, yes
        while yes / no > 1 + tolerance:
            middle = math.sqrt(yes * no)
            yes, no = (middle, no) if refuted(middle) else (yes, middle)
        return family(yes)[1]

    return EpsilonBound(
        "one_run_fdp_profile",
        search(guesses, tolerance),
        search(_all_right(guesses), max(tolerance, 0.25)),
        delta,
        confidence,
        paid_threshold_rule(num_tried),
        *guesses,
        assumption="the mechanism is the accountant's, with another noise multiplier",
    )


def mechanism_family(mechanism: DPSGD, delta: float) -> Callable[[float], tuple[TradeOff, float]]:
    """Trade-off function and epsilon of a `dpjax.DPSGD` with any noise multiplier.

    Args:
      mechanism: its sampling, iterations and neighbouring relation are kept.
      delta: in (0, 1).

    Raises:
      DpjaxError: for sampling that PLD has no bound for.
    """

    @functools.lru_cache(maxsize=128)
    def member(noise_multiplier: float) -> tuple[TradeOff, float]:
        event = mechanism.dp_event_with(noise_multiplier)
        relation = mechanism.relation
        curve = event_trade_off(event, relation)
        return curve, accounting.epsilon(event, delta, "pld", relation)

    return member


def audit_coins(
    scores: np.ndarray,
    included: np.ndarray,
    *,
    delta: float,
    confidence: float = 0.95,
    guess_fraction: float | None = None,
    mechanism: DPSGD | None = None,
) -> list[EpsilonBound]:
    """Every bound that one run with coins allows.

    Args:
      scores: float[m], one for each canary; higher means "in".
      included: bool[m], the coins.
      delta: of all bounds.
      confidence: of each bound by itself.
      guess_fraction: share of the canaries that is guessed, half of it at each end, fixed before
        the scores were seen. None tries `GUESS_FRACTIONS` and pays for each.
      mechanism: a `dpjax.DPSGD`; adds the bound on its own privacy-loss curve.

    Returns:
      "one_run", "one_run_fdp_gaussian", with a mechanism "one_run_fdp_profile", and "gaussian_dp".

    Example:
      >>> rng = np.random.default_rng(0)
      >>> included = rng.random(1000) < 0.5
      >>> scores = included + 0.1 * rng.normal(size=1000)  # the coins are plain to see
      >>> bounds = audit_coins(scores, included, delta=1e-5, guess_fraction=0.8)
      >>> [(b.method, round(b.epsilon_lower, 2)) for b in bounds][0]
      ('one_run', 5.56)
    """
    scores, included = check_scores("scores", scores), np.asarray(included)
    fractions: Sequence[float] = GUESS_FRACTIONS if guess_fraction is None else (guess_fraction,)
    best: dict[str, EpsilonBound] = {}
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise DpjaxError(f"guess_fraction is {fraction}; it must be in (0, 1], e.g. 0.1")
        total = max(1, round(fraction * len(scores)))
        guesses = guess_coins(scores, included, total - total // 2, total // 2)
        tried = len(fractions)
        found = [
            one_run(guesses, delta, confidence, num_tried=tried),
            one_run_gaussian(guesses, delta, confidence, num_tried=tried),
        ]
        for bound in found:
            kept = best.get(bound.method)
            if kept is None or bound.epsilon_lower > kept.epsilon_lower:
                best[bound.method] = bound
    bounds = list(best.values())
    if mechanism is not None and mechanism.is_private:
        # Slow, so only for the guesses that show most on the Gaussian curve; all were paid for.
        shown = best["one_run_fdp_gaussian"]
        guesses = Guesses(shown.num_canaries, shown.num_guesses or 0, shown.num_correct or 0)
        bounds.append(
            one_run_profile(
                guesses,
                mechanism_family(mechanism, delta),
                mechanism.noise_multiplier or 0.0,
                delta,
                confidence,
                num_tried=len(fractions),
            )
        )
    if 0 < int(np.sum(included)) < len(included):
        bounds.append(gaussian_dp(scores[included], scores[~included], delta, confidence))
    return bounds


def _all_right(guesses: Guesses) -> Guesses:
    """The most that this many canaries could show: every coin guessed, and rightly."""
    return Guesses(guesses.num_canaries, guesses.num_canaries, guesses.num_canaries)


@functools.lru_cache(maxsize=4096)
def _one_run(guesses: Guesses, delta: float, significance: float) -> float:
    """Largest epsilon that is refuted, to within 1e-7 below."""
    return _bisect(lambda epsilon: one_run_p_value(guesses, epsilon, delta) <= significance)


@functools.lru_cache(maxsize=4096)
def _largest_refuted_mu(guesses: Guesses, significance: float) -> float:
    return _bisect(lambda mu: rejects_trade_off(GaussianTradeOff(mu), guesses, 1 - significance))


def _bisect(refuted: Callable[[float], bool]) -> float:
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _check(guesses: Guesses, delta: float, confidence: float, num_tried: int) -> None:
    check_design(delta, confidence, num_tried)
    m, r, v = guesses
    if not (1 <= r <= m and 0 <= v <= r):
        raise DpjaxError(
            f"{v} right of {r} guesses on {m} canaries; it must be 0 <= right <= guesses <= "
            "canaries"
        )
