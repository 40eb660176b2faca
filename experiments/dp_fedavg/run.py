"""DP-FedAvg: what a guarantee for whole people costs a language model of their messages.

    python experiments/dp_fedavg/run.py --preset cpu      # what results.json holds
    python experiments/dp_fedavg/run.py --preset smoke    # seconds

Claim, hardware, duration, numbers and the published ones (McMahan et al., 2018): README.md. Clients
are the senders of the chitchat dialogues; the public start is trained on Shakespeare's plays.
"""

import dataclasses
import json
import math
import pathlib
import platform
import sys
import time
from typing import Any, Literal

import jax
import matplotlib
import numpy as np
import optax
import tyro

import dpjax
from dpjax import DPSGD
from dpjax.data import (
    Record,
    Tokenizer,
    byte_tokenizer,
    chitchat,
    dataset_from_records,
    shakespeare,
)
from dpjax.errors import DpjaxError
from dpjax.evaluation import held_out_loss
from dpjax.federated import (
    Clients,
    LocalWork,
    clients_by,
    fed_avg,
    fit,
    init_training,
    private,
    scaled_to_cohort,
)
from dpjax.models import DecoderConfig, init_params, language_model_loss

HERE = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Everything in it is public."""

    preset: Literal["cpu", "smoke"] = "cpu"
    """Sizes and rounds."""
    seeds: tuple[int, ...] = (0,)
    """One run of every arm each."""
    results: str | None = None
    """Where to write the numbers (default: results.json beside this script; smoke: nowhere)."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a preset means."""

    width: int
    sequence_length: int
    messages_per_person: int
    people: int | None  # cut for tests
    pretraining: int  # iterations on public text
    rounds: int
    cohort: int
    epsilons: tuple[float, ...]
    imagined_cohort: int
    imagined_population: int
    every: int  # rounds between evaluations
    client_learning_rate: float = 0.5
    batch_size: int = 8
    l2_clip_norm: float = 0.5


SCALES = {
    "cpu": Scale(64, 48, 32, None, 400, 60, 100, (8.0, 3.0, 1.0), 10_000, 1_000_000, 10),
    "smoke": Scale(16, 12, 4, 60, 2, 2, 20, (8.0,), 1000, 100_000, 1),
}


def main(config: Config) -> dict[str, Any]:
    """Trains every arm; returns what was measured."""
    scale = SCALES[config.preset]
    tokenizer = byte_tokenizer()
    people, held_out = chat(scale, tokenizer)
    shape = DecoderConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        num_layers=1,
        d_model=scale.width,
        num_heads=4,
        num_kv_heads=4,
        d_ff=4 * scale.width,
    )
    start = public_start(shape, scale, tokenizer)
    delta = float(f"{len(people) ** -1.1:.1e}")
    before = held_out_loss(shape, start, held_out)
    found: dict[str, Any] = {
        "experiment": "dp_fedavg",
        "preset": config.preset,
        "hardware": f"{platform.machine()}, {jax.local_devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "scale": dataclasses.asdict(scale),
        "clients": len(people),
        "messages": int(people.sizes.sum()),
        "num_parameters": sum(x.size for x in jax.tree.leaves(start)),
        "delta": delta,
        "public_start": before.nats_per_token,
        "rows": [],
    }
    print(f"{len(people)} people, public start {before.nats_per_token:.4f}", flush=True)
    shared = {
        "l2_clip_norm": scale.l2_clip_norm,
        "sampling_probability": scale.cohort / len(people),
        "iterations": scale.rounds,
        "population": len(people),
        "normalize_by": float(scale.cohort),
    }
    arms: dict[str, DPSGD] = {
        "no clipping, no noise": DPSGD(
            **{**shared, "l2_clip_norm": math.inf}, noise_multiplier=0.0
        ),
        "clipping only": DPSGD(**shared, noise_multiplier=0.0),
    }
    for epsilon in scale.epsilons:
        arms[f"epsilon {epsilon:g}"] = DPSGD(**shared, target_epsilon=epsilon, target_delta=delta)
    simulated = scaled_to_cohort(
        DPSGD(**shared, target_epsilon=scale.epsilons[-1], target_delta=1e-7),
        scale.imagined_cohort,
        scale.imagined_population,
    )
    arms["SIMULATED"] = simulated.actual
    found["simulated"] = simulated.line()
    print(found["simulated"], flush=True)
    for name, mechanism in arms.items():
        for seed in config.seeds[: 1 if config.preset == "smoke" else None]:
            row = train(shape, start, people, held_out, mechanism, scale, seed, delta)
            found["rows"].append({"arm": name, "seed": seed, **row})
            print({k: v for k, v in found["rows"][-1].items() if k != "curve"}, flush=True)
    found = json.loads(json.dumps(found))
    where = config.results
    if where is None and config.preset != "smoke":
        where = str(HERE / "results.json")
    if where is not None:
        pathlib.Path(where).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        draw(found, pathlib.Path(where).parent)
    return found


def chat(scale: Scale, tokenizer: Tokenizer) -> tuple[Clients, Any]:
    """A client for each person who wrote messages, and the messages of others, held out."""
    records = [r for r in chitchat("message") if r.text.strip()]
    data = dataset_from_records(records, tokenizer, scale.sequence_length)
    training, held_out = data.split(0.1, seed=0)
    training = training.bound_contributions(scale.messages_per_person, seed=0)
    if scale.people is not None:
        few = np.isin(training.user_ids, np.unique(training.user_ids)[: scale.people])
        training = training.select(np.flatnonzero(few))
        held_out = held_out.select(np.arange(64))
    else:
        held_out = held_out.bound_contributions(scale.messages_per_person, seed=0)
    return clients_by(training, training.user_ids), held_out


def public_start(shape: DecoderConfig, scale: Scale, tokenizer: Tokenizer) -> Any:
    """The model after some training on public plays."""
    texts = [record.text for record in shakespeare()]
    plays = dataset_from_records([Record(t) for t in texts], tokenizer, scale.sequence_length)
    batch = min(64, len(plays))
    mechanism = DPSGD(
        math.inf, batch / len(plays), scale.pretraining, noise_multiplier=0.0,
        normalize_by=float(batch),
    )  # fmt: skip
    optimizer = optax.adam(3e-3)
    params = init_params(shape, jax.random.key(0))
    state = dpjax.init_state(mechanism, params, optimizer, jax.random.key(1))
    for state, _ in dpjax.fit(state, mechanism, language_model_loss(shape), optimizer, plays):
        pass
    return state.params


def train(
    shape: DecoderConfig,
    start: Any,
    people: Clients,
    held_out: Any,
    mechanism: DPSGD,
    scale: Scale,
    seed: int,
    delta: float,
) -> dict[str, Any]:
    """All rounds of one arm."""
    noise_key, key = jax.random.split(jax.random.key(seed))
    algorithm = fed_avg(
        language_model_loss(shape), optax.sgd(scale.client_learning_rate), uniform_weights=True
    )
    # Also without noise: a public divisor and the clip norm alone, to tell the two costs apart.
    algorithm = private(algorithm, mechanism, noise_key)
    state = init_training(algorithm, start, len(people), key)
    curve, began = [], time.process_time()
    rounds = fit(state, algorithm, mechanism, people, local=LocalWork(batch_size=scale.batch_size))
    for state, info in rounds:
        if int(info.round) % scale.every == 0:
            loss = held_out_loss(shape, state.params, held_out)
            curve.append((int(info.round), loss.nats_per_token))
    return {
        "noise_multiplier": mechanism.noise_multiplier,
        "epsilon_rdp": mechanism.epsilon(delta) if mechanism.is_private else None,
        "epsilon_pld": numerical_epsilon(mechanism, delta),
        "loss": loss.nats_per_token,
        "standard_error": loss.standard_error,
        "curve": curve,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def numerical_epsilon(mechanism: DPSGD, delta: float) -> float | None:
    """By PLD, where it has a sensible grid: not for the little noise of an imagined cohort."""
    if not mechanism.is_private or mechanism.epsilon(delta) > 100:
        return None
    return mechanism.epsilon(delta, "pld")


def draw(found: dict[str, Any], folder: pathlib.Path) -> None:
    """Held-out loss against rounds."""
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "dpjax"
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    names = list(dict.fromkeys(r["arm"] for r in found["rows"]))
    for number, name in enumerate(names):
        runs = [r["curve"] for r in found["rows"] if r["arm"] == name]
        rounds = [0, *(point[0] for point in runs[0])]
        losses = [found["public_start"], *np.mean([[p[1] for p in r] for r in runs], axis=0)]
        style = ("-", "--", "-.", ":")[number % 4]
        axes.plot(rounds, losses, style, linewidth=1.3, label=name)
    axes.set_xlabel("rounds")
    axes.set_ylabel("held-out loss (nats per character)")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "loss.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except DpjaxError as error:
        print(f"dp_fedavg: {error}", file=sys.stderr)
        sys.exit(2)
