"""FedNova: clients that take more steps do not pull harder."""

import jax
import jax.numpy as jnp
import optax

from dpjax.federated.algorithm import (
    Algorithm,
    LocalResult,
    difference,
    example_weight,
    local_training,
    server_step,
)
from dpjax.federated.fed_avg import ServerState
from dpjax.types import LossFn


def fed_nova(
    loss_fn: LossFn,
    learning_rate: float,
    server_optimizer: optax.GradientTransformation | None = None,
    *,
    momentum: float = 0.0,
    uniform_weights: bool = False,
) -> Algorithm:
    """Each change is divided by the client's effective number of steps, their mean multiplied back.

    Args:
      loss_fn: ``loss_fn(params, example) -> scalar`` for ONE example.
      learning_rate: of the clients' SGD.
      server_optimizer: on the normalised mean change; default ``optax.sgd(1.0)``.
      momentum: of the clients' SGD, in [0, 1); it makes later gradients count for more, which the
        effective number of steps allows for.
      uniform_weights: as in `fed_avg`.

    Source: Wang et al. (2020), *Tackling the objective inconsistency problem in heterogeneous
      federated optimization*, equations 9 and 13.

    Example:
      >>> fed_nova(lambda w, e: (w - e) ** 2, 0.1).name
      'fed_nova'
    """
    optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    client_optimizer = optax.sgd(learning_rate, momentum=momentum or None)

    def init(params):
        return ServerState(params, optimizer.init(params)), ()

    def local_update(server, client, data, key):
        params, metrics = local_training(loss_fn, client_optimizer, server.params, data)
        steps = data.num_steps.astype(jnp.float32)
        # |a_i|: sum over steps of (1 - momentum^(steps left)) / (1 - momentum).
        effective = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
        change = difference(params, server.params)
        direction = jax.tree.map(lambda d: d / jnp.maximum(effective, 1.0), change)
        update = {"direction": direction, "steps": effective}
        weight = example_weight(data.num_examples, uniform_weights)
        return LocalResult(update, weight, client, metrics)

    def server_update(server, aggregate):
        steps = aggregate.update["steps"]
        change = jax.tree.map(lambda d: steps * d, aggregate.update["direction"])
        return ServerState(*server_step(optimizer, server.params, server.optimizer, change))

    return Algorithm("fed_nova", init, local_update, server_update)
