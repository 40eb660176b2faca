"""`dpjax audit`: what was promised against what an attacker finds."""

import dataclasses
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from rich.table import Table

from dpjax.auditing.bounds import audit_coins
from dpjax.auditing.canaries import canary_losses
from dpjax.auditing.coins import commitment
from dpjax.auditing.curves import attack_result
from dpjax.auditing.results import AttackResult
from dpjax.auditing.step import SCENARIOS, audit_step, own_step
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD, Sampling
from dpjax.models import Model
from dpjax.report.audit import BOUND_COLUMNS, audit_section, bound_rows
from dpjax.runs.audit_model import AuditModelConfig, AuditTextConfig, audit_model, audit_text
from dpjax.runs.commands import console
from dpjax.runs.config import fresh_key
from dpjax.runs.execute import find_run
from dpjax.runs.finish import Finished, page_path, refresh
from dpjax.runs.folder import Run, reopen, write_json


@dataclasses.dataclass(frozen=True)
class AuditRunConfig:
    """Bound epsilon from below with the canaries of a finished run (from --audit-canaries)."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    guess_fraction: float | None = None
    """Share of the coins to guess, half at each end; give it before you have seen any score.
    Default: tries several and pays for each."""
    confidence: float = 0.95
    """Of each bound."""


@dataclasses.dataclass(frozen=True)
class AuditStepConfig:
    """Run dpjax's own DP step as a black box on worst-case batches, and try to refute its claim."""

    noise_multiplier: float = 1.0
    """Noise stddev / sensitivity."""
    l2_clip_norm: float = 1.0
    """Largest L2 norm of one example's gradient."""
    sampling: Sampling = "poisson"
    """How batches are drawn."""
    sampling_probability: float = 0.25
    """Of one example in one iteration, in the scenario with sampling."""
    clipping_method: Literal["auto", "vmap", "lazy"] = "auto"
    """How gradients are clipped."""
    microbatch_size: int | None = None
    """Examples differentiated at once."""
    num_runs: int = 8000
    """With the canary, and as many without; more runs find smaller bugs."""
    confidence: float = 0.95
    """Of the verdict over all scenarios."""
    delta: float = 1e-5
    """At which bounds are printed."""
    seed: int | None = None
    """Default: fresh."""


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """Measure what an attacker finds: in a model, synthetic text, a run, or the DP step."""

    what: tyro.conf.OmitArgPrefixes[
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[AuditModelConfig, tyro.conf.subcommand("model")]
            | Annotated[AuditTextConfig, tyro.conf.subcommand("text")]
            | Annotated[AuditRunConfig, tyro.conf.subcommand("run")]
            | Annotated[AuditStepConfig, tyro.conf.subcommand("step")]
        ]
    ]


def audit(config: AuditConfig) -> None:
    """Runs the audit that a configuration asks for, and prints what it found."""
    if isinstance(config.what, AuditStepConfig):
        audit_own_step(config.what)
    elif isinstance(config.what, AuditModelConfig):
        audit_model(config.what)
    elif isinstance(config.what, AuditTextConfig):
        audit_text(config.what)
    else:
        audit_run(config.what)


def audit_run(config: AuditRunConfig) -> Finished:
    """Guesses the coins of a finished run from its final weights, and puts the bounds on its card.

    The score of a canary is what training took off its loss: under the start model minus under the
    final one. The attacker is given the start model, which is public or a seed, and all canaries.
    """
    run = reopen(config.run)
    if run.canaries is None or run.audit_secret is None:
        raise DpjaxError(
            f"{config.run} has no canaries; train with --audit-canaries 1000 to audit a run"
        )
    with Ledger.open(run.ledger_path) as ledger:
        number = find_run(ledger, run.identifier)
        done = refresh(run, ledger)
        assert number is not None  # refresh refuses a run that has not finished
        promised = ledger.plan(number)["config"].get("audit", {}).get("commitment")
        if promised != commitment(run.audit_secret):
            raise DpjaxError(
                f"audit.secret in {config.run} is not the one that the ledger was promised "
                "before training; restore the file"
            )
        scores = coin_scores(run, done.model)
        ledger.reveal_canaries(number, run.audit_secret, run.canaries.included.tolist())
        bounds = audit_coins(
            scores,
            run.canaries.included,
            delta=run.delta,
            confidence=config.confidence,
            guess_fraction=config.guess_fraction,
            mechanism=run.mechanism if done.card["claim"]["epsilon_pld"] is not None else None,
        )
        claim = done.card["claim"]
        # The smaller of two proven bounds is proven too.
        claimed = min(
            (e for e in (claim["epsilon_rdp"], claim["epsilon_pld"]) if e is not None), default=None
        )
        section = audit_section(
            bounds,
            coin_attacks(scores, run.canaries.included, config.confidence),
            claimed_epsilon=claimed,
            threat_view="W",
            canary_kind="people of random tokens"
            if run.config.unit == "user"
            else "records of random tokens",
            num_canaries=len(scores),
            inclusion_probability=0.5,
        )
        write_json(
            run.folder / "audit.json",
            {"section": section, "params_sha256": done.card["identity"]["artifact_sha256"]},
        )
        done = refresh(run, ledger)
    table = Table(*BOUND_COLUMNS[:4], BOUND_COLUMNS[5], title="lower bounds on epsilon")
    for row in bound_rows(section):
        table.add_row(*row[:4], row[5])
    console.print(table)
    console.print(section["words"])
    console.print(f"verdict: {section['verdict']}")
    console.print(f"card:    {run.folder / 'card.json'}\nreport:  {page_path(run)}")
    return done


def coin_attacks(scores: np.ndarray, included: np.ndarray, confidence: float) -> list[AttackResult]:
    """The same scores as membership inference; canaries left out are the twins."""
    if included.all() or not included.any():
        return []
    return [
        attack_result(
            "loss taken off",
            scores[included],
            scores[~included],
            assumptions=(
                "the attacker has the start model and the final weights",
                "canaries are odder than people's records, which may be found less often",
            ),
            confidence=confidence,
        )
    ]


def coin_scores(run: Run, model: Model) -> np.ndarray:
    """Loss under the start model minus loss under the final one, float64[m], in nats."""
    assert run.canaries is not None
    batch = 64 if model.config.vocabulary_size < 5000 else 8
    before, after = (
        canary_losses(config, params, run.canaries.canaries, "in", batch_size=batch)
        for config, params in (
            (run.start.config, run.start.params),
            (model.config, model.params),
        )
    )
    return before - after


def audit_own_step(config: AuditStepConfig) -> None:
    """Prints one row for each scenario, and the verdict."""
    mechanism = DPSGD(
        config.l2_clip_norm,
        config.sampling_probability,
        4,
        noise_multiplier=config.noise_multiplier,
        sampling=config.sampling,
        population=None if config.sampling == "poisson" else 16,
        normalize_by=8.0,
        clipping_method=config.clipping_method,
        microbatch_size=config.microbatch_size,
    )
    found = audit_step(
        own_step(mechanism),
        mechanism,
        fresh_key(config.seed),
        delta=config.delta,
        num_runs=config.num_runs,
        confidence=config.confidence,
    )
    columns = ("Scenario", "would find", "ε at least", "Ceiling", "Claimed", "Finds mu above", "")
    table = Table(*columns, title=f"at delta {config.delta:g}, {config.num_runs:,} runs each way")
    for result in found.results:
        table.add_row(
            result.scenario.name,
            result.scenario.finds,
            f"{result.bound.epsilon_lower:.2f}",
            f"{result.bound.ceiling:.2f}",
            f"{result.claimed_epsilon:.2f}",
            "-" if result.detectable is None else f"{result.detectable:.2f} x",
            "FALSIFIED" if result.refuted else "",
        )
    console.print(table)
    console.print(
        f"verdict: {found.verdict} ({100 * config.confidence:g}% over all {len(SCENARIOS)} "
        f"scenarios, {jax.local_devices()[0].platform}); a test that finds nothing proves nothing"
    )
