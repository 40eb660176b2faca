"""Lower bounds on epsilon from two samples: what came out with the canary, and what without it.

From many runs of the mechanism, or, on an assumption, from many canaries in one.
"""

import numpy as np
from scipy import special, stats

from dpjax import accounting
from dpjax.auditing.results import EpsilonBound
from dpjax.errors import DpjaxError

GUESS_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of the canaries that are guessed, when several are tried."""


def check_scores(name: str, scores: np.ndarray) -> np.ndarray:
    """Scores as float64, or an error that says what is wrong with them."""
    array = np.asarray(scores, np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DpjaxError(f"{name} has shape {list(array.shape)}; pass a vector with at least one")
    missing = int(np.sum(np.isnan(array)))
    if missing:
        raise DpjaxError(
            f"{name} holds {missing} NaN of {array.size}; a canary without a score cannot be "
            "left out after the coins were thrown: find out why, e.g. a loss that overflowed"
        )
    return array


def clopper_pearson(
    num_true_positives: int,
    num_in: int,
    num_false_positives: int,
    num_out: int,
    delta: float,
    confidence: float = 0.95,
    *,
    threshold_rule: str = "fixed before",
    num_tried: int = 1,
) -> EpsilonBound:
    """Bound from independent runs with and without the canary, at a threshold fixed before.

    Args:
      num_true_positives, num_in: accusations among runs with the canary, and those runs.
      num_false_positives, num_out: the same without it.
      num_tried: thresholds that were looked at.

    Source: Jagielski et al. (2020); Nasr et al. (2021). The statistic is jax_privacy's.

    Example:
      >>> bound = clopper_pearson(900, 1000, 100, 1000, 1e-5)
      >>> print(f"{bound.epsilon_lower:.4f} of at most {bound.ceiling:.2f}")
      1.9897 of at most 5.60
    """
    for right, of, name in (
        (num_true_positives, num_in, "num_true_positives"),
        (num_false_positives, num_out, "num_false_positives"),
    ):
        if not 0 <= right <= of or of < 1:
            raise DpjaxError(f"{name} is {right} of {of} runs; it must be 0 to that, of at least 1")
    check_design(delta, confidence, num_tried)
    significance = (1 - confidence) / num_tried
    # Here, because the import takes seconds.
    from jax_privacy import auditing as statistics

    def bound(hits: int, alarms: int) -> float:
        auditor = statistics.CanaryScoreAuditor(
            np.arange(num_in) < hits, np.arange(num_out) < alarms
        )
        return float(
            auditor.epsilon_clopper_pearson(
                significance, delta, threshold_strategy=statistics.Explicit(0.5)
            )
        )

    return EpsilonBound(
        "clopper_pearson",
        bound(num_true_positives, num_false_positives),
        bound(num_in, 0),
        delta,
        confidence,
        threshold_rule if num_tried == 1 else paid_threshold_rule(num_tried),
        num_in + num_out,
        num_in + num_out,
        num_true_positives + num_out - num_false_positives,
    )


def gaussian_dp(
    in_scores: np.ndarray, out_scores: np.ndarray, delta: float, confidence: float = 0.95
) -> EpsilonBound:
    """Epsilon of the Gaussian mechanism that fits the ROC curve; an estimate with a name.

    It supposes that the scores of different canaries are independent, and that the privacy loss
    is Gaussian. Thresholds are the out scores of some ranks that are fixed before (the highest, and
    about `GUESS_FRACTIONS` of them); each pays its share of the significance. The false-positive
    rate at the j-th highest of n scores has the distribution Beta(j, n - j + 1).

    jax_privacy's ``epsilon_from_gdp`` pays only for the thresholds on the observed Pareto
    frontier, which are chosen by the scores: with 200 canaries on each side its 90% bound was above
    the truth in 295 of 1000 repeats.

    Source: Nasr et al. (2023), section 4, for the fit.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> bound = gaussian_dp(rng.normal(1.0, 1.0, 2000), rng.normal(0.0, 1.0, 2000), 1e-5)
      >>> 2.0 < bound.epsilon_lower < 4.38  # that of mu = 1
      True
    """
    inside, outside = check_scores("in_scores", in_scores), check_scores("out_scores", out_scores)
    check_design(delta, confidence, 1)
    if delta <= 0:
        raise DpjaxError(f"delta is {delta}; a Gaussian has a finite epsilon only above 0")
    count = len(outside)
    ranks = np.unique([1, *(max(1, round(share * count)) for share in GUESS_FRACTIONS)])
    # Two bounds at each rank.
    significance = (1 - confidence) / (2 * len(ranks))
    false_positive_rates = stats.beta.ppf(1 - significance, ranks, count - ranks + 1)

    def fitted(hits: np.ndarray) -> float:
        with np.errstate(invalid="ignore"):
            rates = stats.beta.ppf(significance, hits, len(inside) - hits + 1)
        rates = np.where(hits > 0, rates, 0.0)
        mu = float(np.max(special.ndtri(rates) - special.ndtri(false_positive_rates)))
        return accounting.gaussian_epsilon(mu, delta) if mu > 0 else 0.0

    thresholds = np.sort(outside)[::-1][ranks - 1]
    hits = np.sum(inside[None] > thresholds[:, None], axis=1)
    return EpsilonBound(
        "gaussian_dp",
        fitted(hits),
        fitted(np.full(len(ranks), len(inside))),
        delta,
        confidence,
        paid_threshold_rule(len(ranks)),
        len(inside) + count,
        assumption="scores of canaries are independent, and the privacy loss is Gaussian",
    )


def paid_threshold_rule(num_tried: int) -> str:
    """How a bound's threshold came about, for its report."""
    if num_tried == 1:
        return "fixed before"
    return f"best of {num_tried}, each paid for"


def check_design(delta: float, confidence: float, num_tried: int) -> None:
    """Raises DpjaxError unless a bound can be had at these."""
    if not 0 <= delta < 1:
        raise DpjaxError(f"delta is {delta}; it must be in [0, 1), e.g. 1e-5")
    if not 0.5 < confidence < 1:
        raise DpjaxError(f"confidence is {confidence}; it must be in (0.5, 1), e.g. 0.95")
    if num_tried < 1:
        raise DpjaxError(f"num_tried is {num_tried}; it must be at least 1")
