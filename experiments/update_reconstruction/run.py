"""What a server reads from one client's update: images and texts, from four views of it.

    python experiments/update_reconstruction/run.py --preset cpu      # what results.json holds
    python experiments/update_reconstruction/run.py --preset gpu      # more clients, wider models
    python experiments/update_reconstruction/run.py --preset smoke    # seconds

Claim, hardware, duration and numbers: README.md. Models are untrained, as at the first round of
federated learning; the same attacks run on every view of the same updates.
"""

import dataclasses
import json
import pathlib
import platform
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro

from dpjax.auditing.gradient_inversion import first_linear_layer_input, invert_gradients, psnr
from dpjax.auditing.text_reconstruction import (
    guess_sequences,
    recover_sequences,
    recover_tokens,
    text_recovery,
)
from dpjax.auditing.updates import observe_update
from dpjax.data import byte_tokenizer, chitchat, load_digits
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.models import DecoderConfig, init_params, language_model_loss

HERE = pathlib.Path(__file__).resolve().parent
SHOWN = 4  # digits in the figure


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Everything in it is public."""

    preset: Literal["cpu", "gpu", "smoke"] = "cpu"
    """Clients attacked, and the length of the search."""
    seed: int = 0
    """Fixed, so that the numbers can be checked."""
    results: str | None = None
    """Where to write the numbers (default: results.json beside this script; smoke: nowhere)."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a preset means."""

    images: int  # clients with one image each
    iterations: int
    restarts: int
    texts: int  # clients with two messages each, for each head
    length: int  # tokens of a message
    width: int  # of the decoder: more than the positions of one client
    cohort: int  # clients in the large sum
    target_epsilon: float
    target_delta: float


SCALES = {
    "cpu": Scale(8, 1000, 4, 10, 12, 64, 8, 8.0, 1e-5),
    "gpu": Scale(32, 4000, 8, 50, 24, 128, 16, 8.0, 1e-5),
    "smoke": Scale(1, 20, 1, 1, 6, 32, 8, 8.0, 1e-5),
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """One way to look at an update."""

    name: str
    view: Literal["plain", "clipped", "noised", "aggregated", "sum"]
    noise_multiplier: float = 1.0
    clients: int = 1


def main(config: Config) -> dict[str, Any]:
    """Runs both attacks on every view; returns what was measured."""
    scale = SCALES[config.preset]
    # One release of one client's update, all of its data at once.
    noise_multiplier = DPSGD(
        1.0, 1.0, 1, target_epsilon=scale.target_epsilon, target_delta=scale.target_delta,
        accountant="pld",
    ).noise_multiplier  # fmt: skip
    assert noise_multiplier is not None
    views = (
        Seen("plain", "plain"),
        Seen("clipped", "clipped"),
        Seen("noise multiplier 1e-4", "noised", 1e-4),
        Seen("noise multiplier 1e-2", "noised", 1e-2),
        Seen(f"epsilon {scale.target_epsilon:g}", "noised", noise_multiplier),
        Seen("sum of 2", "sum", clients=2),
        Seen("secure sum of 2", "aggregated", clients=2),
        Seen(f"secure sum of {scale.cohort}", "aggregated", clients=scale.cohort),
    )
    if config.preset == "smoke":  # each view is compiled anew
        views = tuple(s for s in views if s.clients <= 2 and not s.noise_multiplier < 0.1)
    found: dict[str, Any] = {
        "experiment": "update_reconstruction",
        "preset": config.preset,
        "hardware": f"{platform.machine()}, {jax.local_devices()[0].device_kind} x "
        f"{jax.local_device_count()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "seed": config.seed,
        "scale": dataclasses.asdict(scale),
        "noise_multiplier": noise_multiplier,
    }
    began = time.monotonic()
    found["images"], pictures = attack_images(config, scale, views)
    found["images_seconds"] = round(time.monotonic() - began, 1)
    began = time.monotonic()
    found["texts"] = [
        row for tied in (False, True) for row in attack_texts(config, scale, views, tied)
    ]
    found["texts_seconds"] = round(time.monotonic() - began, 1)
    found = json.loads(json.dumps(found))
    where = config.results
    if where is None and config.preset != "smoke":
        where = str(HERE / "results.json")
    if where is not None:
        pathlib.Path(where).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        draw(pictures, pathlib.Path(where).parent)
    report(found)
    return found


def look(updates: list[Any], seen: Seen, key: jax.Array, l2_clip_norm: float) -> Any:
    """The first client's update as the server sees it."""
    if seen.view == "sum":
        # Of floats and without clipping: what aggregation hides by itself.
        return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *updates[: seen.clients])
    return observe_update(
        updates[: seen.clients],
        seen.view,
        l2_clip_norm=l2_clip_norm,
        noise_multiplier=seen.noise_multiplier,
        key=key,
    )


def attack_images(
    config: Config, scale: Scale, views: tuple[Seen, ...]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """PSNR of every client's image by the search (no bias gradients) and by algebra (with them)."""
    images, labels = load_digits()[0]
    images = np.asarray(images, np.float32).reshape(-1, 8, 8)
    order = np.random.default_rng(config.seed).permutation(len(images))
    keys = jax.random.split(jax.random.key(config.seed), 4)
    params = {
        "hidden": jax.random.normal(keys[0], (64, 48)) / 8,
        "hidden_bias": jnp.zeros(48),
        "head": jax.random.normal(keys[1], (48, 10)) / 7,
    }

    def loss_fn(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        inner = image.reshape(-1) @ params["hidden"] + params["hidden_bias"]
        return -jax.nn.log_softmax(jax.nn.sigmoid(inner) @ params["head"])[label]

    def update_of(batch: jax.Array, label: jax.Array) -> Any:
        return jax.grad(loss_fn)(params, batch[0], label)

    def searched(update: Any) -> Any:
        return {name: update[name] for name in ("hidden", "head")}

    def attacked(label: jax.Array, batch: jax.Array) -> Any:
        return searched(update_of(batch, label))

    quick = jax.jit(update_of)
    pictures: dict[str, list[np.ndarray]] = {"original": []}
    values: dict[str, dict[str, list[float]]] = {
        s.name: {"search": [], "algebra": []} for s in views
    }
    baseline, best_of_data = [], []
    for client in range(scale.images):
        # Each client in turn is the first of its cohort.
        cohort = order[client * scale.cohort : (client + 1) * scale.cohort]
        updates = [
            quick(jnp.asarray(images[i][None]), jnp.asarray(labels[i], jnp.int32)) for i in cohort
        ]
        truth, label = images[cohort[0]], jnp.asarray(labels[cohort[0]], jnp.int32)
        others = np.delete(images, cohort[0], axis=0)
        baseline.append(psnr(others.mean(axis=0), truth))
        best_of_data.append(
            psnr(others[np.square(others - truth).mean(axis=(1, 2)).argmin()], truth)
        )
        pictures["original"].append(truth)
        for number, seen in enumerate(views):
            key = jax.random.fold_in(keys[2], client * len(views) + number)
            observed = look(updates, seen, key, 0.5)
            result = invert_gradients(
                jax.tree_util.Partial(attacked, label),  # one compilation for all
                searched(observed),
                (1, 8, 8),
                jax.random.fold_in(key, 1),
                iterations=scale.iterations,
                restarts=scale.restarts,
                total_variation=1e-4,
            )
            exact = first_linear_layer_input(
                np.asarray(observed["hidden"]), np.asarray(observed["hidden_bias"])
            ).reshape(8, 8)
            exact = np.clip(exact, 0.0, 1.0)
            values[seen.name]["search"].append(psnr(result.images[0], truth))
            # Float32 leaves about 150 dB; infinity has no place in JSON.
            values[seen.name]["algebra"].append(min(psnr(exact, truth), 200.0))
            pictures.setdefault(seen.name, []).append(result.images[0])
        print(f"image {client + 1} of {scale.images}", flush=True)
    rows = [
        {
            "view": name,
            "attack": attack,
            **spread(psnrs),
            "above_mean_image": above(psnrs, baseline),
        }
        for name, attacks in values.items()
        for attack, psnrs in attacks.items()
    ]
    for name, psnrs in (("mean image", baseline), ("nearest other image", best_of_data)):
        rows.append({"view": "none", "attack": name, **spread(psnrs)})
    return rows, {name: np.stack(parts) for name, parts in pictures.items()}


def spread(psnrs: list[float]) -> dict[str, float]:
    """Median and range in decibels."""
    return {
        "psnr": float(np.median(psnrs)),
        "psnr_min": float(np.min(psnrs)),
        "psnr_max": float(np.max(psnrs)),
    }


def above(psnrs: list[float], baseline: list[float]) -> float:
    """Share of images nearer to the truth than what needs no update, by 3 dB."""
    return float(np.mean(np.subtract(psnrs, baseline) > 3.0))


def attack_texts(
    config: Config, scale: Scale, views: tuple[Seen, ...], tied: bool
) -> list[dict[str, Any]]:
    """Tokens and sequences of every client with two messages, on fresh decoders."""
    tokenizer = byte_tokenizer()
    messages = list(
        dict.fromkeys(tuple(tokenizer.encode(r.text)[: scale.length]) for r in chitchat())
    )
    messages = [m for m in messages if len(m) == scale.length]
    drawn = np.random.default_rng(config.seed).permutation(len(messages))
    if len(drawn) < 2 * scale.cohort * scale.texts:
        raise DpjaxError(
            f"the text has {len(drawn)} messages, and the preset needs "
            f"{2 * scale.cohort * scale.texts}; use a smaller one"
        )
    shape = DecoderConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        num_layers=2,
        d_model=scale.width,
        num_heads=4,
        num_kv_heads=4,
        d_ff=2 * scale.width,
        tied=tied,
    )
    mask = jnp.ones((2, scale.length), bool)

    @jax.jit
    def update_of(params: Any, tokens: jax.Array) -> Any:
        # Accelerators round products to fewer bits otherwise; clients may do so.
        with jax.default_matmul_precision("highest"):
            example = {"tokens": tokens, "loss_mask": mask}
            return jax.grad(language_model_loss(shape))(params, example)

    metrics: dict[str, list[dict[str, float]]] = {s.name: [] for s in views}
    guesses = []
    for client in range(scale.texts):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), client)
        params = init_params(shape, jax.random.fold_in(key, 0))
        start = 2 * scale.cohort * client
        cohort = [
            [messages[i] for i in drawn[start + 2 * k : start + 2 * k + 2]]
            for k in range(scale.cohort)
        ]
        updates = [update_of(params, jnp.asarray(c, jnp.int32)) for c in cohort]
        truth = cohort[0]
        read = {t for m in truth for t in m[:-1]}
        for number, seen in enumerate(views):
            observed = look(updates, seen, jax.random.fold_in(key, 1 + number), 0.1)
            result = recover_sequences(shape, params, observed, max_length=scale.length)
            tokens = recover_tokens(shape, params, observed)
            # The attacker is told how many tokens there are: the strongest one under noise.
            best = recover_tokens(shape, params, observed, count=len(read))
            recovered = set(tokens.tokens.tolist())
            metrics[seen.name].append(
                {
                    "token_recall": len(read & recovered) / len(read),
                    "token_precision": len(read & recovered) / max(len(recovered), 1),
                    "token_recall_known_count": len(read & set(best.tokens.tolist())) / len(read),
                    "sequences_found": float(len(result.sequences)),
                    "searches_cut": float(not result.complete),
                    "exact_sequences": text_recovery(result.sequences, truth)["exact_sequences"],
                    "rouge_l": text_recovery(result.sequences, truth)["rouge_l"],
                }
            )
        guess = guess_sequences(shape.vocabulary_size, 2, scale.length, jax.random.fold_in(key, 99))
        blind = text_recovery(guess, truth)
        guesses.append(
            {
                "token_recall_known_count": len(read) / shape.vocabulary_size,
                "exact_sequences": blind["exact_sequences"],
                "rouge_l": blind["rouge_l"],
            }
        )
        print(f"text {client + 1} of {scale.texts}, {'tied' if tied else 'untied'}", flush=True)
    head = "tied" if tied else "untied"
    rows = [{"view": name, "head": head, **averaged(each)} for name, each in metrics.items()]
    return [*rows, {"view": "random guess", "head": head, **averaged(guesses)}]


def averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over clients."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def draw(pictures: dict[str, np.ndarray], folder: pathlib.Path) -> None:
    """Originals, and what the search made of each view."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = min(SHOWN, len(pictures["original"]))
    figure, panels = plt.subplots(
        columns, len(pictures), figsize=(1.15 * len(pictures), 1.15 * columns + 0.3), squeeze=False
    )
    for place, (name, images) in enumerate(pictures.items()):
        for row in range(columns):
            axes = panels[row, place]
            axes.imshow(images[row], cmap="gray_r", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
        panels[0, place].set_title(name.replace(" ", "\n", 1), fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "images.png", dpi=110)
    plt.close(figure)


def report(found: dict[str, Any]) -> None:
    """Both tables."""
    for row in found["images"]:
        print(
            f"{row['view']}, {row['attack']}: PSNR {row['psnr']:.1f} dB ({row['psnr_min']:.1f} to "
            f"{row['psnr_max']:.1f})"
        )
    for row in found["texts"]:
        print(
            f"{row['head']}, {row['view']}: exact sequences {row['exact_sequences']:.2f}, ROUGE-L "
            f"{row['rouge_l']:.2f}, tokens of a known number {row['token_recall_known_count']:.2f}"
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except DpjaxError as error:
        print(f"update_reconstruction: {error}", file=sys.stderr)
        sys.exit(2)
