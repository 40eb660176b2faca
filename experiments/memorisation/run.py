"""Exposure of canaries by how often they were repeated: without privacy and at epsilon 1, 3, 8.

    python experiments/memorisation/run.py --preset cpu      # what results.json holds
    python experiments/memorisation/run.py --preset gpu      # the nano model, all dialogues
    python experiments/memorisation/run.py --preset smoke    # seconds, to see that it runs
    python experiments/memorisation/run.py --control         # epsilon 8 with and without singles

Claim, hardware, duration and numbers: README.md. Every finished model leaves one file in
``--output``; a run that was interrupted goes on with the next model.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import platform
import sys
import time
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from scipy import stats

from dpjax import DPSGD, fit, init_state
from dpjax.auditing.canaries import CanarySet, canary_losses, random_token_canaries
from dpjax.auditing.exposure import (
    Exposure,
    exposure_by_sampling,
    exposure_by_skew_normal,
    unseen_exposure,
)
from dpjax.auditing.insertion import insert
from dpjax.data import Dataset, byte_tokenizer, chitchat, dataset_from_records
from dpjax.errors import DpjaxError
from dpjax.evaluation import held_out_loss
from dpjax.models import (
    DecoderConfig,
    count_parameters,
    decoder_config,
    init_params,
    language_model_loss,
)

HERE = pathlib.Path(__file__).resolve().parent
SECRET_TOKENS = 6
PREFIX = "my code is "
HELD_OUT = 500


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Everything in it is public."""

    preset: Literal["cpu", "gpu", "smoke"] = "cpu"
    """Model, records, batch and iterations."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Canaries, initial weights, batches and noise. Fixed, so that the numbers can be checked:
    the guarantee is for show."""
    target_epsilons: tuple[float, ...] = (8.0, 3.0, 1.0)
    """Nats, at delta = records^-1.1; beside a model without privacy."""
    output: str = "runs/memorisation"
    """Folder for what each model showed."""
    results: str | None = None
    """Folder for results.json and the figure (default: beside this script; smoke: nowhere)."""
    control: bool = False
    """Instead of all arms: the first target epsilon twice, with and without the canaries that are
    inserted once, which tells their memorisation from the luck of their draw."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a preset means."""

    model: str  # "nano", "micro" (two layers of width 64) or "tiny"
    messages: int
    sequence_length: int
    canaries: dict[int, int]  # times repeated -> how many canaries
    twins: int
    iterations: int
    batch: int
    microbatch_size: int


SCALES = {
    "cpu": Scale("micro", 6000, 48, {1: 64, 4: 32, 16: 16, 64: 16}, 4000, 450, 256, 16),
    "gpu": Scale("nano", 50_000, 64, {1: 256, 4: 64, 16: 32, 64: 32}, 10_000, 3000, 1024, 256),
    "smoke": Scale("tiny", 200, 24, {1: 16, 4: 16}, 1000, 3, 32, 64),
}


def main(config: Config) -> dict[str, Any]:
    """Trains all models that are not there yet and returns what was measured."""
    scale = SCALES[config.preset]
    folder = pathlib.Path(config.output) / config.preset
    folder.mkdir(parents=True, exist_ok=True)
    described = dataclasses.asdict(scale)
    described["canaries"] = {str(times): number for times, number in scale.canaries.items()}
    if not config.seeds:
        raise DpjaxError("seeds are empty; give at least one, e.g. 0")
    if config.control:
        return control(config, scale, folder)
    models = []
    for seed in config.seeds:
        for target_epsilon in (None, *config.target_epsilons):
            path = folder / f"seed{seed}-{arm_name(target_epsilon)}.json"
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if found.get("scale") != described:
                found = {"scale": described, **measured(scale, target_epsilon, seed)}
                path.write_text(json.dumps(found) + "\n", encoding="utf-8")
            models.append(found)
            loss, seconds = found["held_out_nats_per_token"], found["seconds"]
            print(f"seed {seed} {found['arm']:12s} loss {loss:.3f} {seconds:.0f} s", flush=True)
    found = {
        "experiment": "memorisation",
        "preset": config.preset,
        "hardware": f"{platform.machine()}, {jax.local_devices()[0].device_kind} x "
        f"{jax.local_device_count()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "seeds": list(config.seeds),
        **described,
        "arms": summarised(scale, models),
    }
    print(table(found))
    where = config.results
    if where is None and config.preset != "smoke":
        where = str(HERE)
    if where is not None:
        target = pathlib.Path(where)
        text = json.dumps(found, indent=2) + "\n"
        (target / "results.json").write_text(text, encoding="utf-8")
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "dpjax"}):
            metadata = {"Date": None, "Creator": None}
            figure(found).savefig(target / "exposure.svg", format="svg", metadata=metadata)
    return found


def control(config: Config, scale: Scale, folder: pathlib.Path) -> dict[str, Any]:
    """Exposure of the same canaries, inserted once and not at all, under models of one arm."""
    pairs, seconds = [], 0.0
    for seed in config.seeds:
        bits = []
        for least in (1, 2):
            path = folder / f"control-seed{seed}-least{least}.json"
            if not path.exists():
                made = measured(scale, config.target_epsilons[0], seed, least)
                path.write_text(json.dumps(made) + "\n", encoding="utf-8")
            model = json.loads(path.read_text(encoding="utf-8"))
            found = exposure_by_sampling(
                model["canary_losses"], model["twin_losses"], model["space_bits"]
            ).bits[np.array(model["repetitions"]) == 1]
            bits.append(found)
            seconds += model["seconds"]
            print(f"seed {seed}, from {least} repetitions: {found.mean():.3f} bits", flush=True)
        pairs.append(np.stack(bits))
    inside, outside = np.concatenate(pairs, axis=1)
    more = inside - outside
    expected, deviation = unseen_exposure(scale.twins)
    found = {
        "target_epsilon": config.target_epsilons[0],
        "seeds": list(config.seeds),
        "canaries": int(more.size),
        "mean_bits_inserted": float(inside.mean()),
        "mean_bits_left_out": float(outside.mean()),
        "by_seed": [[float(part.mean()) for part in pair] for pair in pairs],
        "z_left_out_against_unseen": float(
            (outside.mean() - expected) / (deviation / math.sqrt(more.size))
        ),
        "mean_difference": float(more.mean()),
        "standard_error": float(more.std(ddof=1) / math.sqrt(more.size)),
        "wilcoxon_p_value": float(stats.wilcoxon(inside, outside).pvalue),
        "correlation": float(np.corrcoef(inside, outside)[0, 1]),
        "seconds": round(seconds),
    }
    if config.results is not None or config.preset != "smoke":
        target = pathlib.Path(config.results or HERE) / "control.json"
        target.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
    return found


def arm_name(target_epsilon: float | None) -> str:
    """How a file and a table call it."""
    return "not private" if target_epsilon is None else f"epsilon {target_epsilon:g}"


def decoder(scale: Scale, vocabulary_size: int) -> DecoderConfig:
    """The model of a preset."""
    if scale.model == "nano":
        return decoder_config("nano", vocabulary_size)
    layers, width = {"micro": (2, 64), "tiny": (1, 16)}[scale.model]
    return decoder_config(
        "nano",
        vocabulary_size,
        num_layers=layers,
        d_model=width,
        num_heads=4,
        num_kv_heads=2,
        d_ff=2 * width,
    )


def material(scale: Scale, seed: int, least: int = 1) -> tuple[Dataset, Dataset, CanarySet]:
    """Training messages with canaries, held-out messages of other people, and the answer key.

    Canaries that would be repeated fewer than ``least`` times are not inserted.
    """
    tokenizer = byte_tokenizer()
    records = [record for record in chitchat("message") if record.text.strip()]
    chosen = np.random.default_rng(0).permutation(len(records))[: scale.messages + HELD_OUT]
    everything = dataset_from_records(
        [records[i] for i in chosen], tokenizer, scale.sequence_length, name="chitchat messages"
    )
    train, held_out = everything.split(HELD_OUT, seed=0)
    repetitions = [times for times, number in scale.canaries.items() for _ in range(number)]
    canaries = random_token_canaries(
        len(repetitions),
        tokenizer,
        SECRET_TOKENS,
        tokenizer.encode(PREFIX),
        seed=seed,
        repetitions=repetitions,
        num_held_out=scale.twins,
    )
    return insert(train, canaries, canaries.repetitions >= least, seed=seed), held_out, canaries


@functools.cache
def optimizer_for(iterations: int) -> optax.GradientTransformation:
    """Adam with a linear decay; one object, so that the step of an arm compiles once."""
    return optax.adam(optax.linear_schedule(3e-3, 3e-4, iterations))


def measured(
    scale: Scale, target_epsilon: float | None, seed: int, least: int = 1
) -> dict[str, Any]:
    """Trains one model and scores canaries, inserted or not, and twins."""
    data, held_out, canaries = material(scale, seed, least)
    delta = len(data) ** -1.1
    shared = {
        "sampling_probability": scale.batch / len(data),
        "iterations": scale.iterations,
        "population": len(data),
        "normalize_by": float(scale.batch),
        "microbatch_size": scale.microbatch_size,
    }
    if target_epsilon is None:
        mechanism = DPSGD(math.inf, noise_multiplier=0.0, **shared)
    else:
        mechanism = DPSGD(1.0, target_epsilon=target_epsilon, target_delta=delta, **shared)
    model = decoder(scale, byte_tokenizer().vocabulary_size)
    init_key, train_key = jax.random.split(jax.random.key(seed))
    optimizer = optimizer_for(scale.iterations)
    state = init_state(mechanism, init_params(model, init_key), optimizer, train_key)
    begun = time.monotonic()
    for state, _ in fit(state, mechanism, language_model_loss(model), optimizer, data):
        pass
    jax.block_until_ready(state.params)
    seconds = time.monotonic() - begun
    inserted = canary_losses(model, state.params, canaries, "in")
    twins = canary_losses(model, state.params, canaries, "held_out")
    utility = held_out_loss(model, state.params, held_out)
    return {
        "arm": arm_name(target_epsilon),
        "seed": seed,
        "target_epsilon": target_epsilon,
        "epsilon_rdp": mechanism.epsilon(delta) if mechanism.is_private else None,
        "delta": delta if mechanism.is_private else None,
        "noise_multiplier": mechanism.noise_multiplier,
        "records": len(data),
        "parameters": count_parameters(state.params),
        "held_out_nats_per_token": utility.nats_per_token,
        "seconds": seconds,
        "space_bits": float(canaries.space_bits[0]),
        "repetitions": canaries.repetitions.tolist(),
        "canary_losses": inserted.tolist(),
        "twin_losses": twins.tolist(),
    }


def summarised(scale: Scale, models: list[dict[str, Any]]) -> dict[str, Any]:
    """Exposure for each arm and repetition, over all seeds."""
    arms = {}
    for name in dict.fromkeys(model["arm"] for model in models):
        runs = [model for model in models if model["arm"] == name]
        exposures = [
            exposure_by_sampling(run["canary_losses"], run["twin_losses"], run["space_bits"])
            for run in runs
        ]
        fits = [
            exposure_by_skew_normal(run["canary_losses"], run["twin_losses"], run["space_bits"])
            for run in runs
        ]
        arms[name] = {
            "target_epsilon": runs[0]["target_epsilon"],
            "epsilon_rdp": runs[0]["epsilon_rdp"],
            "delta": runs[0]["delta"],
            "noise_multiplier": runs[0]["noise_multiplier"],
            "records": runs[0]["records"],
            "parameters": runs[0]["parameters"],
            "held_out_nats_per_token": [run["held_out_nats_per_token"] for run in runs],
            "seconds": [run["seconds"] for run in runs],
            "skew_normal_ks_p_values": [fit.ks_p_value for fit in fits],
            "repetitions": {
                str(times): group(times, runs, exposures, fits) for times in scale.canaries
            },
        }
    return arms


def group(
    times: int, runs: list[dict[str, Any]], exposures: list[Exposure], fits: list[Exposure]
) -> dict[str, Any]:
    """Canaries that were repeated so many times, all seeds together."""
    chosen = [np.array(run["repetitions"]) == times for run in runs]
    by_seed = [e.bits[these] for e, these in zip(exposures, chosen, strict=True)]
    bits = np.concatenate(by_seed)
    fitted = np.concatenate([f.bits[these] for f, these in zip(fits, chosen, strict=True)])
    censored = [e.is_censored[these] for e, these in zip(exposures, chosen, strict=True)]
    expected, deviation = unseen_exposure(len(runs[0]["twin_losses"]))
    error = deviation / math.sqrt(bits.size)
    # Ranks of unseen canaries are uniform: 2^-exposure on (0, 1].
    uniform = stats.kstest(2.0**-bits, "uniform")
    return {
        "canaries": int(bits.size),
        "mean_bits": float(bits.mean()),
        "mean_bits_by_seed": [float(part.mean()) for part in by_seed],
        "standard_error": float(bits.std(ddof=1) / math.sqrt(bits.size)),
        "median_bits": float(np.median(bits)),
        "maximum_bits": exposures[0].maximum,
        "share_at_maximum": float(np.concatenate(censored).mean()),
        "skew_normal_mean_bits": float(fitted.mean()),
        "unseen_mean_bits": expected,
        "unseen_standard_error": error,
        "z_against_unseen": float((bits.mean() - expected) / error),
        "ks_p_value_against_unseen": float(uniform.pvalue),
    }


def table(found: dict[str, Any]) -> str:
    """Mean exposure in bits, as Markdown."""
    arms = found["arms"]
    counts = list(next(iter(arms.values()))["repetitions"])
    lines = [
        "| | held-out loss | " + " | ".join(f"x{times}" for times in counts) + " |",
        "| --- " * (2 + len(counts)) + "|",
    ]
    for name, arm in arms.items():
        cells = [f"{np.mean(arm['held_out_nats_per_token']):.3f}"]
        for times in counts:
            cell = arm["repetitions"][times]
            cells.append(f"{cell['mean_bits']:.2f} ± {cell['standard_error']:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(found: dict[str, Any]) -> Any:
    """Mean exposure against repetitions, with the maximum and what unseen canaries have."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = drawn.add_subplot()
    styles = (("#d55e00", "o"), ("#0072b2", "s"), ("#009e73", "^"), ("#cc79a7", "D"))
    shift = np.linspace(-0.09, 0.09, len(found["arms"]))  # side by side, so that bars can be seen
    for (name, arm), (color, marker), offset in zip(
        found["arms"].items(), itertools.cycle(styles), shift, strict=False
    ):
        groups = arm["repetitions"]
        where = np.array([float(times) for times in groups]) * 2.0**offset
        mean = [cell["mean_bits"] for cell in groups.values()]
        error = [1.96 * cell["standard_error"] for cell in groups.values()]
        axes.errorbar(
            where, mean, error, label=name, color=color, marker=marker, capsize=2.5, linewidth=1.4
        )
    first = next(iter(next(iter(found["arms"].values()))["repetitions"].values()))
    axes.axhline(first["maximum_bits"], color="#444444", linestyle="--", linewidth=1)
    axes.axhline(first["unseen_mean_bits"], color="#444444", linestyle=":", linewidth=1)
    left = 2.0 ** (shift[0] - 0.25)
    axes.text(left, first["maximum_bits"] - 0.4, "most that the twins can show", fontsize=8)
    axes.text(left, first["unseen_mean_bits"] - 0.55, "never inserted: 1.44", fontsize=8)
    axes.set_xscale("log", base=2)
    counts = [int(times) for times in next(iter(found["arms"].values()))["repetitions"]]
    axes.set_xticks(counts, [str(times) for times in counts])
    axes.minorticks_off()
    axes.set_ylim(0, first["maximum_bits"] + 0.7)
    axes.set_xlabel("Times that a canary was inserted")
    axes.set_ylabel("Exposure (bits), mean and 95% interval")
    axes.grid(True, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(frameon=False, loc="outside upper center", ncols=4)
    return drawn


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except DpjaxError as error:
        print(f"memorisation: {error}", file=sys.stderr)
        sys.exit(2)
