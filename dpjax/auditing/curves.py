"""How well scores tell members from non-members: ROC, AUC, and rates at few false positives."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from dpjax.auditing.results import AttackResult, Interval, ThreatView
from dpjax.auditing.two_samples import check_scores
from dpjax.errors import DpjaxError


class RocCurve(NamedTuple):
    """Error rates at every threshold, from accusing nobody to accusing everybody."""

    false_positive_rates: np.ndarray  # float64[points], from 0 to 1
    true_positive_rates: np.ndarray  # float64[points]
    thresholds: np.ndarray  # float64[points], falling; accused is who scores at least this


def roc_curve(in_scores: np.ndarray, out_scores: np.ndarray) -> RocCurve:
    """The ROC curve; equal scores are one step, whoever has them.

    Args:
      in_scores, out_scores: float[n], float[m]: members and non-members, higher = member.

    Example:
      >>> curve = roc_curve(np.array([2.0, 1.0]), np.array([1.0, 0.0]))
      >>> curve.false_positive_rates.tolist(), curve.true_positive_rates.tolist()
      ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    """
    inside, outside = _checked(in_scores, out_scores)
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    hits = len(inside) - np.searchsorted(np.sort(inside), thresholds, side="left")
    alarms = len(outside) - np.searchsorted(np.sort(outside), thresholds, side="left")
    return RocCurve(
        np.concatenate([[0.0], alarms / len(outside)]),
        np.concatenate([[0.0], hits / len(inside)]),
        np.concatenate([[np.inf], thresholds]),
    )


def auc(in_scores: np.ndarray, out_scores: np.ndarray, confidence: float = 0.95) -> Interval:
    """Probability that a member scores above a non-member, ties counting half.

    The interval is DeLong's on the logit scale; at 0 or 1, where its variance vanishes, it is that
    of the smaller group's all being right. (jax_privacy's ``attack_auroc`` is the area under the
    curve's Pareto frontier, which is larger.)

    Source: DeLong et al. (1988).

    Example:
      >>> found = auc(np.array([3.0, 2.0, 1.0]), np.array([2.5, 0.0]))
      >>> print(f"{found.value:.3f}", found.low < found.value < found.high)
      0.667 True
    """
    inside, outside = _checked(in_scores, out_scores)
    n, m = len(inside), len(outside)
    ranks = stats.rankdata(np.concatenate([inside, outside]))
    # Share of the other group below each score, ties half.
    below_in = (ranks[:n] - stats.rankdata(inside)) / m
    above_out = 1 - (ranks[n:] - stats.rankdata(outside)) / n
    value = float(np.mean(below_in))
    variance = sum(
        float(np.var(x, ddof=1)) / len(x) if len(x) > 1 else 0.25 for x in (below_in, above_out)
    )
    if value in (0.0, 1.0) or variance == 0.0:
        edge = ((1 - confidence) / 2) ** (1 / min(n, m))
        low = edge if value == 1.0 else min(value, edge, 1 - edge)
        high = 1 - edge if value == 0.0 else max(value, edge, 1 - edge)
        return Interval(value, low, high, confidence)
    width = stats.norm.ppf((1 + confidence) / 2) * variance**0.5 / (value * (1 - value))
    logit = np.log(value / (1 - value))
    low, high = (float(1 / (1 + np.exp(-(logit + side * width)))) for side in (-1, 1))
    return Interval(value, low, high, confidence)


class RateAt(NamedTuple):
    """A true-positive rate at a bound on the false-positive rate."""

    rate: Interval
    false_positives: int  # non-members accused at the threshold
    is_resolved: bool  # whether there are enough non-members to see that rate at all


def tpr_at_fpr(
    in_scores: np.ndarray,
    out_scores: np.ndarray,
    false_positive_rate: float,
    confidence: float = 0.95,
) -> RateAt:
    """Share of members accused when at most this share of non-members is.

    With fewer than ``1 / false_positive_rate`` non-members the threshold is their highest score:
    the rate is then that at no observed false positive, and ``is_resolved`` is False.

    Returns:
      The rate, with an interval for the rate at the threshold that all non-members, not these
      alone, would set. Half of the error probability is for that threshold, which lies between two
      of the scores (a binomial count of them is above it); the other half is Clopper and Pearson's.

    Example:
      >>> found = tpr_at_fpr(np.arange(50.0, 150.0), np.arange(100.0), 0.01)
      >>> found.rate.value, found.false_positives, found.is_resolved
      (0.51, 1, True)
    """
    inside, outside = _checked(in_scores, out_scores)
    if not 0 < false_positive_rate < 1:
        raise DpjaxError(f"false_positive_rate is {false_positive_rate}; use e.g. 0.01")
    allowed = int(np.floor(false_positive_rate * len(outside) + 1e-9))
    ranked = np.sort(outside)[::-1]
    # Accused is who scores above this: the next non-member, which would be one too many.
    threshold = ranked[min(allowed, len(ranked) - 1)]
    n, tail = len(inside), (1 - confidence) / 4
    fewest, most = stats.binom.ppf([tail, 1 - tail], len(ranked), false_positive_rate).astype(int)
    surely = int(np.sum(inside >= ranked[fewest - 1])) if fewest else 0
    perhaps = int(np.sum(inside > ranked[most])) if most < len(ranked) else n
    low = float(stats.beta.ppf(tail, surely, n - surely + 1)) if surely else 0.0
    high = float(stats.beta.ppf(1 - tail, perhaps + 1, n - perhaps)) if perhaps < n else 1.0
    hits = float(np.mean(inside > threshold))
    return RateAt(
        Interval(hits, low, high, confidence), int(np.sum(outside > threshold)), allowed > 0
    )


def attack_result(
    attack: str,
    in_scores: np.ndarray,
    out_scores: np.ndarray,
    *,
    threat_view: ThreatView = "W",
    assumptions: Sequence[str] = (),
    confidence: float = 0.95,
    details: dict[str, Any] | None = None,
) -> AttackResult:
    """AUC and true-positive rates at 1% and 0.1% false positives, with intervals.

    The scores themselves are kept in ``details["scores"]``, for figures; they are private.

    A rate that these non-members are too few to resolve is left out, and the result says so.

    Example:
      >>> result = attack_result("loss", np.arange(5.0, 105.0), np.arange(100.0))
      >>> list(result.metrics), result.assumptions
      (['auc', 'tpr_at_1_percent_fpr'], ('100 non-members do not resolve 0.1% false positives',))
    """
    notes, metrics = list(assumptions), {"auc": auc(in_scores, out_scores, confidence)}
    for rate, name in ((0.01, "1"), (0.001, "0.1")):
        found = tpr_at_fpr(in_scores, out_scores, rate, confidence)
        if found.is_resolved:
            metrics[f"tpr_at_{name}_percent_fpr"] = found.rate
        else:
            notes.append(f"{len(out_scores)} non-members do not resolve {name}% false positives")
    return AttackResult(
        attack,
        threat_view,
        metrics,
        len(in_scores),
        len(out_scores),
        tuple(notes),
        {"scores": (in_scores, out_scores), **(details or {})},
    )


def _checked(in_scores: np.ndarray, out_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return check_scores("in_scores", in_scores), check_scores("out_scores", out_scores)
