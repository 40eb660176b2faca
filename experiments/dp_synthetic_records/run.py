"""Synthetic medical notes at epsilon 8: a classifier trained on them, and the secrets in them.

    python experiments/dp_synthetic_records/run.py --preset cpu      # what results.json holds
    python experiments/dp_synthetic_records/run.py --preset gpu      # SmolLM2-135M with LoRA
    python experiments/dp_synthetic_records/run.py --preset smoke    # seconds

Claim, hardware, duration and numbers: README.md. Three runs: public pretraining on invented records
of two other domains, then fine-tuning on labelled medical notes with and without privacy. Training
and sampling are those of `dpjax synthesize`. The small preset's public text also has a textbook of
the specialties (what each label is about, no people), as any pretrained model has read one; what
that alone gives is the arm "public".
"""

import dataclasses
import json
import pathlib
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro

from dpjax.artifact import load_model, save_model
from dpjax.data import (
    DOMAIN_LABELS,
    DomainRecord,
    Record,
    domain_records,
    label_phrases,
    plant_pii,
    train_bpe,
)
from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig, LoRA, Model, init_params
from dpjax.quality import count_secrets, downstream_accuracy
from dpjax.runs.commands import finished_run
from dpjax.runs.config import TrainConfig
from dpjax.runs.synthesize import SynthesizeConfig, sample_records, synthesize

HERE = pathlib.Path(__file__).resolve().parent
LABELS = DOMAIN_LABELS["medical"]
PUBLIC_DOMAINS = ("financial", "support")
# A small model learns to heed a control code faster when it is a larger share of what it sees.
PROMPT = "{label} {label} {label} {label} {label} {label}: "
# Dates of birth and names come from small sets: a sample may hold one by chance.
HIGH_ENTROPY = ("phone", "mrn", "id_number", "email", "address")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Everything in it is public."""

    preset: Literal["cpu", "gpu", "smoke"] = "cpu"
    """Model, records and batch sizes."""
    target_epsilon: float = 8.0
    """Nats; delta is n^-1.1."""
    seed: int = 0
    """Fixed, so that the numbers can be checked: the guarantee is for show."""
    output: str = "runs/dp_synthetic_records"
    """Folder for records and runs; finished runs in it are used as they are."""
    results: str | None = None
    """Where to write the numbers (default: results.json beside this script; smoke: nowhere)."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a preset means."""

    model: str | None  # None: a small decoder with public pretraining
    records: int
    held_out: int
    samples: int
    public: tuple[int, int]  # iterations, expected batch size
    plain: tuple[int, int]
    private: tuple[int, int]
    planted: dict[int, int]  # times planted -> secrets
    sequence_length: int
    microbatch_size: int
    learning_rate: float | None = None


SCALES = {
    "cpu": Scale(
        None, 120_000, 2_000, 1_000, (800, 64), (400, 64), (240, 512), {16: 8, 64: 8}, 120, 32, 4e-3
    ),
    "gpu": Scale(
        "smollm2", 20_000, 2_000, 1_000, (0, 0), (300, 64), (300, 1024), {16: 8, 64: 8}, 144, 64
    ),
    "smoke": Scale(None, 300, 60, 20, (2, 16), (2, 16), (2, 64), {4: 2}, 48, 16, 3e-3),
}


def main(config: Config) -> dict[str, Any]:
    """Trains, samples and counts; returns what was measured."""
    scale, folder = SCALES[config.preset], pathlib.Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    notes = domain_records("medical", scale.records, seed=config.seed)
    unseen = domain_records("medical", scale.held_out, seed=config.seed + 1)
    records = [Record(r.text, r.user, r.label) for r in notes]
    mixed, planted = plant_pii(
        records, repetitions=scale.planted, seed=config.seed, locales=["en_US"]
    )
    # A planted secret has no label of its own; it takes one in turn.
    mixed = [
        r if r.label is not None else r._replace(label=LABELS[i % len(LABELS)])
        for i, r in enumerate(mixed)
    ]
    write(folder / "private.jsonl", mixed)
    write(folder / "held-out.jsonl", [Record(r.text, r.user, r.label) for r in unseen])
    start = scale.model or pretrained(config, scale, folder)
    shared = TrainConfig(
        data=str(folder / "private.jsonl"),
        held_out_data=str(folder / "held-out.jsonl"),
        user_field="user",
        label_field="label",
        labels=LABELS,
        prompt=PROMPT,
        model=start,
        lora=LoRA(16),
        sequence_length=scale.sequence_length,
        microbatch_size=scale.microbatch_size,
        learning_rate=scale.learning_rate,
        seed=config.seed,
    )
    runs = {
        "plain": dataclasses.replace(
            shared,
            noise_multiplier=0.0,
            l2_clip_norm=float("inf"),
            sampling="shuffled",
            iterations=scale.plain[0],
            expected_batch_size=scale.plain[1],
        ),
        "private": dataclasses.replace(
            shared,
            target_epsilon=config.target_epsilon,
            iterations=scale.private[0],
            expected_batch_size=scale.private[1],
        ),
    }
    found: dict[str, Any] = {
        "experiment": "dp_synthetic_records",
        "preset": config.preset,
        "hardware": f"{platform.machine()}, {jax.local_devices()[0].device_kind} x "
        f"{jax.local_device_count()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "seed": config.seed,
        "records": len(mixed),
        "real": real_accuracy(notes, unseen, scale.samples),
    }
    secrets = {
        "planted": [s.secret for s in planted.inserted if s.kind != "name"],
        "never_planted": [s.secret for s in planted.held_out if s.kind != "name"],
        "of_the_people": personal(notes),
        "of_other_people": personal(unseen),
    }
    if scale.model is None:
        config_public = SynthesizeConfig(shared, num_samples=scale.samples)
        drawn = sample_records(config_public, load_model(start), jax.random.key(config.seed))
        found["public"] = {
            "epsilon": 0.0,
            "accuracy": downstream_accuracy(
                [r.text for r in drawn.records],
                [str(r.label) for r in drawn.records],
                [r.text for r in unseen],
                [r.label for r in unseen],
            ).accuracy,
        }
    for name, train in runs.items():
        train = dataclasses.replace(train, output=str(folder / name))
        result = synthesize(SynthesizeConfig(train, num_samples=scale.samples))
        texts = read_texts(folder / name / "synthetic.jsonl")
        found[name] = {
            "epsilon": config.target_epsilon if name == "private" else None,
            "drawn": result["drawn"],
            "quality": result["quality"],
            "secrets": {
                kind: count_secrets(texts, values)._asdict() | {"sensitive_found": None}
                for kind, values in secrets.items()
            },
        }
    report(found)
    where = config.results
    if where is None and config.preset != "smoke":
        where = str(HERE / "results.json")
    if where is not None:
        pathlib.Path(where).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def pretrained(config: Config, scale: Scale, folder: pathlib.Path) -> str:
    """A small decoder and its tokenizer, from labelled records of two other domains: public text.

    What carries over is how a label at the beginning decides what a record is about.
    """
    public = [
        Record(r.text, None, r.label)
        for domain in PUBLIC_DOMAINS
        for r in domain_records(domain, max(200, scale.records // 8), seed=config.seed + 2)
    ]
    public += textbook(max(200, scale.records // 6), seed=config.seed + 3)
    # All labels are public; each becomes one token.
    labels = [label for domain in DOMAIN_LABELS for label in DOMAIN_LABELS[domain]]
    texts = [r.text for r in public] + [f" {label}" for label in labels] * len(public)
    tokenizer = train_bpe(texts, 2048, tokenizer_corpus="public")
    shape = DecoderConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        num_layers=4,
        d_model=64,
        num_heads=4,
        num_kv_heads=4,
        d_ff=256,
    )
    start = Model(shape, init_params(shape, jax.random.key(config.seed)), tokenizer)
    save_model(folder / "untrained", start)
    write(folder / "public.jsonl", public)
    done = finished_run(
        TrainConfig(
            data=str(folder / "public.jsonl"),
            output=str(folder / "public"),
            label_field="label",
            prompt=PROMPT,
            labels=tuple(labels),
            model=str(folder / "untrained"),
            tuning="full",
            noise_multiplier=0.0,
            l2_clip_norm=float("inf"),
            sampling="shuffled",
            iterations=scale.public[0],
            expected_batch_size=scale.public[1],
            sequence_length=scale.sequence_length,
            microbatch_size=scale.microbatch_size,
            learning_rate=4e-3,
            seed=config.seed,
        )
    )
    print(f"public pretraining: held-out loss {done.after.nats_per_token:.3f} nats per token")
    return str(folder / "public" / "model")


def textbook(passages: int, seed: int) -> list[Record]:
    """What each specialty is about, in sentences that no note has, without people."""
    rng = np.random.default_rng(seed)
    phrases = label_phrases("medical")
    sentences = (
        ("sign", "A patient may tell of {} or of {}."),
        ("sign", "Typical are {} and {}."),
        ("finding", "The physician looks for {} and for {}."),
        ("finding", "Tests can reveal {}, later {}."),
        ("act", "It is usual to {} or to {}."),
        ("act", "If that fails, {} and {}."),
        ("history", "It is seen after {} and after {}."),
    )
    found = []
    for i in range(passages):
        label = LABELS[i % len(LABELS)]
        parts = []
        for k in rng.permutation(len(sentences))[:5]:
            slot, sentence = sentences[k]
            chosen = rng.choice(phrases[label][slot], 2, replace=False)
            parts.append(sentence.format(*chosen))
        text = re.sub(
            r"\{(\d+)-(\d+)(?:/\d+)?\}",
            lambda m: str(rng.integers(int(m[1]), int(m[2]) + 1)),
            " ".join(parts),
        )
        found.append(Record(text, None, label))
    return found


def real_accuracy(
    notes: Sequence[DomainRecord], unseen: Sequence[DomainRecord], samples: int
) -> dict[str, Any]:
    """The classifier trained on as many real records as there are synthetic ones, and on all."""
    test = [r.text for r in unseen], [r.label for r in unseen]
    return {
        name: downstream_accuracy([r.text for r in part], [r.label for r in part], *test)._asdict()
        for name, part in (("as many as synthetic", notes[:samples]), ("all", notes))
    }


def personal(records: Sequence[DomainRecord]) -> list[str]:
    """Values of the marked spans that a text holds only if it was copied."""
    return sorted(
        {s.value for r in records for s in r.spans if s.kind in HIGH_ENTROPY and len(s.value) > 5}
    )


def write(path: pathlib.Path, records: Sequence[Record]) -> None:
    """Records as jsonl, the same bytes for the same records."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record._asdict(), ensure_ascii=False) + "\n")


def read_texts(path: pathlib.Path) -> list[str]:
    """Texts of a jsonl file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def report(found: dict[str, Any]) -> None:
    """The main numbers."""
    real = found["real"]
    print(
        f"classifier on real records: {real['as many as synthetic']['accuracy']:.3f} (as many), "
        f"{real['all']['accuracy']:.3f} (all)"
    )
    if "public" in found:
        print(f"public text alone: classifier on its samples {found['public']['accuracy']:.3f}")
    for name in ("plain", "private"):
        accuracy = found[name]["quality"]["downstream"]["trained on synthetic"]["accuracy"]
        counts = {
            kind: f"{value['num_secrets_found']} of {value['num_secrets']}"
            for kind, value in found[name]["secrets"].items()
        }
        print(f"{name}: classifier on synthetic records {accuracy:.3f}; secrets found {counts}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except DpjaxError as error:
        print(f"dp_synthetic_records: {error}", file=sys.stderr)
        sys.exit(2)
