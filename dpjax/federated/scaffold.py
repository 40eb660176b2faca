"""SCAFFOLD: control variates that correct for clients drifting apart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpjax.federated.algorithm import (
    Algorithm,
    LocalResult,
    difference,
    local_training,
    server_step,
)
from dpjax.types import LossFn, PyTree


class ScaffoldState(NamedTuple):
    """Parameters, the server optimizer's state, and the mean of all clients' control variates."""

    params: PyTree
    optimizer: PyTree
    control: PyTree  # float32, like params


def scaffold(
    loss_fn: LossFn,
    learning_rate: float,
    num_clients: int,
    server_optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """Each client subtracts its own expected drift from every gradient, and adds everybody's.

    Args:
      loss_fn: ``loss_fn(params, example) -> scalar`` for ONE example.
      learning_rate: of the clients' SGD. It must be constant: the control variates divide by it.
      num_clients: all there are, N; the server's variate moves by the share that took part.
      server_optimizer: on the mean change; default ``optax.sgd(1.0)``.

    Clients keep one control variate each, as large as the parameters. Weights are uniform.

    Source: Karimireddy et al. (2020), algorithm 1, with option II for the variates.

    Example:
      >>> algorithm = scaffold(lambda w, e: (w - e) ** 2, 0.1, num_clients=10)
      >>> server, client = algorithm.init(jnp.zeros(2))
      >>> server.control.shape, client.shape
      ((2,), (2,))
    """
    optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer

    def init(params):
        # Like the parameters, they may be sharded.
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        return ScaffoldState(params, optimizer.init(params), zeros), zeros

    def local_update(server, client, data, key):
        def correct(gradient, params):
            return jax.tree.map(
                lambda g, c, own: g + (c - own).astype(g.dtype), gradient, server.control, client
            )

        params, metrics = local_training(
            loss_fn, optax.sgd(learning_rate), server.params, data, correct=correct
        )
        change = difference(params, server.params)
        # Who had nothing to train on keeps its variate: there was no step to divide by.
        scale = 1.0 / (jnp.maximum(data.num_steps, 1).astype(jnp.float32) * learning_rate)
        fresh = jax.tree.map(
            lambda own, c, d: jnp.where(data.num_steps > 0, own - c - d * scale, own),
            client,
            server.control,
            change,
        )
        update = {"params": change, "control": difference(fresh, client)}
        return LocalResult(update, jnp.ones((), jnp.float32), fresh, metrics)

    def server_update(server, aggregate):
        params, state = server_step(
            optimizer, server.params, server.optimizer, aggregate.update["params"]
        )
        share = aggregate.num_clients.astype(jnp.float32) / num_clients
        control = jax.tree.map(
            lambda c, d: c + share * d, server.control, aggregate.update["control"]
        )
        return ScaffoldState(params, state, control)

    return Algorithm("scaffold", init, local_update, server_update)
