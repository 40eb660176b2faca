"""FedAvg, and FedOpt: any optax optimizer on the server."""

from typing import NamedTuple

import jax
import optax

from dpjax.federated.algorithm import (
    Algorithm,
    LocalResult,
    difference,
    example_weight,
    local_training,
    server_step,
)
from dpjax.types import LossFn, PyTree


class ServerState(NamedTuple):
    """Parameters, and what the server's optimizer keeps."""

    params: PyTree
    optimizer: PyTree


def fed_avg(
    loss_fn: LossFn,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    uniform_weights: bool = False,
    proximal: float = 0.0,
) -> Algorithm:
    """Clients train, the server takes the mean of what they changed.

    Args:
      loss_fn: ``loss_fn(params, example) -> scalar`` for ONE example.
      client_optimizer: fresh on every client in every round.
      server_optimizer: on the mean change as a pseudo-gradient: ``optax.sgd(1.0)`` is FedAvg (the
        default), with momentum FedAvgM; adam, yogi and adagrad are FedOpt.
      uniform_weights: True weighs clients alike, as user-level privacy needs; False by their
        numbers of examples.
      proximal: mu of FedProx, see `fed_prox`.

    Source: McMahan et al. (2017), algorithm 1; Reddi et al. (2021), algorithm 1.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from dpjax.federated import Clients, init_federated, run_round
      >>> people = Clients({"x": np.float32([1, 2, 9])}, ([0, 1], [2]), ("ann", "bob"))
      >>> algorithm = fed_avg(lambda w, e: (w - e["x"]) ** 2, optax.sgd(0.5))
      >>> state = init_federated(algorithm, jnp.zeros(()), len(people))
      >>> cohort = people.cohort([0, 1], jax.random.key(0), batch_size=None)
      >>> state, info = run_round(algorithm, state, cohort, jax.random.key(1), engine="jit")
      >>> float(state.server.params)  # one full step reaches each client's mean; weights 2 and 1
      4.0
    """
    optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    def init(params):
        return ServerState(params, optimizer.init(params)), ()

    def local_update(server, client, data, key):
        def towards_start(gradient, params):
            return add_proximal(gradient, params, server.params, proximal)

        correct = towards_start if proximal else None
        params, metrics = local_training(
            loss_fn, client_optimizer, server.params, data, correct=correct
        )
        weight = example_weight(data.num_examples, uniform_weights)
        return LocalResult(difference(params, server.params), weight, client, metrics)

    def server_update(server, aggregate):
        return ServerState(
            *server_step(optimizer, server.params, server.optimizer, aggregate.update)
        )

    return Algorithm("fed_prox" if proximal else "fed_avg", init, local_update, server_update)


def add_proximal(gradient: PyTree, params: PyTree, start: PyTree, strength: float) -> PyTree:
    """Gradient of ``loss + strength / 2 * |params - start|^2``."""
    return jax.tree.map(lambda g, p, s: g + strength * (p - s), gradient, params, start)
