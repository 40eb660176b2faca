"""SmolLM2-135M on private chat dialogues: LoRA at epsilon 8 beside LoRA without privacy.

    python experiments/dp_lora_chitchat/run.py --preset cpu      # what results.json holds
    python experiments/dp_lora_chitchat/run.py --preset gpu      # longer records, larger batches
    python experiments/dp_lora_chitchat/run.py --preset smoke    # a random nano model, seconds

Claim, hardware, duration and numbers: README.md. The runs are those of `dpjax train`; this script
only starts two of them and writes results.json.
"""

import dataclasses
import json
import pathlib
import platform
import sys
from typing import Any, Literal

import jax
import tyro

from dpjax.errors import DpjaxError
from dpjax.models import LoRA, count_parameters
from dpjax.runs.commands import finished_run
from dpjax.runs.config import TrainConfig
from dpjax.runs.finish import Finished

HERE = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Everything in it is public."""

    preset: Literal["cpu", "gpu", "smoke"] = "cpu"
    """Model, records and batch sizes."""
    target_epsilon: float = 8.0
    """Nats."""
    target_delta: float = 1e-5
    """Below 1 / number of records."""
    seed: int = 0
    """Fixed, so that the numbers can be checked: the guarantee is for show."""
    output: str = "runs/dp_lora_chitchat"
    """Folder for the two runs."""
    results: str | None = None
    """Where to write the numbers (default: results.json beside this script; smoke: nowhere)."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a preset means."""

    model: str
    sequence_length: int
    private: tuple[int, int]  # iterations, expected batch size
    plain: tuple[int, int]
    microbatch_size: int
    lora: LoRA


SCALES = {
    "cpu": Scale("smollm2", 64, (12, 256), (30, 64), 16, LoRA(16, targets=("query", "value"))),
    "gpu": Scale("smollm2", 128, (200, 1024), (200, 64), 64, LoRA(16, targets=("query", "value"))),
    "smoke": Scale("nano", 32, (2, 64), (2, 16), 16, LoRA(2, targets=("query", "value"))),
}


def main(config: Config) -> dict[str, Any]:
    """Trains both models and returns what was measured."""
    scale = SCALES[config.preset]
    folder = pathlib.Path(config.output)
    shared = TrainConfig(
        data="chitchat",
        model=scale.model,
        tuning="lora",
        lora=scale.lora,
        sequence_length=scale.sequence_length,
        microbatch_size=scale.microbatch_size,
        seed=config.seed,
        checkpoint_every=5,
    )
    plain = dataclasses.replace(
        shared,
        output=str(folder / "plain"),
        noise_multiplier=0.0,
        l2_clip_norm=float("inf"),
        sampling="shuffled",
        iterations=scale.plain[0],
        expected_batch_size=scale.plain[1],
    )
    private = dataclasses.replace(
        shared,
        output=str(folder / "private"),
        target_epsilon=config.target_epsilon,
        target_delta=config.target_delta,
        iterations=scale.private[0],
        expected_batch_size=scale.private[1],
    )
    runs = {name: train(run) for name, run in (("plain", plain), ("private", private))}
    before = runs["plain"][0].before
    found = {
        "experiment": "dp_lora_chitchat",
        "preset": config.preset,
        "hardware": f"{platform.machine()}, {jax.local_devices()[0].device_kind} x "
        f"{jax.local_device_count()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "seed": config.seed,
        "model": scale.model,
        "lora": dataclasses.asdict(scale.lora) | {"targets": list(scale.lora.targets)},
        "sequence_length": scale.sequence_length,
        "pretrained": {"nats_per_token": before.nats_per_token, "perplexity": before.perplexity},
        **{name: measured(done, seconds) for name, (done, seconds) in runs.items()},
    }
    for name in ("pretrained", "plain", "private"):
        print(f"{name:10s} held-out perplexity {found[name]['perplexity']:.2f}")
    where = config.results
    if where is None and config.preset != "smoke":
        where = str(HERE / "results.json")
    if where is not None:
        pathlib.Path(where).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def train(config: TrainConfig) -> tuple[Finished, float]:
    """One run, continued or taken as it is where one is there, and its seconds of training."""
    done = finished_run(config)
    # From the plan to the last loss: right also for a run that was finished by an earlier call.
    begun, ended = (done.run.folder / name for name in ("run.json", "metrics.jsonl"))
    return done, ended.stat().st_mtime - begun.stat().st_mtime


def measured(done: Finished, seconds: float) -> dict[str, Any]:
    """The numbers of one run."""
    mechanism, run = done.run.mechanism, done.run
    private = mechanism.is_private
    return {
        "nats_per_token": done.after.nats_per_token,
        "standard_error": done.after.standard_error,
        "perplexity": done.after.perplexity,
        "held_out_records": done.after.num_records,
        "iterations": mechanism.iterations,
        "expected_batch_size": mechanism.expected_batch_size,
        "noise_multiplier": mechanism.noise_multiplier,
        "epsilon_rdp": mechanism.epsilon(run.delta) if private else None,
        "epsilon_pld": mechanism.epsilon(run.delta, "pld") if private else None,
        "delta": run.delta if private else None,
        "trained_parameters": count_parameters(run.point.trainable),
        "seconds": seconds,
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except DpjaxError as error:
        print(f"dp_lora_chitchat: {error}", file=sys.stderr)
        sys.exit(2)
