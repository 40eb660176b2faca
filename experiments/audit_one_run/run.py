"""Theoretical against audited epsilon from one training run, and new-token against random canaries.

    python experiments/audit_one_run/run.py --preset cpu      # what results.json holds
    python experiments/audit_one_run/run.py --preset gpu      # more canaries, more seeds
    python experiments/audit_one_run/run.py --preset smoke    # seconds

Claim, hardware, duration and numbers: README.md. Every canary is put in by a fair coin; an attacker
guesses the coins. White-box: canaries are gradients in one coordinate each, and the attacker sees
the model after every iteration (view A). Black-box: canaries are records, and the attacker sees the
final weights (view W).
"""

import dataclasses
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from dpjax.auditing.bounds import audit_coins
from dpjax.auditing.canaries import (
    CanarySet,
    canary_losses,
    extend_vocabulary,
    new_token_canaries,
    random_token_canaries,
)
from dpjax.auditing.gradient_canaries import (
    CanaryRows,
    canary_scores,
    dirac_directions,
    with_gradient_canaries,
)
from dpjax.auditing.insertion import fair_coins, insert
from dpjax.data import (
    ArrayDataset,
    Dataset,
    byte_tokenizer,
    chitchat,
    dataset_from_records,
    load_digits,
    load_fashion_mnist,
)
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.models import DecoderConfig, init_params, language_model_loss
from dpjax.training import fit, init_state
from dpjax.types import LossFn, PyTree, TrainingData

HERE = pathlib.Path(__file__).resolve().parent
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0, None)
DELTA = 1e-5
GUESS_FRACTION = 0.2  # fixed before any score was seen


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Everything in it is public."""

    preset: Literal["cpu", "gpu", "smoke"] = "cpu"
    """Data, models and numbers of canaries."""
    images: Literal["fashion_mnist", "digits"] = "fashion_mnist"
    """digits: scikit-learn's, where the Fashion-MNIST files are absent."""
    output: str = "runs/audit_one_run"
    """Folder; finished parts in it are used as they are."""
    results: str | None = None
    """Where to write the numbers (default: results.json beside this script; smoke: nowhere)."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a preset means."""

    canaries: int
    records: int
    iterations: int
    batch: int
    epsilons: tuple[float | None, ...]  # None: without privacy
    seeds: tuple[int, ...]
    pretraining: int  # iterations on public-like text, before the audited run


SCALES = {
    "cpu": Scale(1000, 2000, 40, 500, EPSILONS, (0,), 200),
    "gpu": Scale(4000, 8000, 300, 2000, EPSILONS, (0, 1, 2), 2000),
    "smoke": Scale(20, 40, 2, 16, (8.0,), (0,), 2),
}


def main(config: Config) -> dict[str, Any]:
    """Audits every task at every epsilon; returns what was measured."""
    scale, folder = SCALES[config.preset], pathlib.Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, Callable[[Scale, float | None, int], dict[str, Any]]] = {
        "images, white-box": lambda *a: image_audit(config, "white-box", *a),
        "images, black-box": lambda *a: image_audit(config, "black-box", *a),
        "text, white-box": lambda *a: text_audit("white-box", *a),
        "text, black-box, random tokens": lambda *a: text_audit("random", *a),
        "text, black-box, new tokens": lambda *a: text_audit("new", *a),
    }
    rows = []
    for name, task in tasks.items():
        for epsilon in scale.epsilons:
            for seed in scale.seeds:
                part = name.replace(",", "").replace(" ", "_")
                where = folder / f"{part}_{epsilon}_{seed}.json"
                if not where.exists():
                    began = time.monotonic()
                    found = task(scale, epsilon, seed) | {"seconds": time.monotonic() - began}
                    where.write_text(json.dumps(found), encoding="utf-8")
                row = {"task": name, "epsilon": epsilon, "seed": seed}
                row |= json.loads(where.read_text(encoding="utf-8"))
                rows.append(row)
                print(line(row), flush=True)
    results = {
        "experiment": "audit_one_run",
        "preset": config.preset,
        "hardware": f"{platform.machine()}, {jax.local_devices()[0].device_kind} x "
        f"{jax.local_device_count()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "delta": DELTA,
        "guess_fraction": GUESS_FRACTION,
        "images": config.images,
        "scale": {k: v for k, v in dataclasses.asdict(scale).items() if k != "epsilons"},
        "rows": rows,
    }
    results = json.loads(json.dumps(results))
    where = config.results
    if where is None and config.preset != "smoke":
        where = str(HERE / "results.json")
    if where is not None:
        pathlib.Path(where).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        figure(results, pathlib.Path(where).with_name("audited.svg"))
    return results


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    bounds = ", ".join(
        f"{b['method']} {b['epsilon_lower']:.2f} (of {b['ceiling']:.1f})" for b in row["bounds"]
    )
    stated = "no privacy" if row["epsilon"] is None else f"epsilon {row['epsilon']:g}"
    return (
        f"{row['task']}, {stated}, seed {row['seed']}: {bounds}; TPR at 1% FPR "
        f"{row['tpr_at_1_percent_fpr']:.3f} ({row['seconds']:.0f} s)"
    )


def judged(scores: np.ndarray, included: np.ndarray) -> dict[str, Any]:
    """Bounds, and the attack's true-positive rate at 1% false positives."""
    bounds = audit_coins(scores, included, delta=DELTA, guess_fraction=GUESS_FRACTION)
    threshold = np.quantile(scores[~included], 0.99, method="higher")
    return {
        "bounds": [
            {"method": b.method, "epsilon_lower": b.epsilon_lower, "ceiling": b.ceiling}
            for b in bounds
        ],
        "tpr_at_1_percent_fpr": float(np.mean(scores[included] > threshold)),
        "included": int(included.sum()),
    }


def mechanism_for(scale: Scale, epsilon: float | None, units: float, population: int) -> DPSGD:
    """DP-SGD at (epsilon, DELTA); without epsilon, without noise and clipping."""
    private = epsilon is not None
    return DPSGD(
        l2_clip_norm=1.0 if private else float("inf"),
        sampling_probability=scale.batch / units,
        iterations=scale.iterations,
        noise_multiplier=None if private else 0.0,
        target_epsilon=epsilon,
        target_delta=DELTA if private else None,
        population=population,
        normalize_by=float(scale.batch),
        microbatch_size=min(100, scale.batch),
        accountant="pld",
    )


def trained(
    mechanism: DPSGD,
    loss_fn: LossFn,
    params: PyTree,
    data: TrainingData,
    optimizer: optax.GradientTransformation,
    seed: int,
    watch: Callable[[PyTree, PyTree], None] | None = None,
) -> PyTree:
    """The final parameters; ``watch`` sees those before and after every iteration."""
    state = init_state(mechanism, params, optimizer, jax.random.key(seed + 1000))
    before = params
    for state, _ in fit(state, mechanism, loss_fn, optimizer, data):
        if watch is not None:
            watch(before, state.params)
        before = state.params
    return before


def white_box(
    scale: Scale,
    epsilon: float | None,
    seed: int,
    loss_fn: LossFn,
    params: PyTree,
    data: TrainingData,
) -> dict[str, Any]:
    """Dirac canaries; the score is the sum over iterations of their own coordinate's update."""
    key = jax.random.key(seed)
    included = fair_coins(scale.canaries, jax.random.fold_in(key, 1))
    directions = dirac_directions(params, scale.canaries, jax.random.fold_in(key, 2))
    # Without clipping a canary weighs what its gradient does: as much as a clipped one.
    mixed = with_gradient_canaries(loss_fn, directions, 1.0 if epsilon is None else 100.0)
    rows = CanaryRows(data, included)
    mechanism = mechanism_for(scale, epsilon, len(data) + scale.canaries / 2, len(rows))
    scores = np.zeros(scale.canaries)

    def watch(before: PyTree, after: PyTree) -> None:
        nonlocal scores
        scores = scores + canary_scores(jax.tree.map(jnp.subtract, before, after), directions)

    trained(mechanism, mixed, params, rows, optax.sgd(0.1), seed, watch)
    return judged(scores, included)


def image_audit(
    config: Config, view: str, scale: Scale, epsilon: float | None, seed: int
) -> dict[str, Any]:
    """A small network on images; black-box canaries are images with random labels."""
    images, labels = (load_digits() if config.images == "digits" else load_fashion_mnist())[0]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))[: scale.records + scale.canaries]
    order = rng.choice(order, scale.records + scale.canaries) if len(order) < (
        scale.records + scale.canaries
    ) else order  # fmt: skip
    pixels = images[order].reshape(len(order), -1).astype(np.float32)
    wanted = labels[order].astype(np.int32)
    drawn = jax.random.normal(jax.random.key(seed), (pixels.shape[1], 64))
    params = {
        "hidden": drawn / pixels.shape[1] ** 0.5,
        "bias": jnp.zeros(64),
        "head": jnp.zeros((64, 10)),
    }

    def loss_fn(params, example):
        hidden = jnp.tanh(example["x"] @ params["hidden"] + params["bias"])
        return -jax.nn.log_softmax(hidden @ params["head"])[example["y"]]

    n = scale.records
    if view == "white-box":
        data = ArrayDataset({"x": pixels[:n], "y": wanted[:n]})
        return white_box(scale, epsilon, seed, loss_fn, params, data)
    included = fair_coins(scale.canaries, jax.random.fold_in(jax.random.key(seed), 1))
    wrong = rng.integers(0, 10, scale.canaries).astype(np.int32)
    canaries = {"x": pixels[n:], "y": wrong}
    rows = {
        "x": np.concatenate([pixels[:n], canaries["x"][included]]),
        "y": np.concatenate([wanted[:n], wrong[included]]),
    }
    data = ArrayDataset(rows)
    mechanism = mechanism_for(scale, epsilon, n + scale.canaries / 2, len(data))
    final = trained(mechanism, loss_fn, params, data, optax.adam(5e-3), seed)
    losses = jax.jit(jax.vmap(loss_fn, (None, 0)))
    scores = losses(params, canaries) - losses(final, canaries)
    return judged(np.asarray(scores, np.float64), included)


def text_audit(kind: str, scale: Scale, epsilon: float | None, seed: int) -> dict[str, Any]:
    """A small decoder, pretrained on other dialogues; black-box canaries are records of text."""
    tokenizer, length = byte_tokenizer(), 32
    data = dataset_from_records(chitchat(), tokenizer, length, name="chitchat")
    public, private = data.split(0.3, seed=0)
    rng = np.random.default_rng(seed)
    private = private.select(rng.permutation(len(private))[: scale.records])
    shape = DecoderConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        num_layers=2,
        d_model=32,
        num_heads=2,
        num_kv_heads=2,
        d_ff=64,
    )
    params = init_params(shape, jax.random.key(seed))
    plain = dataclasses.replace(scale, iterations=scale.pretraining, batch=min(64, len(public)))
    params = trained(
        mechanism_for(plain, None, len(public), len(public)),
        language_model_loss(shape),
        params,
        public,
        optax.adam(3e-3),
        seed,
    )
    if kind == "white-box":
        return white_box(scale, epsilon, seed, language_model_loss(shape), params, private)
    included = fair_coins(scale.canaries, jax.random.fold_in(jax.random.key(seed), 1))
    canaries: CanarySet
    if kind == "random":
        canaries = random_token_canaries(
            scale.canaries, tokenizer, length - 1, seed=seed, num_held_out=0
        )
    else:
        shape, params = extend_vocabulary(
            shape, params, scale.canaries, jax.random.fold_in(jax.random.key(seed), 3)
        )
        full = np.flatnonzero(public.loss_mask[:, : length - 1].all(axis=1))
        prefixes = public.tokens[rng.choice(full, scale.canaries), : length - 1]
        ids = np.arange(tokenizer.vocabulary_size, shape.vocabulary_size)
        canaries = new_token_canaries(prefixes, ids, scale.canaries, seed=seed)
    mixed = insert(private, canaries, included, seed=seed)
    assert isinstance(mixed, Dataset)
    mechanism = mechanism_for(scale, epsilon, len(private) + scale.canaries / 2, len(mixed))
    final = trained(mechanism, language_model_loss(shape), params, mixed, optax.adam(5e-3), seed)
    before, after = (canary_losses(shape, p, canaries, "in") for p in (params, final))
    return judged(before - after, included)


def figure(results: dict[str, Any], path: pathlib.Path) -> None:
    """Audited against theoretical epsilon, one panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in results["rows"]))
    with plt.rc_context({"svg.fonttype": "none", "font.size": 9}):
        drawn, axes = plt.subplots(
            1, len(tasks), figsize=(3 * len(tasks), 3.2), sharey=True, layout="constrained"
        )
        for axis, task in zip(np.atleast_1d(axes), tasks, strict=True):
            rows = [r for r in results["rows"] if r["task"] == task and r["epsilon"] is not None]
            epsilons = sorted({r["epsilon"] for r in rows})
            axis.plot(epsilons, epsilons, color="0.6", linestyle="--", label="theory")
            for method in ("one_run", "one_run_fdp_gaussian", "gaussian_dp"):
                means, ceilings = [], []
                for epsilon in epsilons:
                    found = [
                        b
                        for r in rows
                        if r["epsilon"] == epsilon
                        for b in r["bounds"]
                        if b["method"] == method
                    ]
                    means.append(float(np.mean([b["epsilon_lower"] for b in found])))
                    ceilings.append(float(np.mean([b["ceiling"] for b in found])))
                (shown,) = axis.plot(epsilons, means, marker="o", label=method.replace("_", " "))
                axis.plot(epsilons, ceilings, color=shown.get_color(), linestyle=":", linewidth=1)
            axis.set_title(task, fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
            axis.set_xlabel("theoretical epsilon")
            axis.set_ylim(0, 17)
        np.atleast_1d(axes)[0].set_ylabel("audited epsilon (dotted: ceiling)")
        np.atleast_1d(axes)[0].legend(frameon=False, loc="upper left")
        drawn.savefig(path, metadata={"Date": None})
        plt.close(drawn)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except DpjaxError as error:
        print(f"audit_one_run: {error}", file=sys.stderr)
        sys.exit(2)
