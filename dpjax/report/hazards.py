"""Warnings that the code raises on a card, whatever its author would have liked to say."""

import math
from typing import NamedTuple

from dpjax.report.evidence import NO_GUARANTEE, Bounds, Evidence
from dpjax.report.inputs import CardInputs

LARGE_EPSILON = 10.0


class Hazard(NamedTuple):
    """One reason to trust a claim less than it reads."""

    code: str
    severity: str  # "void": there is no claim; "warning": it is weaker than it looks; "note"
    text: str


def find_hazards(
    inputs: CardInputs, evidence: Evidence, bounds: Bounds, total: Bounds
) -> list[Hazard]:
    """Every hazard that this run and its ledger show, gravest first."""
    found = _void(inputs, evidence)
    if inputs.mechanism.is_private:
        found += [*_unit(inputs), *_size(inputs), *_key(inputs), *_views(inputs)]
    found += [*_budget(inputs, evidence, bounds, total), *_handling(inputs), *_audit(inputs)]
    order = ("void", "warning", "note")
    return sorted(found, key=lambda hazard: order.index(hazard.severity))


def _void(inputs: CardInputs, evidence: Evidence) -> list[Hazard]:
    found = []
    if not inputs.mechanism.is_private:
        text = f"The noise multiplier is 0: {NO_GUARANTEE}. The model may repeat its records."
        found.append(Hazard("no_formal_guarantee", "void", text))
    if evidence.mismatches:
        text = "What ran is not what was accounted for: " + "; ".join(evidence.mismatches) + "."
        found.append(Hazard("sampling_mismatch", "void", text))
    weakest = min((e["release"]["noise_multiplier"] for e in evidence.actual), default=math.inf)
    planned = inputs.mechanism.noise_multiplier or 0.0
    if weakest < planned:
        text = (
            f"Noise of {weakest:g} times the sensitivity was added where {planned:g} was accounted "
            "for: it was rescaled to a cohort that did not exist."
        )
        found.append(Hazard("noise_rescaled", "void", text))
    if not evidence.steps_within_plan:
        text = (
            f"{evidence.steps_executed} iterations ran, more than the {evidence.steps_planned} "
            "planned: the claim does not cover them."
        )
        found.append(Hazard("more_steps_than_planned", "void", text))
    if evidence.other_runs:
        text = "No total can be stated: " + "; ".join(evidence.other_runs) + "."
        found.append(Hazard("ledger_total_unknown", "void", text))
    return found


def _audit(inputs: CardInputs) -> list[Hazard]:
    audit = inputs.audit
    if audit is None or audit["verdict"] != "FALSIFIED":
        return []
    text = (
        f"The audit contradicts the claim: {audit['words']} Something in this run is not what it "
        "says; do not rely on epsilon before it is found."
    )
    return [Hazard("audit_above_claim", "void", text)]


def _unit(inputs: CardInputs) -> list[Hazard]:
    found = []
    if inputs.examples_per_record > 1:
        text = (
            f"One record became up to {inputs.examples_per_record} units: the promise is for "
            f"{inputs.unit}, which is less than a record. The group epsilon says what a whole "
            "record gets."
        )
        found.append(Hazard("unit_smaller_than_record", "warning", text))
    if inputs.max_units_per_person is None:
        text = (
            "It is not known how many units one person contributed: the promise is for "
            f"{inputs.unit}, not for a person."
        )
        found.append(Hazard("unit_smaller_than_person", "warning", text))
    elif inputs.max_units_per_person > 1:
        text = (
            f"One person contributed up to {inputs.max_units_per_person} units: the promise is for "
            f"{inputs.unit}, not for a person. The group epsilon says what a person gets."
        )
        found.append(Hazard("unit_smaller_than_person", "warning", text))
    return found


def _size(inputs: CardInputs) -> list[Hazard]:
    found = []
    if inputs.delta >= 1 / inputs.dataset_size:
        text = (
            f"delta {inputs.delta:g} is not below 1/n = {1 / inputs.dataset_size:.2g}: publishing "
            "one whole record at random would satisfy it."
        )
        found.append(Hazard("delta_not_below_1_over_n", "warning", text))
    imagined = inputs.mechanism.population
    if imagined not in (None, inputs.dataset_size):
        text = (
            f"The mechanism was planned for {imagined} units and ran on {inputs.dataset_size}: "
            "expected batch, normaliser and delta are those of a cohort that was not there."
        )
        found.append(Hazard("imagined_cohort", "warning", text))
    if not inputs.dataset_size_is_public:
        text = (
            f"The number of units, {inputs.dataset_size}, is not declared public, yet this card "
            "states it, and sampling and scaling depend on it."
        )
        found.append(Hazard("dataset_size_not_public", "note", text))
    return found


def _views(inputs: CardInputs) -> list[Hazard]:
    """What is released on the way, before the noise that the bound counts."""
    if "S" not in inputs.views or inputs.model == "local":
        return []
    text = "Single updates are seen before noise is added: the bound does not cover them."
    if inputs.model == "distributed":
        text = (
            "Single updates are hidden by secure aggregation alone; where it fails, the bound does "
            "not cover them."
        )
    return [Hazard("intermediate_releases_uncovered", "warning", text)]


def _key(inputs: CardInputs) -> list[Hazard]:
    found = []
    if inputs.published_key:
        text = (
            "The random key comes from a seed that was given: the run can be repeated, and whoever "
            "knows the seed can subtract the noise. There is no real-world guarantee until it is "
            "run again with a secret key."
        )
        found.append(Hazard("published_key", "warning", text))
    return found


def _budget(inputs: CardInputs, evidence: Evidence, bounds: Bounds, total: Bounds) -> list[Hazard]:
    found = []
    stated = [e for e in (bounds.rdp, total.rdp) if e is not None]
    if stated and max(stated) > LARGE_EPSILON:
        text = (
            f"epsilon is above {LARGE_EPSILON:g}: taken alone, the bound allows an attacker near "
            "certainty about a unit."
        )
        found.append(Hazard("epsilon_above_10", "warning", text))
    if inputs.trials_outside_ledger:
        text = (
            f"{inputs.trials_outside_ledger} more runs on these records are not in the ledger: "
            "choosing among them is not covered."
        )
        found.append(Hazard("tuning_uncovered", "warning", text))
    elif inputs.trials_outside_ledger is None:
        text = "Whether other runs on these records exist outside the ledger is not stated."
        found.append(Hazard("tuning_unknown", "note", text))
    if evidence.num_runs > 1:
        text = (
            f"The ledger holds {evidence.num_runs} runs on these records: the total epsilon, not "
            "this run's, is what all of them together cost."
        )
        found.append(Hazard("several_runs", "note", text))
    if 0 < evidence.steps_executed < evidence.steps_planned:
        text = (
            f"The run stopped after {evidence.steps_executed} of {evidence.steps_planned} "
            "iterations; epsilon is of what ran. That holds if the moment of stopping was not "
            "chosen by looking at private records."
        )
        found.append(Hazard("stopped_early", "note", text))
    return found


def _handling(inputs: CardInputs) -> list[Hazard]:
    found = []
    steps = [p["step"] for p in inputs.preprocessing if p["data_dependent"] and not p["private"]]
    if steps:
        text = "Preprocessing looked at private records without noise: " + ", ".join(steps) + "."
        found.append(Hazard("preprocessing_uncovered", "warning", text))
    secret = [p["name"] for p in inputs.pretraining if not p["public"]]
    if secret:
        text = "The start model saw data that are not public: " + ", ".join(secret) + "."
        found.append(Hazard("pretraining_not_public", "warning", text))
    shared = [p["name"] for p in inputs.pretraining if p["overlap"] in ("certain", "possible")]
    if shared:
        text = (
            "Pretraining data may hold some of these records, which then have no protection: "
            + ", ".join(shared)
            + "."
        )
        found.append(Hazard("pretraining_overlap", "warning", text))
    numbers = sum(not entry["covered"] for entry in inputs.utility)
    if numbers:
        text = (
            f"{numbers} utility numbers were computed on private records without noise: they are "
            "for the data owner, epsilon does not cover them."
        )
        found.append(Hazard("utility_uncovered", "note", text))
    return found
