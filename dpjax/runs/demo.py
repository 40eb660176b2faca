"""The main job: a small model on public text, then on private dialogues, plain and private."""

import dataclasses
import json
import os
import pathlib
import shutil
import time
from typing import Literal

from rich.markup import escape
from rich.table import Table

from dpjax.artifact import load_model
from dpjax.auditing import completes_secrets
from dpjax.data import (
    PlantedPII,
    PlantedSecret,
    Record,
    chitchat,
    plant_pii,
    stable_id,
)
from dpjax.errors import DpjaxError
from dpjax.generation import generate
from dpjax.ledger import Ledger
from dpjax.models import Model
from dpjax.report import Sample, TableData
from dpjax.runs.commands import console, describe, drive
from dpjax.runs.config import TrainConfig, fresh_key
from dpjax.runs.finish import Extras, Finished, finish, page_path, write_page
from dpjax.runs.folder import create, open_run


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Public text, then private dialogues: the same model without privacy and at epsilon 8."""

    output: str = "runs/demo"
    """Folder for the three runs; an earlier demo there is replaced."""
    target_epsilon: float = 8.0
    """Budget of the private run."""
    preset: Literal["full", "smoke"] = "full"
    """"full" takes a few minutes on 2 cores; "smoke" checks that everything works."""
    seed: int = 0
    """Fixed, so that the demo can be repeated: its guarantee is for show (see the card)."""


@dataclasses.dataclass(frozen=True)
class _Scale:
    dialogues: int | None
    public: tuple[int, int]  # iterations, expected batch size
    plain: tuple[int, int]
    private: tuple[int, int]
    repetitions: dict[int, int]  # times planted -> number of secrets


_SCALES = {
    "full": _Scale(None, (200, 64), (300, 64), (80, 256), {1: 4, 8: 4, 64: 8}),
    "smoke": _Scale(400, (4, 16), (4, 16), (3, 32), {1: 1, 8: 1}),
}
_SEQUENCE_LENGTH = 64
_MARK = ".dpjax-demo"


def demo(config: DemoConfig) -> None:
    """Runs the main job and prints what it shows."""
    began = time.monotonic()
    scale = _SCALES[config.preset]
    folder = pathlib.Path(config.output)
    _replace(folder)
    console.rule("1. public text: Shakespeare, no privacy needed")
    _train(
        TrainConfig(
            data="shakespeare",
            output=str(folder / "public"),
            tokenizer="shakespeare",
            held_out=0.05,
            l2_clip_norm=float("inf"),
            noise_multiplier=0.0,
            sampling="shuffled",
            iterations=scale.public[0],
            expected_batch_size=scale.public[1],
            learning_rate=3e-3,
            microbatch_size=8,
            seed=config.seed,
            checkpoint_every=1000,
        )
    )
    start = load_model(folder / "public" / "model")

    console.rule("2. private dialogues with planted secrets")
    planted = _prepare_private_data(folder, start, scale, config.seed)
    shared = TrainConfig(
        data=str(folder / "private-records.jsonl"),
        held_out_data=str(folder / "held-out-records.jsonl"),
        user_field="user",
        sequence_length=_SEQUENCE_LENGTH,
        model=str(folder / "public" / "model"),
        seed=config.seed,
        microbatch_size=8,
    )
    console.rule("3. the same model, fine-tuned without privacy")
    plain_config = dataclasses.replace(
        shared,
        output=str(folder / "plain"),
        l2_clip_norm=float("inf"),
        noise_multiplier=0.0,
        sampling="shuffled",
        iterations=scale.plain[0],
        expected_batch_size=scale.plain[1],
        learning_rate=3e-3,
        checkpoint_every=1000,
    )
    plain = _train(plain_config)
    console.rule(f"4. the same model, fine-tuned at epsilon {config.target_epsilon:g}")
    private_config = dataclasses.replace(
        shared,
        output=str(folder / "private"),
        target_epsilon=config.target_epsilon,
        l2_clip_norm=1.0,
        iterations=scale.private[0],
        expected_batch_size=scale.private[1],
        learning_rate=6e-3,
        intended_use="demonstration",
    )
    private = _train(private_config)

    console.rule("5. side by side")
    extras = _compare(config, start, plain, private, planted)
    write_page(private, extras)
    for table in extras.tables:
        console.print(_rich(table))
    for sample in extras.samples:
        console.print(f"[bold]{sample.model}:[/bold]", escape(sample.text.replace("\n", " / ")))
    console.print(f"\nepsilon {private.epsilon}\n{private.claim}")
    console.print(f"privacy card: {private.run.folder / 'card.json'}")
    console.print(f"report:       {page_path(private.run)}")
    console.print(f"model:        {private.run.folder / 'model'}")
    console.print(f"took {time.monotonic() - began:.0f} s")


def _replace(folder: pathlib.Path) -> None:
    """Clears an earlier demo, and nothing that is not one."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise DpjaxError(f"{folder} is not empty and holds no demo; choose another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()


def _prepare_private_data(
    folder: pathlib.Path, start: Model, scale: _Scale, seed: int
) -> PlantedPII:
    """Splits the dialogues by person, plants secrets among the training ones, writes both."""
    training, held_out = [], []
    for record in chitchat()[: scale.dialogues]:
        person = stable_id(record.user if record.user is not None else record.text)
        (held_out if person % 20 == 0 else training).append(record)
    mixed, planted = plant_pii(training, repetitions=scale.repetitions, seed=seed)
    planted.check_fits(start.tokenizer, _SEQUENCE_LENGTH)
    planted.save(folder / "planted-secrets.json")
    write_jsonl(folder / "private-records.jsonl", mixed)
    write_jsonl(folder / "held-out-records.jsonl", held_out)
    console.print(
        f"{len(training):,} dialogues to train on, {len(held_out):,} held out; "
        f"{len(planted.inserted)} invented secrets planted 1 to {max(scale.repetitions)} times, "
        f"{len(planted.held_out)} twins kept out"
    )
    return planted


def write_jsonl(path: pathlib.Path, records: list[Record]) -> None:
    """Private records as a file that only its owner can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record._asdict(), ensure_ascii=False) + "\n")


def _train(config: TrainConfig) -> Finished:
    run = open_run(config, pathlib.Path(config.output))
    create(run)
    console.print(describe(run))
    with Ledger.open(run.ledger_path) as ledger:
        return finish(run, ledger, drive(run, ledger, run.folder.name))


def _compare(
    config: DemoConfig, start: Model, plain: Finished, private: Finished, planted: PlantedPII
) -> Extras:
    """The three models beside each other, for the terminal and for the report page."""
    models = [
        ("public start", start, private.before),
        ("without privacy", plain.model, plain.after),
        (f"private, epsilon {config.target_epsilon:g}", private.model, private.after),
    ]
    losses = TableData(
        "Held-out loss",
        ("model", "nats per token", "perplexity"),
        tuple(
            (
                name,
                f"{loss.nats_per_token:.3f} ± {1.96 * loss.standard_error:.3f}",
                f"{loss.perplexity:.1f}",
            )
            for name, _, loss in models
        ),
    )
    groups: dict[str, list[PlantedSecret]] = {}
    for secret in planted.inserted:
        groups.setdefault(f"planted {secret.repetitions} x", []).append(secret)
    groups["twins, never planted"] = list(planted.held_out)
    secrets = TableData(
        "Planted secrets completed from their beginning",
        ("model", *groups),
        tuple(
            (name, *(_completed(model, group) for group in groups.values()))
            for name, model, _ in models
        ),
    )
    samples = tuple(
        Sample(name, text, covered=model is not plain.model)
        for name, model, _ in models
        for text in _texts(model)
    )
    curve = plain.training_curve._replace(name="without privacy")
    return Extras((losses, secrets), samples, (curve,))


def _completed(model: Model, secrets: list[PlantedSecret]) -> str:
    done = completes_secrets(model.config, model.params, model.tokenizer, secrets)
    return f"{sum(done)} of {len(done)}"


def _texts(model: Model) -> list[str]:
    prompt = [model.tokenizer.bos_id]
    drawn = generate(
        model.config,
        model.params,
        [prompt] * 2,
        fresh_key(0),
        max_new_tokens=40,
        temperature=0.7,
        top_p=0.9,
        stop_token=model.tokenizer.eos_id,
    )
    return [model.tokenizer.decode(text) for text in drawn]


def _rich(table: TableData) -> Table:
    shown = Table(*table.columns, title=table.title)
    for row in table.rows:
        shown.add_row(*row)
    return shown
