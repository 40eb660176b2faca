"""MIME-lite: clients use the server's optimizer state, which only full gradients move."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpjax.federated.algorithm import (
    Algorithm,
    LocalResult,
    batch_gradient,
    difference,
    example_weight,
)
from dpjax.types import LossFn, PyTree


class MimeState(NamedTuple):
    """Parameters, and the state of the optimizer that all clients use."""

    params: PyTree
    optimizer: PyTree


def mime_lite(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    uniform_weights: bool = False,
) -> Algorithm:
    """Clients step with the optimizer state of the round's beginning, never their own.

    Args:
      loss_fn: ``loss_fn(params, example) -> scalar`` for ONE example.
      optimizer: whose state (momentum, second moments) stays fixed during local steps; the server
        moves it by the mean full gradient of the clients at the round's beginning.
      uniform_weights: as in `fed_avg`.

    Source: Karimireddy et al. (2021), *Breaking the centralized barrier for cross-device federated
      learning*, algorithm 1, MimeLite.

    Example:
      >>> mime_lite(lambda w, e: (w - e) ** 2, optax.sgd(0.1, momentum=0.9)).name
      'mime_lite'
    """

    def init(params):
        return MimeState(params, optimizer.init(params)), ()

    def step_with(gradient, state, params):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradient, state, params)

    def local_update(server, client, data, key):
        zero = jnp.zeros((), jnp.float32)

        def step(number, carry):
            params, loss, seen = carry
            examples, is_real = data.batch(number)
            gradient, losses, count = batch_gradient(loss_fn, params, examples, is_real)
            change, _ = step_with(gradient, server.optimizer, params)
            return optax.apply_updates(params, change), loss + losses, seen + count

        params, loss, seen = jax.lax.fori_loop(0, data.num_steps, step, (server.params, zero, zero))

        def add(number, carry):
            total, seen = carry
            examples, is_real = data.batch(number)
            gradient, _, count = batch_gradient(loss_fn, server.params, examples, is_real)
            # The batch's mean times its number: the last one may be smaller.
            return jax.tree.map(
                lambda t, g: t + count * g.astype(jnp.float32), total, gradient
            ), seen + count

        nothing = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), server.params)
        epoch = jnp.minimum(data.steps_per_epoch, data.num_steps)
        total, in_epoch = jax.lax.fori_loop(0, epoch, add, (nothing, zero))
        gradient = jax.tree.map(lambda t: t / jnp.maximum(in_epoch, 1.0), total)
        update = {"params": difference(params, server.params), "gradient": gradient}
        weight = example_weight(data.num_examples, uniform_weights)
        return LocalResult(update, weight, client, {"loss": loss, "examples": seen})

    def server_update(server, aggregate):
        params = jax.tree.map(
            lambda p, d: p + d.astype(p.dtype), server.params, aggregate.update["params"]
        )
        gradient = jax.tree.map(
            lambda g, p: g.astype(p.dtype), aggregate.update["gradient"], server.params
        )
        _, state = step_with(gradient, server.optimizer, server.params)
        return MimeState(params, state)

    return Algorithm("mime_lite", init, local_update, server_update)
