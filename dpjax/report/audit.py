"""The audit section of the card, and its tables on the page."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dpjax.auditing.results import AttackResult, EpsilonBound, ThreatView, verdict
from dpjax.errors import DpjaxError

NOT_AUDITED: dict[str, Any] = {
    "performed": False,
    "epsilon_lower": None,
    "verdict": "not audited",
}


def audit_section(
    bounds: Sequence[EpsilonBound],
    attacks: Sequence[AttackResult] = (),
    *,
    claimed_epsilon: float | None,
    threat_view: ThreatView,
    canary_kind: str,
    num_canaries: int,
    inclusion_probability: float,
    seeds: Sequence[int] = (),
) -> dict[str, Any]:
    """What an audit found, as the card keeps it.

    The headline is the bound that assumes nothing; the others stand beside it with their
    assumptions.

    Args:
      bounds: at least one without an assumption.
      attacks: with intervals.
      claimed_epsilon: at the bounds' delta; None where nothing was claimed.
      threat_view: what the attacker saw, a letter of the card.
      canary_kind: in words.
      inclusion_probability: of one canary.
      seeds: of repetitions, if they are public.

    Raises:
      DpjaxError: no bound, or none that does without an assumption.

    Example:
      >>> bound = EpsilonBound("one_run", 1.2, 5.8, 1e-5, 0.95, "fixed before", 1000, 100, 80)
      >>> section = audit_section([bound], claimed_epsilon=8.0, threat_view="W",
      ...                         canary_kind="random tokens", num_canaries=1000,
      ...                         inclusion_probability=0.5)
      >>> section["verdict"], section["epsilon_lower"], section["ceiling"]
      ('not falsified', 1.2, 5.8)
    """
    sound = [bound for bound in bounds if bound.assumption == "none"]
    if not sound:
        raise DpjaxError("bounds has none that does without an assumption; add e.g. one_run(...)")
    head = max(sound, key=lambda bound: bound.epsilon_lower)
    found = verdict(list(bounds), claimed_epsilon)
    claim = "no epsilon was claimed"
    if claimed_epsilon is not None:
        claim = f"the tightest accountant claims {claimed_epsilon:.2f}"
    return {
        "performed": True,
        "verdict": found,
        "words": (
            f"With {100 * head.confidence:g}% confidence epsilon is at least "
            f"{_down(head.epsilon_lower)}; {claim}. This test could have shown at most "
            f"{_down(head.ceiling)}: a low bound proves nothing."
        ),
        "claimed_epsilon": claimed_epsilon,
        "threat_view": threat_view,
        "canary_kind": canary_kind,
        "num_canaries": num_canaries,
        "inclusion_probability": inclusion_probability,
        **_bound(head),
        "bounds": [_bound(bound) for bound in bounds],
        "attacks": [_attack(attack) for attack in attacks],
        "seeds": list(seeds),
    }


def _bound(bound: EpsilonBound) -> dict[str, Any]:
    values = dataclasses.asdict(bound)
    return {
        "method": values["method"],
        "epsilon_lower": values["epsilon_lower"],
        "ceiling": _finite(values["ceiling"]),
        "delta": values["delta"],
        "confidence": values["confidence"],
        "num_guesses": values["num_guesses"],
        "num_correct": values["num_correct"],
        "threshold_rule": values["threshold_rule"],
        "assumption": values["assumption"],
    }


def _attack(attack: AttackResult) -> dict[str, Any]:
    return {
        "attack": attack.attack,
        "threat_view": attack.threat_view,
        "metrics": [
            {
                "metric": name,
                "value": _finite(value.value),
                "low": _finite(value.low),
                "high": _finite(value.high),
                "confidence": value.confidence,
            }
            for name, value in attack.metrics.items()
        ],
        "num_members": attack.num_members,
        "num_non_members": attack.num_non_members,
        "assumptions": list(attack.assumptions),
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _down(epsilon: float) -> str:
    """A lower bound printed so that it stays one."""
    return f"{math.floor(epsilon * 100 + 1e-6) / 100:.2f}"


def bound_rows(section: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows for people: method, bound, ceiling, guesses, threshold, assumption."""
    return [
        (
            bound["method"].replace("_", " "),
            _down(bound["epsilon_lower"]),
            "-" if bound["ceiling"] is None else _down(bound["ceiling"]),
            "-"
            if bound["num_guesses"] is None
            else f"{bound['num_correct']} of {bound['num_guesses']}",
            bound["threshold_rule"],
            bound["assumption"],
        )
        for bound in section["bounds"]
    ]


BOUND_COLUMNS = ("Method", "ε at least", "Ceiling", "Right", "Threshold", "Assumes")
ATTACK_COLUMNS = ("Attack", "Sees", "Metric", "Value", "Interval", "In / out", "Assumes")


def attack_rows(section: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows for people, one for each metric of each attack."""
    return [
        (
            attack["attack"].replace("_", " "),
            attack["threat_view"],
            metric["metric"].replace("_", " "),
            _number(metric["value"]),
            f"{_number(metric['low'])} to {_number(metric['high'])}",
            f"{attack['num_members']:,} / {attack['num_non_members']:,}",
            "; ".join(attack["assumptions"]) or "none",
        )
        for attack in section["attacks"]
        for metric in attack["metrics"]
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
