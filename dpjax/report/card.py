"""The privacy card: what was promised, generated from the executed plan and the ledger."""

import datetime
import importlib.metadata
import math
import platform
from typing import Any

from dpjax.report.audit import NOT_AUDITED
from dpjax.report.evidence import (
    FALSE_POSITIVE_RATE,
    NO_GUARANTEE,
    Bounds,
    Evidence,
    examine,
    finite,
    run_bounds,
    total_bounds,
)
from dpjax.report.hazards import find_hazards
from dpjax.report.inputs import VIEWS, CardInputs

CARD_VERSION = "1.1"
UNBOUNDED = "unbounded"

_PACKAGES = ("dpjax", "jax", "jaxlib", "flax", "optax", "numpy", "dp-accounting")
_NEIGHBORS = {
    "add_or_remove_one": "{unit} added to or removed from the training records",
    "replace_one": "{unit} of the training records replaced by any other",
    "replace_special": "{unit} of the training records replaced by a blank",
}
_SAMPLING = {
    "poisson": "Poisson sampling",
    "truncated_poisson": "truncated Poisson sampling",
    "fixed_size": "fixed-size sampling without replacement",
    "shuffled": "shuffled batches, no amplification by sampling claimed",
    "cyclic": "groups of fixed members in turn, no amplification by sampling claimed",
    "cyclic_poisson": "Poisson sampling within groups of fixed members, in turn",
}


def build_card(inputs: CardInputs, created: datetime.datetime | None = None) -> dict[str, Any]:
    """The privacy card of one run as JSON-compatible values.

    Args:
      inputs: the run, its mechanism and its ledger.
      created: default now; written in UTC.

    Returns:
      A dictionary that `validate_card` accepts; no NaN and no infinity in it.

    Raises:
      DpjaxError: the run is not in the ledger.

    Guarantee:
      Every epsilon is computed from the releases in the ledger, never from the plan alone. If they
      differ from the mechanism's plan, if more iterations ran than planned, or if there was no
      noise, the card holds no epsilon at all, and says so in words.

    Example:
      >>> import jax, tempfile
      >>> from dpjax.ledger import Ledger
      >>> from dpjax.mechanism import DPSGD
      >>> mechanism = DPSGD(1.0, 0.1, 100, noise_multiplier=2.0)
      >>> folder = tempfile.TemporaryDirectory()
      >>> with Ledger.open(f"{folder.name}/ledger.jsonl") as ledger:
      ...     run = ledger.start_run(mechanism, population=1000, config={})
      ...     ledger.record_release(run, 0, mechanism.sampler(1000, jax.random.key(0)), 2.0)
      ...     card = build_card(CardInputs(
      ...         mechanism, ledger, run, 1e-5, "one message", "letters", 1000, "0" * 64, "nano"))
      >>> print(f"{card['claim']['epsilon']:.3f}", card["accounting"]["match"])
      0.526 True
      >>> folder.cleanup()
    """
    evidence = examine(inputs)
    bounds = run_bounds(inputs, evidence)
    total = total_bounds(inputs, evidence, bounds)
    moment = created or datetime.datetime.now(datetime.UTC)
    hazards = find_hazards(inputs, evidence, bounds, total)
    return {
        "identity": {
            "card_version": CARD_VERSION,
            "artifact_sha256": inputs.artifact_sha256,
            "created": moment.astimezone(datetime.UTC).isoformat(timespec="seconds"),
            "intended_use": inputs.intended_use,
        },
        "setting": _setting(inputs, bounds),
        "claim": _claim(inputs, evidence, bounds, total),
        "coverage": _coverage(inputs, evidence),
        "released": {
            "what": list(inputs.released),
            "earlier_runs_in_ledger": inputs.run,
            "words": (
                "The bound covers the model after every iteration, hence the final one and whatever"
                " is computed from it alone. Checkpoints for resuming hold the noise key: never "
                "release them."
                if _headline(inputs, bounds) is not None
                else f"Nothing that depends on the training records is covered: {NO_GUARANTEE}."
            ),
        },
        "accounting": _accounting(inputs, evidence, bounds),
        "training": _training(inputs),
        "randomness": {
            "generator": "threefry2x32 (jax.random), 64-bit key; not a cryptographic generator",
            "key_secrecy": (
                "given as a seed: repeatable by others, so no real-world guarantee"
                if inputs.published_key
                else "drawn from the operating system's entropy and kept secret"
            ),
            "key_is_published": inputs.published_key,
            "noise_dtype": "float32",
            "floating_point_hazard": (
                "Noise is drawn in floating point: the set of reachable sums depends on the exact "
                "sum (Mironov, 2012), which no epsilon on this card accounts for."
            ),
        },
        "data": {
            "sources": [inputs.dataset_name],
            "preprocessing": [dict(entry) for entry in inputs.preprocessing],
            "examples_per_record": inputs.examples_per_record,
            "contribution_bounding": inputs.contribution_bounding,
            "scrubber": "none",
        },
        "utility": [
            {**entry, **{key: finite(entry[key]) for key in ("value", "low", "high")}}
            for entry in inputs.utility
        ],
        "audit": dict(NOT_AUDITED if inputs.audit is None else inputs.audit),
        "software": {
            "package": "dpjax",
            "versions": {name: _version(name) for name in _PACKAGES}
            | {"python": platform.python_version()},
            "devices": list(inputs.devices),
            "precision": inputs.precision,
            "config_sha256": inputs.config_sha256,
            "ledger_head": inputs.ledger.head,
        },
        "hazards": [hazard._asdict() for hazard in hazards],
    }


def round_up(epsilon: float, digits: int = 2) -> str:
    """An upper bound printed so that it stays one.

    Example:
      >>> round_up(7.3211), round_up(8.0), round_up(0.0)
      ('7.33', '8.00', '0.00')
    """
    scaled = epsilon * 10**digits
    # A hundredth of a unit in the last digit absorbs binary representation of decimal inputs.
    return f"{math.ceil(round(scaled, 6)) / 10**digits:.{digits}f}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _headline(inputs: CardInputs, bounds: Bounds) -> float | None:
    """The epsilon by the accountant that calibrated the run, or by the one that has a bound."""
    first, second = bounds.rdp, bounds.pld
    if inputs.mechanism.accountant == "pld":
        first, second = second, first
    return second if first is None else first


def _accountant(inputs: CardInputs, bounds: Bounds) -> str:
    chosen = inputs.mechanism.accountant
    if chosen == "pld" and bounds.pld is None and bounds.rdp is not None:
        return "rdp"
    if chosen == "rdp" and bounds.rdp is None and bounds.pld is not None:
        return "pld"
    return chosen


def _setting(inputs: CardInputs, bounds: Bounds) -> dict[str, Any]:
    covered = _headline(inputs, bounds) is not None
    views = []
    for letter, meaning in VIEWS.items():
        applies = letter in inputs.views
        words = NO_GUARANTEE
        if letter == "S" and inputs.model == "central":
            words = (
                f"{NO_GUARANTEE}: noise is added after single updates were seen"
                if applies
                else "no single updates exist: training is central, and its operator is trusted"
            )
        elif letter == "S" and inputs.model == "distributed":
            words = "single updates are hidden by secure aggregation, not by the bound"
        elif covered:
            words = "covered: the bound composes all iterations, the rest is post-processing"
        views.append(
            {
                "view": letter,
                "meaning": meaning,
                "opened": applies,
                "covered": covered and (letter != "S" or inputs.model == "local"),
                "words": words,
            }
        )
    return {
        "model": inputs.model,
        "trust": inputs.trust,
        "cryptography": inputs.cryptography,
        "threat_views": views,
    }


def _claim(inputs: CardInputs, evidence: Evidence, bounds: Bounds, total: Bounds) -> dict[str, Any]:
    mechanism = inputs.mechanism
    epsilon, whole = _headline(inputs, bounds), _headline(inputs, total)
    words, total_words = (
        _in_words(inputs, evidence, bounds),
        _total_words(evidence, total, whole),
    )
    return {
        "mechanism": (
            f"DP-SGD: per-example clipping, {_noise(mechanism)}, {_SAMPLING[mechanism.sampling]}"
            if mechanism.is_private
            else "SGD without noise, " + _SAMPLING[mechanism.sampling]
        ),
        "unit": inputs.unit,
        "max_units_per_person": inputs.max_units_per_person,
        "max_units_per_person_in_words": (
            "unknown"
            if inputs.max_units_per_person is None
            else f"at most {inputs.max_units_per_person}"
        ),
        "neighboring_relation": mechanism.relation.name.lower(),
        "statement": _statement(inputs, evidence, bounds, whole),
        "epsilon": epsilon,
        "epsilon_rdp": bounds.rdp,
        "epsilon_pld": bounds.pld,
        "epsilon_in_words": words,
        "delta": inputs.delta,
        "one_over_n": 1 / inputs.dataset_size,
        "delta_below_one_over_n": inputs.delta < 1 / inputs.dataset_size,
        "bound_type": "none" if epsilon is None else "upper",
        "total": {
            "runs": evidence.num_runs,
            "epsilon": whole,
            "epsilon_rdp": total.rdp,
            "epsilon_pld": total.pld,
            "delta": inputs.delta,
            "words": total_words,
        },
        "gaussian_dp": None
        if bounds.gaussian_dp is None
        else {
            "mu": bounds.gaussian_dp[0],
            "regret": bounds.gaussian_dp[1],
            "words": "smallest mu that covers the PLD profile for delta from 1e-10 to 1/n; regret "
            "is its largest excess in epsilon there"
            + ("; cut batches come on top" if bounds.truncation else ""),
        },
        "privacy_profile": [
            {"delta": delta, "epsilon_rdp": by_rdp, "epsilon_pld": by_pld}
            for delta, by_rdp, by_pld in bounds.profile
        ],
        "epsilon_by_iteration": {
            "iterations": list(bounds.iterations),
            "epsilon_rdp": list(bounds.spent),
        },
        "groups": [
            {"size": g.size, "epsilon": g.epsilon, "delta": g.delta, "method": g.method}
            for g in bounds.groups
        ],
        "membership_test": None
        if bounds.true_positive_rate is None
        else {
            "false_positive_rate": FALSE_POSITIVE_RATE,
            "true_positive_rate_bound": bounds.true_positive_rate,
            "words": "bound for every test, from the PLD profile",
        },
    }


def _in_words(inputs: CardInputs, evidence: Evidence, bounds: Bounds) -> str:
    if not inputs.mechanism.is_private:
        return f"{NO_GUARANTEE}: no noise was added"
    if evidence.void:
        return f"{NO_GUARANTEE}: {_why_void(evidence)}"
    if bounds.rdp is None and bounds.pld is None:
        return f"{NO_GUARANTEE}: no accountant has a finite bound at delta {inputs.delta:g}"
    parts = []
    for name, value in (("RDP", bounds.rdp), ("PLD", bounds.pld)):
        missing = f"no bound known by {name} for this sampling"
        parts.append(missing if value is None else f"{round_up(value)} by {name}")
    return ", ".join(parts) + f", at delta {inputs.delta:g}"


def _why_void(evidence: Evidence) -> str:
    if not evidence.match:
        return "what ran is not what was accounted for"
    return "more iterations ran than were planned"


def _total_words(evidence: Evidence, total: Bounds, whole: float | None) -> str:
    if evidence.void:
        return f"{NO_GUARANTEE} for the total: {_why_void(evidence)}"
    if evidence.other_runs:
        return f"{NO_GUARANTEE} for the total: " + "; ".join(evidence.other_runs)
    if whole is None:
        return f"{NO_GUARANTEE} for the total: a run in the ledger has none"
    runs = "this run alone" if evidence.num_runs == 1 else f"all {evidence.num_runs} runs together"
    missing = "" if total.pld is not None else "; no bound known by PLD"
    return f"{runs}, by composition of every release in the ledger{missing}"


def _factor(epsilon: float) -> str:
    """e^epsilon to three digits, rounded up."""
    if epsilon > 13.8:
        return f"e^{round_up(epsilon)}"
    digits = 2 - math.floor(epsilon / math.log(10))
    scale = 10.0**digits
    return f"{math.ceil(math.exp(epsilon) * scale) / scale:,.{max(digits, 0)}f}"


def _chance(delta: float) -> str:
    """One in how many, rounded down to three digits."""
    inverse = 1 / delta * (1 + 1e-12)
    scale = 10.0 ** max(0, math.floor(math.log10(inverse)) - 2)
    return f"1 in {math.floor(inverse / scale) * scale:,.0f}"


def _statement(inputs: CardInputs, evidence: Evidence, bounds: Bounds, whole: float | None) -> str:
    """The claim for a reader who knows no formula."""
    epsilon = _headline(inputs, bounds)
    neighbor = _NEIGHBORS[inputs.mechanism.relation.name.lower()].format(unit=inputs.unit)
    if epsilon is None:
        return (
            f"There is {NO_GUARANTEE}. The model may reveal what was in its training records, word "
            "for word."
        )
    if evidence.steps_executed == 0:
        return "No iteration ran: through training, the model knows nothing of the private records."
    statement = (
        f"With {neighbor}, no outcome of training becomes more than {_factor(epsilon)} times as "
        f"likely (epsilon {round_up(epsilon)}), except for a chance of {_chance(inputs.delta)} "
        "(delta)."
    )
    if bounds.true_positive_rate is not None:
        rate = math.ceil(1000 * bounds.true_positive_rate) / 10
        statement += (
            f" Whoever tests whether {inputs.unit} was used, and wrongly accuses 1 in 100 of those "
            f"that were not, can recognise at most {rate:g} in 100 of those that were."
        )
    if inputs.published_key:
        statement += " This supposes a secret random key, and the key of this run is published."
    if evidence.num_runs > 1 and whole is not None:
        statement += (
            f" All {evidence.num_runs} runs on these records together: epsilon {round_up(whole)}."
        )
    return statement


def _coverage(inputs: CardInputs, evidence: Evidence) -> dict[str, Any]:
    outside = inputs.trials_outside_ledger
    return {
        "data_accesses_covered": [
            f"{evidence.steps_executed} noisy sums of clipped gradients, one per iteration"
        ]
        if inputs.mechanism.is_private and not evidence.void
        else [],
        "not_covered": list(inputs.not_covered),
        "tuning": {
            "trials_in_ledger": evidence.num_runs,
            "trials_outside_ledger": outside,
            "cost_included": outside == 0,
            "method": "composition of every release of every run in the ledger",
            "words": (
                "not stated whether other runs exist outside the ledger"
                if outside is None
                else f"{outside} runs outside the ledger, not included"
                if outside
                else "every run on these records is in the ledger, and in the total"
            ),
        },
        "pretraining": [dict(entry) for entry in inputs.pretraining],
    }


def _accounting(inputs: CardInputs, evidence: Evidence, bounds: Bounds) -> dict[str, Any]:
    mechanism = inputs.mechanism
    event = "no event: what ran is not what was planned"
    if not evidence.void:
        event = repr(inputs.ledger.dp_event(inputs.run))
    epsilon = _headline(inputs, bounds)
    paid = 0.0
    if bounds.truncation and epsilon is not None:
        paid = (1 + math.exp(min(epsilon, 700.0))) * bounds.truncation
    return {
        "accountant": _accountant(inputs, bounds),
        "library": "dp-accounting",
        "library_version": _version("dp-accounting"),
        "sampling_assumed": evidence.assumed,
        "sampling_actual": evidence.actual,
        "match": evidence.match,
        "mismatches": list(evidence.mismatches),
        "truncation": {
            "probability": bounds.truncation,
            "delta_paid": min(1.0, paid),
            "words": "the RDP epsilon pays for cut batches within the stated delta"
            if mechanism.sampling == "truncated_poisson"
            else "no batch is cut",
        },
        "dataset_size": inputs.dataset_size,
        "dataset_size_is_public": inputs.dataset_size_is_public,
        "sampling_probability": mechanism.sampling_probability,
        "steps_planned": evidence.steps_planned,
        "steps_executed": evidence.steps_executed,
        "steps_within_plan": evidence.steps_within_plan,
        "dp_event": event,
    }


def _training(inputs: CardInputs) -> dict[str, Any]:
    mechanism = inputs.mechanism
    sampler = mechanism.planned_sampler(inputs.dataset_size)
    clip = mechanism.l2_clip_norm
    return {
        "model_name": inputs.model_name,
        "num_parameters": inputs.num_parameters,
        "num_trained_parameters": inputs.num_trained_parameters,
        "clipping": {
            "kind": _kind_of_clipping(mechanism),
            "l2_clip_norm": clip if math.isfinite(clip) else UNBOUNDED,
            "adaptive": mechanism.adaptive_clipping is not None,
            "share_of_budget": getattr(mechanism.adaptive_clipping, "budget_share", 0.0),
        },
        "noise_multiplier": mechanism.noise_multiplier,
        "stddev": mechanism.stddev,
        "normalize_by": mechanism.normalize_by,
        "batch": {
            "expected": sampler.expected_batch_size,
            "physical": sampler.physical_batch_size,
            "realised": "not recorded: under Poisson sampling it is private",
        },
        "strategy_matrix": _strategy_matrix(mechanism),
        "optimizer": inputs.optimizer,
        "target_epsilon": mechanism.target_epsilon,
        "target_delta": mechanism.target_delta,
        "cross_example_operations": "none: the loss sees one example at a time",
        "non_finite_gradients": "an example with a NaN or infinite gradient counts as removed",
    }


def _noise(mechanism: Any) -> str:
    return "Gaussian noise" if mechanism.strategy is None else "correlated Gaussian noise"


def _strategy_matrix(mechanism: Any) -> str:
    strategy = mechanism.strategy
    if strategy is None:
        return "identity: independent noise in every iteration"
    return (
        f"{strategy.kind}: noise correlated over {strategy.iterations} iterations; one example "
        f"moves them by {mechanism.strategy_sensitivity:.4g} times the clipped gradient's bound"
    )


def _kind_of_clipping(mechanism: Any) -> str:
    kind = "L2 norm of each example's whole gradient"
    if mechanism.clip_groups is not None:
        name = mechanism.clip_groups
        kind = f"L2 norm of each example's gradient in groups of parameters ({name})"
        if callable(name):
            kind = "L2 norm of each example's gradient in groups of parameters"
    if mechanism.stability_constant is not None:
        kind += f"; normalised (norm + {mechanism.stability_constant:g}), not clipped"
    adaptive = mechanism.adaptive_clipping
    if adaptive is not None:
        kind += (
            f"; the clip norm follows the noisy {adaptive.target_quantile:g} quantile of the norms,"
            f" released with noise multiplier "
            f"{(mechanism.noise_multiplier or 0.0) / adaptive.budget_share**0.5:.3g} beside "
            f"{mechanism.gradient_noise_multiplier:.4g} for the gradient"
        )
    return kind
