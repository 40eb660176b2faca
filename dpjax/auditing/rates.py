"""Success rates of attacks on members beside the same attacks on twins that were never seen."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from dpjax.auditing.results import AttackResult, Interval, ThreatView
from dpjax.errors import DpjaxError


def success_rate(hits: Sequence[bool] | np.ndarray, confidence: float = 0.95) -> Interval:
    """Share of hits with its Wilson interval.

    Args:
      hits: bool[n], n >= 1.

    Source: Wilson (1927).

    Example:
      >>> found = success_rate([True, False, False, False])
      >>> print(f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})")
      0.25 (0.05 to 0.70)
    """
    found = np.asarray(hits)
    if found.ndim != 1 or not found.size or found.dtype != bool:
        raise DpjaxError(f"hits are {found.dtype}{found.shape}; give one bool for each attack")
    test = stats.binomtest(int(found.sum()), len(found))
    low, high = test.proportion_ci(confidence, method="wilson")
    return Interval(float(found.mean()), float(low), float(high), confidence)


def rate_difference(inside: Interval, outside: Interval) -> Interval:
    """Difference of two independent rates; the interval is Newcombe's, of two Wilson ones.

    Source: Newcombe (1998), method 10.

    Example:
      >>> more = rate_difference(success_rate([True] * 56 + [False] * 14),
      ...                        success_rate([True] * 48 + [False] * 32))
      >>> print(f"{more.value:.4f} ({more.low:.4f} to {more.high:.4f})")
      0.2000 (0.0524 to 0.3339)
    """
    value = inside.value - outside.value
    below = np.hypot(inside.value - inside.low, outside.high - outside.value)
    above = np.hypot(inside.high - inside.value, outside.value - outside.low)
    return Interval(value, value - float(below), value + float(above), inside.confidence)


def rate_result(
    attack: str,
    in_hits: Sequence[bool] | np.ndarray,
    out_hits: Sequence[bool] | np.ndarray,
    *,
    threat_view: ThreatView = "W",
    assumptions: Sequence[str] = (),
    confidence: float = 0.95,
    details: dict[str, Any] | None = None,
) -> AttackResult:
    """How often an attack succeeds, how often on twins, and the difference: what was leaked.

    Args:
      in_hits, out_hits: bool[n], bool[m]: success on members, and on twins never trained on.

    Returns:
      Metrics "rate", "rate_on_twins" and "extra_rate".

    Example:
      >>> result = rate_result("greedy", [True, True, False], [False] * 9)
      >>> {name: round(found.value, 2) for name, found in result.metrics.items()}
      {'rate': 0.67, 'rate_on_twins': 0.0, 'extra_rate': 0.67}
    """
    inside, outside = success_rate(in_hits, confidence), success_rate(out_hits, confidence)
    metrics = {
        "rate": inside,
        "rate_on_twins": outside,
        "extra_rate": rate_difference(inside, outside),
    }
    return AttackResult(
        attack,
        threat_view,
        metrics,
        len(in_hits),
        len(out_hits),
        tuple(assumptions),
        dict(details or {}),
    )
