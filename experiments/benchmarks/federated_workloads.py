"""What federated.py trains: models, data, and the same round as one plain `jax.vmap`."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax.federated import Algorithm, Clients, Cohort, fed_avg
from dpjax.types import PyTree


class Workload(NamedTuple):
    """Clients that hold exactly ``steps`` batches each."""

    name: str
    params: dict[str, Any]  # float32, by path: "conv0/w", "dense0/b"
    loss_fn: Callable[[PyTree, PyTree], Any]
    algorithm: Algorithm
    people: Clients
    steps: int
    batch_size: int
    learning_rate: float

    def cohort(self, number: int) -> Cohort:
        """Everybody, in the order of their numbers."""
        return self.people.cohort(
            range(len(self.people)),
            jax.random.key(number),
            batch_size=self.batch_size,
            cohort_size=len(self.people),
        )


class Sizes(NamedTuple):
    clients: int
    steps: int
    batch_size: int
    image: tuple[int, ...]
    hidden: tuple[int, ...]


SIZES = {
    ("mlp", "cpu"): Sizes(64, 5, 20, (784,), (200, 200)),
    ("cnn", "cpu"): Sizes(50, 5, 10, (32, 32, 3), (128,)),
    ("flat", "cpu"): Sizes(64, 1, 20, (784,), (200, 200)),
    ("mlp", "smoke"): Sizes(4, 2, 5, (12,), (8, 8)),
    ("cnn", "smoke"): Sizes(3, 2, 4, (8, 8, 3), (8,)),
    ("flat", "smoke"): Sizes(4, 1, 4, (12,), (8, 8)),
}


def workload(name: str, preset: str, clients: int | None = None) -> Workload:
    """``name`` is "mlp", "cnn" or "flat", the MLP with one step for each client."""
    sizes = SIZES[name, preset]
    clients = sizes.clients if clients is None else clients
    rng = np.random.default_rng(0)
    params: dict[str, Any] = {}
    features = sizes.image[0]
    if name == "cnn":
        for n, (into, out) in enumerate(((3, 32), (32, 64))):
            params[f"conv{n}/w"] = rng.normal(size=(3, 3, into, out)) * (2 / into / 9) ** 0.5
            params[f"conv{n}/b"] = np.zeros(out)
        features = ((sizes.image[0] - 4) // 2) ** 2 * 64
    widths = (features, *sizes.hidden, 10)
    for n, (into, out) in enumerate(itertools.pairwise(widths)):
        params[f"dense{n}/w"] = rng.normal(size=(into, out)) * (2 / into) ** 0.5
        params[f"dense{n}/b"] = np.zeros(out)
    params = {path: jnp.asarray(x, jnp.float32) for path, x in params.items()}
    size = sizes.steps * sizes.batch_size
    data = {
        "x": rng.random((clients * size, *sizes.image), np.float32),
        "y": rng.integers(0, 10, clients * size).astype(np.int32),
    }
    rows = tuple(np.arange(n * size, (n + 1) * size) for n in range(clients))
    people = Clients(data, rows, tuple(f"client-{n}" for n in range(clients)))
    rate = 0.05
    algorithm = fed_avg(cross_entropy, optax.sgd(rate))
    return Workload(
        name, params, cross_entropy, algorithm, people, sizes.steps, sizes.batch_size, rate
    )


def cross_entropy(params, example):
    """Of the model whose layers are in ``params``, on one example."""
    return -jax.nn.log_softmax(_logits(params, example["x"]))[example["y"]]


def _logits(params, x):
    for n in range(sum(path.startswith("conv") for path in params) // 2):
        x = jax.lax.conv_general_dilated(
            x[None],
            params[f"conv{n}/w"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]
        x = jax.nn.relu(x + params[f"conv{n}/b"])
    if x.ndim == 3:
        height, width, channels = x.shape
        # Not `lax.reduce_window`, whose gradient takes seven times as long on CPUs.
        x = jnp.max(x.reshape(height // 2, 2, width // 2, 2, channels), axis=(1, 3)).reshape(-1)
    layers = sum(path.startswith("dense") for path in params) // 2
    for n in range(layers):
        x = x @ params[f"dense{n}/w"] + params[f"dense{n}/b"]
        x = jax.nn.relu(x) if n < layers - 1 else x
    return x


def plain_vmap(work: Workload) -> Callable[[PyTree, PyTree], PyTree]:
    """FedAvg as one would write it first: all clients at once, steps as a scan, the mean."""
    clients, steps, batch = len(work.people), work.steps, work.batch_size
    gradient = jax.grad(
        lambda params, some: jnp.mean(jax.vmap(work.loss_fn, (None, 0))(params, some))
    )

    def step(params, some):
        slope = gradient(params, some)
        return jax.tree.map(lambda p, g: p - work.learning_rate * g, params, slope), None

    def client(params, own):
        return jax.lax.scan(step, params, own)[0]

    @jax.jit
    def round_of(params, data):
        data = jax.tree.map(lambda x: x.reshape(clients, steps, batch, *x.shape[1:]), data)
        after = jax.vmap(client, (None, 0))(params, data)
        return jax.tree.map(functools.partial(jnp.mean, axis=0), after)

    return round_of
