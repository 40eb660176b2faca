"""Strong membership inference: LiRA and RMIA against epochs and repeats, many models at once.

    python experiments/strong_mia/run.py --preset cpu      # what results.json holds
    python experiments/strong_mia/run.py --preset gpu      # more models and text
    python experiments/strong_mia/run.py --preset smoke    # seconds

Claim, hardware, duration and numbers: README.md. All reference models of an arm are trained in one
vmapped run, each on its own half of the messages; each in turn is attacked with all the others.
"""

import dataclasses
import functools
import hashlib
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

from dpjax.auditing import (
    auc,
    leave_one_out_targets,
    lira_offline,
    lira_online,
    rmia,
    roc_curve,
    score_shadow_models,
    tpr_at_fpr,
    train_shadow_models,
)
from dpjax.data import Record, byte_tokenizer, chitchat, dataset_from_records
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.models import DecoderConfig, init_params, language_model_loss
from dpjax.report import roc_figure
from dpjax.report.figures import standalone

HERE = pathlib.Path(__file__).resolve().parent
REPEATS = (1, 4, 16)
# One group of messages occurs 4 times, one 16 times: shares of all.
REPEATED_SHARES = {4: 1 / 16, 16: 1 / 32}
ATTACKS = ("loss", "lira_offline", "lira_online", "rmia")


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Everything in it is public."""

    preset: Literal["cpu", "gpu", "smoke"] = "cpu"
    """Models, messages and epochs."""
    seed: int = 0
    """Fixed, so that the numbers can be checked."""
    output: str = "runs/strong_mia"
    """Folder; a run that was stopped goes on there."""
    results: str | None = None
    """Where to write the numbers (default: results.json beside this script; smoke: nowhere)."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a preset means."""

    models: int
    messages: int
    population: int  # messages that no model sees: for RMIA, and for the held-out loss
    epochs: tuple[int, ...]  # of the plain arm, measured along one run
    batch: int
    sequence_length: int
    width: int
    layers: int
    target_epsilon: float  # of the private arm
    timed_iterations: int


SCALES = {
    "cpu": Scale(16, 1024, 512, (1, 2, 4, 8, 16), 64, 48, 64, 2, 8.0, 8),
    "gpu": Scale(64, 16_384, 4096, (1, 2, 4, 8, 16), 128, 96, 64, 2, 8.0, 100),
    "smoke": Scale(6, 256, 16, (1, 2), 16, 16, 16, 1, 8.0, 2),
}


def main(config: Config) -> dict[str, Any]:
    """Trains both arms, attacks every model, times both ways; returns what was measured."""
    scale, folder = SCALES[config.preset], pathlib.Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, key = byte_tokenizer(), jax.random.key(config.seed)
    # What a model sees of it, each once: a text that occurs twice could be on both sides of a half.
    cut = scale.sequence_length - 1
    texts = list(dict.fromkeys(r.text[:cut] for r in chitchat() if len(r.text) >= 16))
    order = np.random.default_rng(config.seed).permutation(len(texts))
    texts = [texts[i] for i in order[: scale.messages + scale.population]]
    if len(texts) < scale.messages + scale.population:
        raise DpjaxError(
            f"the text has {len(texts)} messages of 16 characters, and the preset "
            f"needs {scale.messages + scale.population}; use a smaller one"
        )
    messages, population = (
        dataset_from_records([Record(t) for t in part], tokenizer, scale.sequence_length)
        for part in (texts[: scale.messages], texts[scale.messages :])
    )
    repeats = np.ones(scale.messages, int)
    start = 0
    for times, share in REPEATED_SHARES.items():
        count = round(share * scale.messages)
        repeats[start : start + count] = times
        start += count
    shape = DecoderConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        num_layers=scale.layers,
        d_model=scale.width,
        num_heads=4,
        num_kv_heads=4,
        d_ff=4 * scale.width,
    )
    loss_fn = language_model_loss(shape)
    num_parameters = sum(x.size for x in jax.tree.leaves(init_params(shape, key)))
    # Of one model, on average.
    members = float(repeats.sum()) / 2
    per_epoch = math.ceil(members / scale.batch)
    iterations = per_epoch * max(scale.epochs)

    def settings(**privacy: Any) -> tuple[DPSGD, optax.GradientTransformation]:
        mechanism = DPSGD(
            sampling_probability=scale.batch / members,
            iterations=iterations,
            normalize_by=float(scale.batch),
            **privacy,
        )
        return mechanism, optax.adam(optax.cosine_decay_schedule(3e-3, iterations, 0.1))

    plain, optimizer = settings(
        l2_clip_norm=math.inf, noise_multiplier=0.0, sampling="shuffled", population=round(members)
    )
    private, _ = settings(
        l2_clip_norm=1.0,
        target_epsilon=scale.target_epsilon,
        target_delta=members**-1.1,
        microbatch_size=min(32, scale.batch),
    )
    found: dict[str, Any] = {
        "experiment": "strong_mia",
        "preset": config.preset,
        "hardware": f"{platform.machine()}, {jax.local_devices()[0].device_kind} x "
        f"{jax.local_device_count()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "seed": config.seed,
        "scale": dataclasses.asdict(scale),
        "num_parameters": num_parameters,
        "iterations": iterations,
        "messages_by_repeats": {str(r): int(np.sum(repeats == r)) for r in REPEATS},
        "noise_multiplier": private.noise_multiplier,
    }
    print(
        f"{scale.models} models of {num_parameters:,} parameters, {iterations} iterations of "
        f"{scale.batch} messages",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for arm, mechanism in (("plain", plain), ("private", private)):
        began = time.monotonic()
        # Named after the settings: what others left in the folder is not taken for these.
        name = f"{arm}-{hashlib.sha256(repr((config.seed, scale)).encode()).hexdigest()[:12]}"
        scored = folder / f"{name}.npz"
        if not scored.exists():
            scores = train_and_score(
                config, scale, mechanism, optimizer, shape, loss_fn, messages, population, repeats,
                per_epoch, folder / name,
            )  # fmt: skip
            np.savez(scored, seconds=time.monotonic() - began, **scores)
        kept = dict(np.load(scored))
        found[f"{arm}_seconds"] = round(float(kept["seconds"]), 1)
        for epochs in scale.epochs if arm == "plain" else scale.epochs[-1:]:
            rows += judged(arm, epochs, kept, repeats, curves if epochs == scale.epochs[-1] else {})
    found["rows"] = rows
    found["timing"] = timing(config, scale, plain, optimizer, shape, loss_fn, messages)
    found = json.loads(json.dumps(found))
    where = config.results
    if where is None and config.preset != "smoke":
        where = str(HERE / "results.json")
    if where is not None:
        pathlib.Path(where).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        draw(found, curves, pathlib.Path(where).parent)
    report(found)
    return found


def train_and_score(
    config, scale, mechanism, optimizer, shape, loss_fn, messages, population, repeats, per_epoch,
    checkpoint,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Scores of all messages under all models, after each number of epochs."""
    wanted = {epochs * per_epoch: epochs for epochs in scale.epochs}
    found: dict[str, np.ndarray] = {}
    keep = checkpoint.with_name(checkpoint.name + "-partial.npz")
    if keep.exists():
        found = dict(np.load(keep))

    def look(iteration: int, params: Any) -> None:
        if iteration in wanted:
            epochs = wanted[iteration]
            found[f"messages_{epochs}"] = score_shadow_models(loss_fn, params, messages)
            found[f"population_{epochs}"] = score_shadow_models(loss_fn, params, population)
            np.savez(keep, **found)

    shadow = train_shadow_models(
        mechanism,
        functools.partial(init_params, shape),
        loss_fn,
        optimizer,
        messages,
        num_models=scale.models,
        key=jax.random.key(config.seed),
        repeats=repeats,
        iterations_per_chunk=per_epoch,
        checkpoint=checkpoint,
        on_chunk=look,
        progress=True,
    )
    return found | {"included": shadow.included}


def judged(arm, epochs, kept, repeats, curves) -> list[dict[str, Any]]:
    """Every attack on every model in turn: means over targets, and their spread."""
    messages, population = kept[f"messages_{epochs}"], kept[f"population_{epochs}"]
    included = kept["included"]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in ATTACKS}
    inside = []
    for k, target in enumerate(leave_one_out_targets(messages, included)):
        known = target.scores, target.shadow_scores, target.included
        scores["loss"].append(target.scores)
        scores["lira_offline"].append(lira_offline(*known))
        scores["lira_online"].append(lira_online(*known))
        scores["rmia"].append(rmia(*known, population[k], population[target.shadow]))
        inside.append(target.is_member)
    rows = []
    for name in ATTACKS:
        for times in (*REPEATS, "all"):
            chosen = np.ones(len(repeats), bool) if times == "all" else repeats == times
            values = [
                auc(s[chosen & m], s[chosen & ~m]).value
                for s, m in zip(scores[name], inside, strict=True)
            ]
            row = {
                "arm": arm, "epochs": epochs, "attack": name, "repeats": times,
                "auc": float(np.mean(values)), "auc_stddev": float(np.std(values, ddof=1)),
            }  # fmt: skip
            if times in (1, "all"):
                # Scores of all targets together resolve lower false-positive rates.
                pooled = (
                    np.concatenate([s[chosen & (m == side)] for s, m in
                                    zip(scores[name], inside, strict=True)])
                    for side in (True, False)
                )  # fmt: skip
                members, others = pooled
                row["tpr_at_1_percent_fpr"] = tpr_at_fpr(members, others, 0.01).rate.value
                row["tpr_at_0.1_percent_fpr"] = tpr_at_fpr(members, others, 0.001).rate.value
                if times == 1:
                    label = f"{name}, {'epsilon 8' if arm == 'private' else 'no privacy'}"
                    if arm == "plain" or name == "lira_online":
                        curve = roc_curve(members, others)
                        curves[label] = (curve.false_positive_rates, curve.true_positive_rates)
            rows.append(row)
    gap = np.mean(population) - np.mean(messages[included])
    rows[0] |= {
        "held_out_loss": float(-np.mean(population)),
        "generalisation_gap": float(-gap),
    }
    return rows


def timing(config, scale, mechanism, optimizer, shape, loss_fn, messages) -> dict[str, Any]:
    """Seconds of the same iterations of all models: at once, and one after another."""
    short = dataclasses.replace(mechanism, iterations=scale.timed_iterations)
    first = functools.partial(init_params, shape)  # one object: compiled once

    def seconds(models_at_once: int | None) -> float:
        began = time.perf_counter()
        found = train_shadow_models(
            short, first, loss_fn, optimizer, messages,
            num_models=scale.models, key=jax.random.key(1), models_at_once=models_at_once,
        )  # fmt: skip
        jax.block_until_ready(found.params)
        return time.perf_counter() - began

    # A Python loop would compile once too; what differs is one model's step at a time.
    ways = {"vmapped": None, "one after another": 1}
    for at_once in ways.values():
        seconds(at_once)  # compiles
    pairs = [{name: seconds(at_once) for name, at_once in ways.items()} for _ in range(5)]
    ratios = sorted(p["one after another"] / p["vmapped"] for p in pairs)
    medians = {name: float(np.median([p[name] for p in pairs])) for name in ways}
    return {
        "iterations": scale.timed_iterations,
        "seconds": medians,
        "speed_up": ratios[len(ratios) // 2],
        "speed_up_range": [ratios[0], ratios[-1]],
    }


def draw(found: dict[str, Any], curves: dict[str, Any], folder: pathlib.Path) -> None:
    """The ROC on log axes, and AUC against epochs."""
    (folder / "roc.svg").write_text(standalone(roc_figure(curves)), encoding="utf-8")
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "dpjax"
    figure, panels = plt.subplots(1, len(REPEATS), figsize=(10, 3.4), sharey=True)
    marks = {"loss": "o", "lira_offline": "s", "lira_online": "^", "rmia": "D"}
    for axes, times in zip(panels, REPEATS, strict=True):
        for attack in ATTACKS:
            chosen = [r for r in found["rows"] if r["attack"] == attack and r["repeats"] == times]
            plain = [r for r in chosen if r["arm"] == "plain"]
            line = axes.errorbar(
                [r["epochs"] for r in plain],
                [r["auc"] for r in plain],
                [r["auc_stddev"] for r in plain],
                marker=marks[attack], markersize=4, capsize=2, label=attack,
            )  # fmt: skip
            private = [r for r in chosen if r["arm"] == "private"]
            axes.plot(
                [r["epochs"] * 1.25 for r in private], [r["auc"] for r in private],
                marks[attack], color=line[0].get_color(), fillstyle="none",
            )  # fmt: skip
        axes.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":")
        axes.axhline(0.7, color="0.6", linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(found["scale"]["epochs"], [str(e) for e in found["scale"]["epochs"]])
        axes.set_title(f"seen {times} time{'s' if times > 1 else ''} an epoch", fontsize=10)
        axes.set_xlabel("epochs (hollow: epsilon 8)")
    panels[0].set_ylabel("AUC")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "auc.svg", metadata={"Date": None})
    plt.close(figure)


def report(found: dict[str, Any]) -> None:
    """The main numbers."""
    for row in found["rows"]:
        if row["repeats"] in (1, "all") and row["attack"] in ("loss", "lira_online"):
            print(
                f"{row['arm']}, {row['epochs']} epochs, {row['attack']}, repeats {row['repeats']}: "
                f"AUC {row['auc']:.3f} ± {row['auc_stddev']:.3f}, TPR at 1% FPR "
                f"{row['tpr_at_1_percent_fpr']:.3f}"
            )
    timing = found["timing"]
    print(
        f"{timing['iterations']} iterations: vmapped {timing['seconds']['vmapped']:.2f} s, one "
        f"after another {timing['seconds']['one after another']:.2f} s: {timing['speed_up']:.2f} "
        f"times ({timing['speed_up_range'][0]:.2f} to {timing['speed_up_range'][1]:.2f})"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except DpjaxError as error:
        print(f"strong_mia: {error}", file=sys.stderr)
        sys.exit(2)
