"""FedProx: clients that differ in data and in how much work they manage.

    python experiments/fedprox/run.py --preset cpu      # what results.json holds
    python experiments/fedprox/run.py --preset smoke    # seconds

Claim, hardware, duration, numbers and the published ones (Li et al., 2020): README.md. The data are
the paper's own synthetic ones, drawn here.
"""

import dataclasses
import json
import pathlib
import platform
import sys
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro

from dpjax.errors import DpjaxError
from dpjax.federated import Clients, fed_avg, fed_prox, init_federated, run_round

HERE = pathlib.Path(__file__).resolve().parent
CLASSES, FEATURES = 10, 60
# (alpha, beta) of Li et al. (2020), section 5.1: how much models and inputs differ between clients.
DATA = {
    "alike": None,
    "synthetic (0, 0)": (0.0, 0.0),
    "synthetic (1, 1)": (1.0, 1.0),
}


class Arm(NamedTuple):
    """What to do about clients that do not finish."""

    name: str
    proximal: float
    keep_partial: bool  # else they are dropped


ARMS = (
    Arm("FedAvg", 0.0, False),
    Arm("FedProx, mu = 0", 0.0, True),
    Arm("FedProx, mu = 1", 1.0, True),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Everything in it is public."""

    preset: Literal["cpu", "smoke"] = "cpu"
    """Rounds, seeds and stragglers."""
    results: str | None = None
    """Where to write the numbers (default: results.json beside this script; smoke: nowhere)."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a preset means."""

    clients: int
    cohort: int
    epochs: int
    rounds: int
    stragglers: tuple[float, ...]  # share of a cohort that does not finish its epochs
    seeds: tuple[int, ...]
    learning_rate: float = 0.01
    batch_size: int = 10


SCALES = {
    "cpu": Scale(30, 10, 20, 100, (0.0, 0.5, 0.9), (0, 1)),
    "smoke": Scale(6, 4, 3, 4, (0.9,), (0,)),
}


def main(config: Config) -> dict[str, Any]:
    """Trains every arm on every data set; returns what was measured."""
    scale = SCALES[config.preset]
    names = list(DATA) if config.preset != "smoke" else list(DATA)[-1:]
    found: dict[str, Any] = {
        "experiment": "fedprox",
        "preset": config.preset,
        "hardware": f"{platform.machine()}, {jax.local_devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "scale": dataclasses.asdict(scale),
        "rows": [],
    }
    for name in names:
        for seed in scale.seeds:
            clients = synthetic(DATA[name], scale.clients, seed)
            for share in scale.stragglers:
                for arm in ARMS:
                    row = train(clients, arm, scale, share, seed)
                    labels = {"data": name, "stragglers": share, "arm": arm.name, "seed": seed}
                    found["rows"].append({**labels, **row})
                    shown = {k: v for k, v in row.items() if k != "losses"}
                    print(labels, shown, flush=True)
    found = json.loads(json.dumps(found))
    where = config.results
    if where is None and config.preset != "smoke":
        where = str(HERE / "results.json")
    if where is not None:
        pathlib.Path(where).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        draw(found, pathlib.Path(where).parent)
    return found


def synthetic(unlike: tuple[float, float] | None, num_clients: int, seed: int) -> Clients:
    """Synthetic(alpha, beta): y = argmax of a client's own linear model; sizes by a power law.

    Source: Li et al. (2020), section 5.1; None is the paper's IID variant: one model for all.
    """
    rng = np.random.default_rng(seed)
    sizes = (rng.lognormal(4, 2, num_clients)).astype(int).clip(0, 1000) + 50
    scales = np.diag(np.arange(1, FEATURES + 1, dtype=np.float64) ** -1.2)
    weights, biases = rng.normal(size=(FEATURES, CLASSES)), rng.normal(size=CLASSES)
    xs, ys = [], []
    for size in sizes:
        mean = np.zeros(FEATURES)
        if unlike is not None:
            alpha, beta = unlike
            centre = rng.normal(0, np.sqrt(alpha))
            weights = rng.normal(centre, 1, (FEATURES, CLASSES))
            biases = rng.normal(centre, 1, CLASSES)
            mean = rng.normal(rng.normal(0, np.sqrt(beta)), 1, FEATURES)
        x = rng.multivariate_normal(mean, scales, size)
        xs.append(x)
        ys.append(np.argmax(x @ weights + biases, axis=1))
    examples = {
        "x": np.concatenate(xs).astype(np.float32),
        "y": np.concatenate(ys).astype(np.int32),
    }
    rows = tuple(np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1]))
    return Clients(examples, rows, tuple(f"client-{n}" for n in range(num_clients)))


def loss_fn(params, example):
    """Of multinomial logistic regression."""
    logits = example["x"] @ params["w"] + params["b"]
    return jax.nn.logsumexp(logits) - logits[example["y"]]


def train(clients: Clients, arm: Arm, scale: Scale, stragglers: float, seed: int) -> dict[str, Any]:
    """All rounds of one arm; the loss over all clients' examples after each."""
    client = optax.sgd(scale.learning_rate)
    if arm.proximal:
        algorithm = fed_prox(loss_fn, client, proximal=arm.proximal)
    else:
        algorithm = fed_avg(loss_fn, client)
    start = {
        "w": jnp.zeros((FEATURES, CLASSES), jnp.float32),
        "b": jnp.zeros(CLASSES, jnp.float32),
    }
    state = init_federated(algorithm, start, len(clients))
    everything = jax.tree.map(jnp.asarray, clients.examples)
    losses, key = [], jax.random.key(seed)
    began = time.process_time()
    for number in range(scale.rounds):
        # The same clients are chosen, and the same are slow, in every arm.
        draws = np.random.default_rng([seed, number])
        chosen = draws.choice(len(clients), scale.cohort, replace=False)
        slow = draws.random(scale.cohort) < stragglers
        done = np.where(slow, draws.integers(1, max(2, scale.epochs), scale.cohort), scale.epochs)
        if not arm.keep_partial:
            chosen, done = chosen[~slow], done[~slow]
        cohort = clients.cohort(
            chosen,
            jax.random.fold_in(key, number),
            batch_size=scale.batch_size,
            epochs=scale.epochs,
        )
        limit = np.zeros(len(clients) + 1, int)  # the last one is padding
        limit[chosen] = done
        limit = limit[cohort.client]
        steps = np.minimum(cohort.num_steps, limit * cohort.steps_per_epoch)
        cohort = cohort._replace(num_steps=steps.astype(np.int32))
        state, _ = run_round(algorithm, state, cohort, key)
        losses.append(float(_mean_loss(state.params, everything)))
    tail = losses[-10:]
    return {
        "final_loss": float(np.mean(tail)),
        "final_accuracy": float(_accuracy(state.params, everything)),
        # Of the last half: how unsteady it is.
        "loss_stddev": float(np.std(losses[len(losses) // 2 :])),
        "losses": [round(x, 4) for x in losses],
        "cpu_seconds": round(time.process_time() - began, 1),
    }


@jax.jit
def _mean_loss(params, examples):
    return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, examples))


@jax.jit
def _accuracy(params, examples):
    guessed = jnp.argmax(examples["x"] @ params["w"] + params["b"][None], axis=1)
    return jnp.mean(guessed == examples["y"])


def draw(found: dict[str, Any], folder: pathlib.Path) -> None:
    """Training loss against rounds: a row for each share of stragglers, a column for each data."""
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "dpjax"
    names = list(dict.fromkeys(r["data"] for r in found["rows"]))
    shares = found["scale"]["stragglers"]
    figure, panels = plt.subplots(
        len(shares), len(names), figsize=(2.6 * len(names), 2.1 * len(shares)), squeeze=False,
        sharex=True, sharey="col",
    )  # fmt: skip
    for line, share in zip(panels, shares, strict=True):
        for axes, name in zip(line, names, strict=True):
            for number, arm in enumerate(ARMS):
                runs = [
                    r["losses"]
                    for r in found["rows"]
                    if (r["data"], r["stragglers"], r["arm"]) == (name, share, arm.name)
                ]
                axes.plot(
                    np.mean(runs, axis=0), color=f"C{number}", linewidth=1.1,
                    linestyle=("-", "--", "-.")[number], label=arm.name,
                )  # fmt: skip
            axes.set_title(f"{name}, {share:.0%} stragglers", fontsize=8)
            axes.tick_params(labelsize=7)
        line[0].set_ylabel("training loss", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("rounds", fontsize=8)
    panels[0][0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "loss.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except DpjaxError as error:
        print(f"fedprox: {error}", file=sys.stderr)
        sys.exit(2)
