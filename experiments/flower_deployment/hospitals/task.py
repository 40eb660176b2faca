"""What all machines share: the model, the algorithm, and the plan."""

import jax.numpy as jnp
import numpy as np

from dpjax.federated import Clients, scaffold
from dpjax.federated.deployment import Plan

NAMES = ("north", "south", "west")


def loss_fn(params, example):
    """Logistic loss of one patient, in nats."""
    margin = jnp.dot(params["weights"], example["x"])
    return jnp.logaddexp(0.0, -margin * example["y"])


def patients() -> Clients:
    """Everybody's patients, for the simulation; a hospital loads its own only."""
    rng = np.random.default_rng(0)
    owners = rng.integers(len(NAMES), size=60)
    x = rng.normal(size=(60, 5)).astype(np.float32) + owners[:, None].astype(np.float32) / 2
    x[:, 4] = 1.0  # the bias
    y = np.where(x @ [1.0, -2.0, 0.5, 0.3, 0.2] + rng.normal(size=60) > 0, 1, -1)
    rows = tuple(np.flatnonzero(owners == n) for n in range(len(NAMES)))
    return Clients({"x": x, "y": y.astype(np.float32)}, rows, NAMES)


def own_patients(number: int) -> Clients:
    """Those of one hospital. A real one reads a file of its own here."""
    everybody = patients()
    rows = everybody.rows[number]
    examples = {name: values[rows] for name, values in everybody.examples.items()}
    return Clients(examples, (np.arange(len(rows)),), (NAMES[number],))


def plan() -> Plan:
    """SCAFFOLD, whose clients keep a state of their own between rounds."""
    params = {"weights": jnp.zeros(5, jnp.float32)}
    example = {"x": np.zeros(5, np.float32), "y": np.zeros((), np.float32)}
    algorithm = scaffold(loss_fn, 0.1, num_clients=len(NAMES))
    return Plan(algorithm, params, example, len(NAMES), batch_size=8)
