"""What an attack or an audit found: plain numbers with their intervals and assumptions.

Scores everywhere in this package are float64 arrays in which higher means "more like a member".
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from dpjax.errors import DpjaxError

ThreatView = Literal["S", "A", "W", "B", "Y"]
VERDICTS = ("not falsified", "FALSIFIED")


class Interval(NamedTuple):
    """An estimate and the interval around it."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """One attack on one model.

    Attributes:
      attack: e.g. "min_k_plus_plus".
      threat_view: what the attacker sees: W weights, B logits or samples, Y synthetic text, ...
      metrics: e.g. {"auc": Interval(...), "tpr_at_1_percent_fpr": Interval(...)}.
      num_members, num_non_members: canaries or records that were attacked; the second are twins.
      assumptions: what must hold for the numbers to mean something, in words.
      details: more numbers, ready for JSON.
    """

    attack: str
    threat_view: ThreatView
    metrics: dict[str, Interval]
    num_members: int
    num_non_members: int
    assumptions: tuple[str, ...] = ()
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EpsilonBound:
    """A lower bound on epsilon, with the most that this test could have shown.

    Attributes:
      method: "clopper_pearson", "one_run", "one_run_fdp_gaussian", "one_run_fdp_profile",
        "gaussian_dp" or "trade_off".
      epsilon_lower: nats; 0 if nothing was shown.
      ceiling: the bound if every guess had been right; nats.
      delta, confidence: of the bound.
      num_canaries, num_guesses, num_correct: counts; None where a method has none.
      threshold_rule: how the score threshold was chosen, and what it cost.
      assumption: "none", or what the bound supposes beyond the data.
    """

    method: str
    epsilon_lower: float
    ceiling: float
    delta: float
    confidence: float
    threshold_rule: str
    num_canaries: int
    num_guesses: int | None = None
    num_correct: int | None = None
    assumption: str = "none"

    def __post_init__(self):
        if math.isnan(self.epsilon_lower) or self.epsilon_lower < 0:
            raise DpjaxError(f"epsilon_lower is {self.epsilon_lower}; a lower bound is at least 0")


def verdict(bounds: list[EpsilonBound], claimed_epsilon: float | None) -> str:
    """ "FALSIFIED" if a bound that assumes nothing is above the claim; never "verified".

    Bounds that rest on an assumption cannot falsify a claim: the assumption may be what is wrong.
    "one_run_fdp_profile" can: to get as far as the claim it refutes the claimed curve itself.

    Example:
      >>> bound = EpsilonBound("one_run", 3.0, 5.7, 1e-5, 0.95, "fixed before", 1000)
      >>> verdict([bound], 2.0), verdict([bound], 8.0)
      ('FALSIFIED', 'not falsified')
    """
    if claimed_epsilon is None:
        return VERDICTS[0]
    sound = any(b.epsilon_lower > claimed_epsilon for b in bounds if b.assumption == "none")
    curve = any(
        b.epsilon_lower >= claimed_epsilon for b in bounds if b.method == "one_run_fdp_profile"
    )
    return VERDICTS[sound or curve]
