"""What the ledger proves about a run: whether the plan was kept, and what it cost."""

import json
import math
from typing import Any, NamedTuple

import dp_accounting
import numpy as np

from dpjax import accounting
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger, planned_release
from dpjax.releases import num_events
from dpjax.report.guarantees import (
    GroupGuarantee,
    group_guarantee,
    merged,
    privacy_curve,
    true_positive_rate_bound,
)
from dpjax.report.inputs import CardInputs
from dpjax.types import NeighboringRelation

NO_GUARANTEE = "no formal guarantee"
FALSE_POSITIVE_RATE = 0.01

_CURVE_POINTS = 31
_GROUPS = (2, 4, 8)
_PROFILE = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10)


class Evidence(NamedTuple):
    """What really ran, read from the ledger alone, against what the mechanism assumed."""

    assumed: dict[str, Any]  # one release of the mechanism's plan
    actual: list[dict[str, Any]]  # {"release": ..., "count": ...} of this run
    steps_planned: int
    steps_executed: int
    num_runs: int
    mismatches: tuple[str, ...]  # where the ledger and the mechanism disagree
    other_runs: tuple[str, ...]  # why other runs in the ledger cannot be added up

    @property
    def match(self) -> bool:
        """Whether every release is the planned one and the plan is the mechanism's."""
        return not self.mismatches

    @property
    def steps_within_plan(self) -> bool:
        """Whether no more iterations ran than were planned."""
        return self.steps_executed <= self.steps_planned

    @property
    def void(self) -> tuple[str, ...]:
        """Why this run carries no epsilon; empty if the plan was kept."""
        if self.steps_within_plan:
            return self.mismatches
        excess = f"{self.steps_executed} iterations ran, but only {self.steps_planned} were planned"
        return (*self.mismatches, excess)


class Bounds(NamedTuple):
    """Everything that is claimed about one event at one delta. None: not proven."""

    rdp: float | None = None  # epsilon, nats
    pld: float | None = None
    truncation: float = 0.0  # probability that a batch was cut
    gaussian_dp: tuple[float, float] | None = None  # mu, regret in nats; truncation left out
    profile: tuple[tuple[float, float | None, float | None], ...] = ()  # delta, rdp, pld
    groups: tuple[GroupGuarantee, ...] = ()
    true_positive_rate: float | None = None
    iterations: tuple[int, ...] = ()  # where `spent` is known
    spent: tuple[float, ...] = ()  # RDP epsilon after so many iterations


def examine(inputs: CardInputs) -> Evidence:
    """Compares the ledger's releases with the mechanism that the claim rests on."""
    mechanism, ledger = inputs.mechanism, inputs.ledger
    assumed = planned_release(mechanism, inputs.dataset_size)
    plan = ledger.plan(inputs.run)["plan"]
    actual = ledger.releases(inputs.run)
    executed = sum(count for _, count in actual)
    mismatches = []
    expected = {
        "release": assumed,
        "iterations": mechanism.iterations,
        "neighboring_relation": mechanism.relation.name.lower(),
        "l2_clip_norm": mechanism.l2_clip_norm,
        "normalize_by": mechanism.normalize_by,
    }
    for name, value in expected.items():
        if plan.get(name) != value:
            found = _difference(plan.get(name), value, name)
            mismatches.append(f"the ledger's plan has {found} in the mechanism")
    for release, count in actual:
        if release != assumed:
            found = _difference(release, assumed)
            mismatches.append(f"{count} of {executed} releases had {found} in the mechanism")
    others = [
        problem
        for run in range(ledger.num_runs)
        if run != inputs.run
        for problem in _own_problems(ledger, run)
    ]
    try:
        ledger.neighboring_relation()
    except DpjaxError as error:
        others.append(str(error))
    return Evidence(
        assumed,
        [{"release": release, "count": count} for release, count in actual],
        mechanism.iterations,
        executed,
        ledger.num_runs,
        tuple(mismatches),
        tuple(others),
    )


def _own_problems(ledger: Ledger, run: int) -> list[str]:
    """Where another run in the ledger left its own plan."""
    plan = ledger.plan(run)["plan"]
    actual = ledger.releases(run)
    executed = sum(count for _, count in actual)
    problems = [
        f"run {run} of the ledger had {_difference(release, plan['release'])} in its plan"
        for release, _ in actual
        if release != plan["release"]
    ]
    if executed > plan["iterations"]:
        problems.append(f"run {run} took {executed} steps, more than its {plan['iterations']}")
    return problems


def _difference(found: Any, expected: Any, name: str = "release") -> str:
    """What differs, field by field where there are fields."""
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return f"{name} {_text(found)}, against {_text(expected)}"
    fields = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    before = ", ".join(f"{key} {_text(found.get(key))}" for key in fields)
    after = ", ".join(_text(expected.get(key)) for key in fields)
    return f"{before}, against {after}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def finite(value: float | None) -> float | None:
    """JSON has no infinity; what is not finite is not a bound."""
    return None if value is None or not math.isfinite(value) else float(value)


def _epsilon(
    dp_event: dp_accounting.DpEvent,
    delta: float,
    accountant: accounting.Accountant,
    relation: NeighboringRelation,
) -> float | None:
    """None where there is no proven finite bound."""
    try:
        return finite(accounting.epsilon(dp_event, delta, accountant, relation))
    except DpjaxError:
        return None


def run_bounds(inputs: CardInputs, evidence: Evidence) -> Bounds:
    """Every bound on this run, from the releases in the ledger. Empty where none holds."""
    if evidence.void or not inputs.mechanism.is_private:
        return Bounds()
    event = merged(inputs.ledger.dp_event(inputs.run))
    delta = inputs.delta
    if evidence.steps_executed == 0:
        return Bounds(0.0, 0.0)
    sizes = tuple(
        sorted({*_GROUPS, inputs.examples_per_record, inputs.max_units_per_person or 1} - {1})
    )
    # A card is rebuilt whenever its page is, and PLD takes seconds for each event.
    key = (repr(event), repr(inputs.mechanism), evidence.steps_executed, delta)
    key = (*key, inputs.dataset_size, sizes)
    if key not in _KNOWN:
        if len(_KNOWN) >= 32:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = _bounds(inputs, evidence, event, sizes)
    return _KNOWN[key]


_KNOWN: dict[tuple, Bounds] = {}


def _bounds(
    inputs: CardInputs, evidence: Evidence, event: dp_accounting.DpEvent, sizes: tuple[int, ...]
) -> Bounds:
    relation, delta = inputs.mechanism.relation, inputs.delta
    plain, truncation = accounting.untruncate(event)
    curve = privacy_curve(event)
    by_rdp = _epsilon(event, delta, "rdp", relation)
    if curve is not None and truncation == 0.0:
        by_pld = finite(curve.epsilon(delta))  # the same accountant; once is enough
    else:
        by_pld = _epsilon(event, delta, "pld", relation)
    deltas = sorted({*_PROFILE, delta}, reverse=True)
    profile = []
    for at in deltas:
        renyi = by_rdp if at == delta else _epsilon(event, at, "rdp", relation)
        numerical = by_pld if at == delta or curve is None else finite(curve.epsilon(at))
        profile.append((at, renyi, numerical))
    return Bounds(
        by_rdp,
        by_pld,
        truncation,
        accounting.gaussian_dp_mu(plain, inputs.dataset_size),
        tuple(profile),
        tuple(group_guarantee(event, size, delta, relation) for size in sizes),
        None if curve is None else true_positive_rate_bound(curve, FALSE_POSITIVE_RATE),
        *_spent(inputs, evidence),
    )


def _spent(inputs: CardInputs, evidence: Evidence) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Epsilon by RDP after some of the executed iterations, denser where it grows faster."""
    steps = evidence.steps_executed
    # Squares: epsilon grows about as the root of the iterations, so its steps come out even.
    spaced = steps * np.linspace(0.0, 1.0, _CURVE_POINTS) ** 2
    iterations = np.unique(np.round(spaced).astype(int))
    sampler = inputs.mechanism.planned_sampler(inputs.dataset_size)
    strategy = inputs.mechanism.strategy
    # One event may be an epoch, or with correlated noise the whole run.
    counts = np.array([num_events(sampler, int(i), strategy) for i in iterations])
    values = accounting.epsilon_curve(
        sampler.dp_event(inputs.mechanism.noise_multiplier or 0.0),
        counts,
        inputs.delta,
        inputs.mechanism.relation,
    )
    if not np.all(np.isfinite(values)):
        return (), ()
    return tuple(iterations.tolist()), tuple(values.tolist())


def total_bounds(inputs: CardInputs, evidence: Evidence, own: Bounds) -> Bounds:
    """Epsilon of all runs in the ledger together: trials on the same records add up."""
    if evidence.void or evidence.other_runs:
        return Bounds()
    if evidence.num_runs == 1:
        return Bounds(own.rdp, own.pld)
    events = inputs.ledger.dp_event()
    if _non_private(events):
        return Bounds()
    event, relation = merged(events), inputs.mechanism.relation
    return Bounds(
        _epsilon(event, inputs.delta, "rdp", relation),
        _epsilon(event, inputs.delta, "pld", relation),
    )


def _non_private(dp_event: dp_accounting.DpEvent) -> bool:
    match dp_event:
        case dp_accounting.NonPrivateDpEvent():
            return True
        case dp_accounting.ComposedDpEvent():
            return any(_non_private(event) for event in dp_event.events)
        case _:
            return False
