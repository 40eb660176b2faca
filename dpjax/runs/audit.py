"""`dpjax audit`: what was promised against what an attacker finds."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.table import Table

from dpjax.auditing.bounds import audit_coins
from dpjax.auditing.canaries import canary_losses
from dpjax.auditing.coins import commitment
from dpjax.auditing.curves import roc_curve
from dpjax.auditing.membership import distribution_check, membership_attacks
from dpjax.auditing.results import Interval
from dpjax.auditing.step import SCENARIOS, audit_step, own_step
from dpjax.data import dataset_from_records, records_from
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD, Sampling
from dpjax.models import Model
from dpjax.report import roc_figure
from dpjax.report.audit import BOUND_COLUMNS, audit_section, bound_rows
from dpjax.report.figures import standalone
from dpjax.report.files import write_whole
from dpjax.runs.commands import console
from dpjax.runs.config import fresh_key
from dpjax.runs.execute import find_run
from dpjax.runs.finish import Finished, page_path, refresh
from dpjax.runs.folder import Run, reopen, write_json
from dpjax.runs.sources import open_model


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
class AuditModelConfig:
    """Attack any model: can it tell records that it was trained on from others like them?"""

    model: tyro.conf.Positional[str]
    """Model folder, a run folder with one in it, or a pretrained model as for `dpjax train`."""
    members: str
    """Records that it was trained on: a file, folder or hub id."""
    non_members: str
    """Records from the same source that it was not trained on."""
    output: str
    """Folder for audit.json and roc.svg; both are private."""
    reference: str | None = None
    """Model that saw none of the members, e.g. the one before fine-tuning: a stronger attack."""
    text_field: str | None = None
    """Field with the text (default: "text" or the only field)."""
    sequence_length: int = 64
    """Tokens per record, as in training."""
    max_records: int = 2000
    """Of each kind; the first ones after a shuffle."""
    neighbours: bool = False
    """Also the neighbourhood attack, which takes ten times as long."""
    batch_size: int = 32
    """Records at once."""
    seed: int = 0
    """For the shuffle, neighbours and the check of the records."""


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """Measure what an attacker finds: in a model, in a run with canaries, or in the DP step."""

    what: tyro.conf.OmitArgPrefixes[
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[AuditModelConfig, tyro.conf.subcommand("model")]
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
    else:
        audit_run(config.what)


def audit_model(config: AuditModelConfig) -> dict[str, Any]:
    """Every membership attack on a model, after a check that words alone do not tell them apart."""
    model = open_model(config.model)
    reference = None if config.reference is None else open_model(config.reference)
    if reference is not None and (
        reference.tokenizer.fingerprint() != model.tokenizer.fingerprint()
    ):
        raise DpjaxError(
            f"{config.reference} has another tokenizer than {config.model}; a reference model must "
            "read the same tokens"
        )
    rng, texts, data = np.random.default_rng(config.seed), [], []
    for source in (config.members, config.non_members):
        records = records_from(source, config.text_field)
        kept = [records[i] for i in rng.permutation(len(records))[: config.max_records]]
        texts.append([record.text for record in kept])
        data.append(dataset_from_records(kept, model.tokenizer, config.sequence_length))
    both = len(set(texts[0]) & set(texts[1]))
    if both:
        raise DpjaxError(
            f"{both} texts are in both {config.members} and {config.non_members}; a record that "
            "was trained on is no non-member: remove them"
        )
    check = distribution_check(*texts, seed=config.seed)
    found = membership_attacks(
        model.config,
        model.params,
        *data,
        tokenizer=model.tokenizer,
        reference=None if reference is None else (reference.config, reference.params),
        neighbour_key=fresh_key(config.seed) if config.neighbours else None,
        batch_size=config.batch_size,
        progress=True,
    )
    folder = pathlib.Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "model": config.model,
        "same_distribution": check.details["passed"],
        "covered_by_epsilon": False,
        "attacks": [
            dataclasses.asdict(result) | {"assumptions": list(result.assumptions)}
            for result in (check, *found)
        ],
    }
    for attack in results["attacks"]:
        attack.pop("details")
        attack["metrics"] = {k: Interval(*v)._asdict() for k, v in attack["metrics"].items()}
    write_json(folder / "audit.json", results)
    curves = {
        result.attack: (curve.false_positive_rates, curve.true_positive_rates)
        for result in found
        for curve in (roc_curve(*result.details["scores"]),)
    }
    write_whole(folder / "roc.svg", standalone(roc_figure(curves)))
    table = Table("Attack", "AUC", "TPR at 1% FPR", "at 0.1%", title="membership inference")
    for result in (check, *found):
        cells = [
            "-" if value is None else f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
            for value in (
                result.metrics.get(name)
                for name in ("auc", "tpr_at_1_percent_fpr", "tpr_at_0.1_percent_fpr")
            )
        ]
        table.add_row(result.attack.replace("_", " "), *cells)
    console.print(table)
    if not check.details["passed"]:
        console.print(
            "the two kinds of records differ in their words: whatever the attacks find, it is not "
            "shown to be memory; take non-members from the members' source and time"
        )
    console.print(f"numbers: {folder / 'audit.json'}\nfigure:  {folder / 'roc.svg'}")
    return results


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
