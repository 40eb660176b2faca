"""`dpjax audit model` and `dpjax audit text`: attacks on any model, and on released text alone."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tyro
from rich.table import Table

from dpjax.auditing import (
    AttackResult,
    Interval,
    distribution_check,
    extraction_attacks,
    membership_attacks,
    pii_extraction,
    pii_inference,
    pii_reconstruction,
    ranked_generation,
    rate_result,
    roc_curve,
    synthetic_text_attacks,
)
from dpjax.auditing.extraction import completes_secrets
from dpjax.data import PlantedPII, dataset_from_records, load_planted_pii, records_from
from dpjax.errors import DpjaxError
from dpjax.models import Model
from dpjax.report import roc_figure
from dpjax.report.figures import standalone
from dpjax.report.files import write_whole
from dpjax.runs.commands import console
from dpjax.runs.config import fresh_key
from dpjax.runs.folder import write_json
from dpjax.runs.sources import open_model


@dataclasses.dataclass(frozen=True)
class AuditModelConfig:
    """Attack any model: does it know the records that it was trained on from others like them?"""

    model: tyro.conf.Positional[str]
    """Model folder, a run folder with one in it, or a pretrained model as for `dpjax train`."""
    members: str
    """Records that it was trained on: a file, folder or hub id."""
    non_members: str
    """Records from the same source that it was not trained on."""
    output: str
    """Folder for audit.json, roc.svg and scores (a stopped audit goes on there); all private."""
    reference: str | None = None
    """Model that saw none of the members, e.g. the one before fine-tuning: a stronger attack."""
    planted: str | None = None
    """Answer key of planted secrets and their twins (JSON, as `dpjax demo` writes it): also
    completion, extraction, reconstruction and inference of these."""
    text_field: str | None = None
    """Field with the text (default: "text" or the only field)."""
    sequence_length: int = 64
    """Tokens per record, as in training."""
    suffix_length: int = 16
    """Tokens that extraction must bring out, given all before them."""
    num_texts: int = 500
    """Texts drawn to look for planted secrets in."""
    max_records: int = 2000
    """Of each kind; the first ones after a shuffle."""
    neighbours: bool = False
    """Also the neighbourhood attack, which takes ten times as long."""
    batch_size: int = 32
    """Records at once."""
    seed: int = 0
    """For the shuffle, neighbours, samples and the check of the records."""


@dataclasses.dataclass(frozen=True)
class AuditTextConfig:
    """Attack synthetic records alone: do they echo records that their model was trained on?"""

    synthetic: tyro.conf.Positional[str]
    """The synthetic records: a file, folder or hub id."""
    members: str
    """Records (or canaries) that the model was trained on."""
    non_members: str
    """Records (or canaries) from the same source that it was not trained on."""
    output: str
    """Folder for audit.json and roc.svg; both are private."""
    references: tuple[str, ...] = ()
    """Synthetic records made the same way without the members: a stronger attack."""
    text_field: str | None = None
    """Field with the text (default: "text" or the only field)."""
    max_records: int = 2000
    """Of members and non-members each; the first ones after a shuffle."""
    nearest: int = 25
    """Synthetic records that a record is compared with."""
    seed: int = 0
    """For the shuffle and the check of the records."""


def audit_model(config: AuditModelConfig) -> dict[str, Any]:
    """Membership and extraction, after a check that words alone do not tell the two sides apart."""
    model = open_model(config.model)
    reference = None if config.reference is None else open_model(config.reference)
    if reference is not None and (
        reference.tokenizer.fingerprint() != model.tokenizer.fingerprint()
    ):
        raise DpjaxError(
            f"{config.reference} has another tokenizer than {config.model}; a reference model must "
            "read the same tokens"
        )
    planted = None if config.planted is None else load_planted_pii(config.planted)
    sides = _two_sides(config)
    data = [
        dataset_from_records(records, model.tokenizer, config.sequence_length) for records in sides
    ]
    check = distribution_check(*([r.text for r in side] for side in sides), seed=config.seed)
    # First, because it refuses records that are too short.
    rates = extraction_attacks(
        model.config,
        model.params,
        *data,
        suffix_length=config.suffix_length,
        batch_size=config.batch_size,
    )
    attacks = membership_attacks(
        model.config,
        model.params,
        *data,
        tokenizer=model.tokenizer,
        reference=None if reference is None else (reference.config, reference.params),
        neighbour_key=fresh_key(config.seed) if config.neighbours else None,
        batch_size=config.batch_size,
        cache=pathlib.Path(config.output) / "scores",
        progress=True,
    )
    if planted is not None:
        rates += planted_attacks(config, model, planted, reference)
    return _write_and_show(config.model, config.output, check, attacks, rates)


def planted_attacks(
    config: AuditModelConfig, model: Model, planted: PlantedPII, reference: Model | None
) -> list[AttackResult]:
    """Every attack on planted secrets, beside its rate on their twins."""
    parts = model.config, model.params, model.tokenizer
    completed = [
        completes_secrets(*parts, secrets) for secrets in (planted.inserted, planted.held_out)
    ]
    note = "the attacker knows the sentence up to the secret"
    size = config.batch_size
    text_key, sample_key = jax.random.split(fresh_key(config.seed))
    texts = ranked_generation(
        *parts,
        text_key,
        num_texts=config.num_texts,
        max_new_tokens=config.sequence_length,
        batch_size=size,
    ).texts
    return [
        rate_result("greedy completion", *completed, threat_view="B", assumptions=(note,)),
        pii_extraction(texts, planted),
        pii_reconstruction(*parts, planted, sample_key, num_samples=16, batch_size=size),
        pii_inference(
            *parts,
            planted,
            seed=config.seed,
            reference=None if reference is None else (reference.config, reference.params),
            batch_size=size,
        ),
    ]


def audit_text(config: AuditTextConfig) -> dict[str, Any]:
    """Membership inference from synthetic records, by n-grams and by the most similar ones."""
    synthetic, *references = (
        [record.text for record in records_from(source, config.text_field)]
        for source in (config.synthetic, *config.references)
    )
    inside, outside = ([record.text for record in side] for side in _two_sides(config))
    check = distribution_check(inside, outside, seed=config.seed)
    attacks = synthetic_text_attacks(
        synthetic, inside, outside, references=references, nearest=config.nearest
    )
    return _write_and_show(config.synthetic, config.output, check, attacks, [])


def _two_sides(config: AuditModelConfig | AuditTextConfig) -> list[list[Any]]:
    """Members and non-members, shuffled, with nothing on both sides."""
    rng, sides = np.random.default_rng(config.seed), []
    for source in (config.members, config.non_members):
        records = records_from(source, config.text_field)
        sides.append([records[i] for i in rng.permutation(len(records))[: config.max_records]])
    both = len({r.text for r in sides[0]} & {r.text for r in sides[1]})
    if both:
        raise DpjaxError(
            f"{both} texts are in both {config.members} and {config.non_members}; a record that "
            "was trained on is no non-member: remove them"
        )
    return sides


def _write_and_show(
    source: str,
    output: str,
    check: AttackResult,
    attacks: Sequence[AttackResult],
    rates: Sequence[AttackResult],
) -> dict[str, Any]:
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "model": source,
        "same_distribution": check.details["passed"],
        "covered_by_epsilon": False,
        "attacks": [_plain(result) for result in (check, *attacks, *rates)],
    }
    write_json(folder / "audit.json", results)
    curves = {
        result.attack: (curve.false_positive_rates, curve.true_positive_rates)
        for result in attacks
        for curve in (roc_curve(*result.details["scores"]),)
    }
    write_whole(folder / "roc.svg", standalone(roc_figure(curves)))
    names = ("auc", "tpr_at_1_percent_fpr", "tpr_at_0.1_percent_fpr")
    heads = ("Attack", "AUC", "TPR at 1% FPR", "at 0.1%")
    console.print(_table("membership inference", heads, (check, *attacks), names))
    if rates:
        names = ("rate", "rate_on_twins", "extra_rate")
        heads = ("Attack", "on members", "on the others", "difference")
        console.print(_table("extraction: how often it succeeds", heads, rates, names))
    if not check.details["passed"]:
        console.print(
            "the two kinds of records differ in their words: whatever the attacks find, it is not "
            "shown to be memory; take non-members from the members' source and time"
        )
    console.print(f"numbers: {folder / 'audit.json'}\nfigure:  {folder / 'roc.svg'}")
    return results


def _plain(result: AttackResult) -> dict[str, Any]:
    """Ready for JSON, without scores of single records."""
    found: dict[str, Any] = dataclasses.asdict(result) | {"assumptions": list(result.assumptions)}
    found.pop("details")
    found["metrics"] = {k: Interval(*v)._asdict() for k, v in result.metrics.items()}
    if "blind_guess" in result.details:
        found["blind_guess"] = result.details["blind_guess"]
    return found


def _table(
    title: str, heads: Sequence[str], results: Sequence[AttackResult], metrics: Sequence[str]
) -> Table:
    table = Table(*heads, title=title)
    for result in results:
        cells = [
            "-" if value is None else f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
            for value in map(result.metrics.get, metrics)
        ]
        table.add_row(result.attack.replace("_", " "), *cells)
    return table
