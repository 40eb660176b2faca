"""What a federated algorithm is: three pure functions. Each algorithm has a file of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dpjax.federated.convolutions import canonical_convolutions
from dpjax.types import LossFn, PyTree, RandomKey


class LocalData(NamedTuple):
    """One client's share of a round, as its local update sees it, inside the compiled round."""

    examples: PyTree  # leaves [M, ...], its shard's; only rows in ``batches`` are its own
    batches: Int[Array, "total width"]  # its shard's
    first_step: Int[Array, ""]
    num_steps: Int[Array, ""]  # 0 where there is nothing to train on
    steps_per_epoch: Int[Array, ""]
    num_examples: Int[Array, ""]

    def batch(self, step: Int[Array, ""]) -> tuple[PyTree, Bool[Array, " width"]]:
        """The examples of a local step with a leading axis, and which of them are real."""
        at = jnp.clip(self.first_step + step, 0, self.batches.shape[0] - 1)
        rows = self.batches[at]
        # Padding repeats the client's own first row: another's could bring a NaN, which gradients
        # carry through any mask.
        own = jnp.where(rows >= 0, rows, jnp.maximum(rows[0], 0))
        return jax.tree.map(lambda x: x[own], self.examples), rows >= 0


class LocalResult(NamedTuple):
    """What a client sends, and what it keeps."""

    # Summed over clients. Float leaves: float32, each times its weight. uint32 leaves: modulo 2^32.
    update: PyTree
    weight: Float[Array, ""]  # float32, at least 0
    client: PyTree  # its state for the next time that it takes part
    metrics: dict[str, Float[Array, ""]]  # float32 sums over examples; divided by their number


class Aggregate(NamedTuple):
    """What the server gets: never a single client's update."""

    # Float leaves: the sum divided by the weights, or by ``normalize_by``. uint32: the sum itself.
    update: PyTree
    weight: Float[Array, ""]  # float32, sum of weights
    num_clients: Int[Array, ""]  # int32, that took part


class Algorithm(NamedTuple):
    """A federated algorithm.

    Attributes:
      name: for records and errors.
      init: ``init(params) -> (server state, state of a client that never took part)``. The server
        state is any pytree with a ``params`` field or key; a client without state has ().
      local_update: ``local_update(server, client, data, key) -> LocalResult``, on one client.
      server_update: ``server_update(server, aggregate) -> server``.
      normalize_by: public constant that divides the sum, as privacy needs; a round without clients
        then is a round like any other. None divides by the realised weights, and a round without
        any weight moves nothing.
      combine: ``combine(updates, weights) -> update`` in place of the weighted mean, with a leading
        axis of clients in no certain order. Rows of weight 0 (absent, rejected, padding) are zeros
        and must not count. Costs memory for every client's update; not with ``normalize_by``.
    """

    name: str
    init: Callable[[PyTree], tuple[Any, PyTree]]
    local_update: Callable[[Any, PyTree, LocalData, RandomKey], LocalResult]
    server_update: Callable[[Any, Aggregate], Any]
    normalize_by: float | None = None
    combine: Callable[[PyTree, Float[Array, " clients"]], PyTree] | None = None


def batch_gradient(
    loss_fn: LossFn, params: PyTree, examples: PyTree, is_real: Bool[Array, " width"]
) -> tuple[PyTree, Float[Array, ""], Float[Array, ""]]:
    """Mean gradient over a batch's real examples, the sum of their losses, and their number."""

    def total(params):
        losses = jax.vmap(loss_fn, (None, 0))(params, examples)
        # Not a product: a padding row may have a loss that is not finite.
        losses = jnp.where(is_real, losses, 0.0)
        return jnp.sum(losses) / jnp.maximum(count, 1.0), jnp.sum(losses)

    count = jnp.sum(is_real).astype(jnp.float32)
    # Local steps are a loop, where XLA's CPU compiler is slow on convolutions as they come.
    slope = canonical_convolutions(jax.value_and_grad(total, has_aux=True))
    (_, losses), gradient = slope(params)
    return gradient, losses.astype(jnp.float32), count


def local_training(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    data: LocalData,
    *,
    correct: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> tuple[PyTree, dict[str, Float[Array, ""]]]:
    """A client's steps from ``params``: its own parameters after them, and its training loss.

    Runs exactly ``data.num_steps`` steps, whatever other clients have.

    Args:
      correct: ``correct(gradient, params)`` before the optimizer, e.g. a proximal term.

    Returns:
      Parameters, and {"loss", "examples"}: sums over the examples that were seen.
    """

    def step(number, carry):
        params, state, loss, seen = carry
        examples, is_real = data.batch(number)
        gradient, losses, count = batch_gradient(loss_fn, params, examples, is_real)
        if correct is not None:
            gradient = correct(gradient, params)
        # Optax mixes dtypes in bias corrections.
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, loss + losses, seen + count

    zero = jnp.zeros((), jnp.float32)
    start = params, optimizer.init(params), zero, zero
    params, _, loss, seen = jax.lax.fori_loop(0, data.num_steps, step, start)
    return params, {"loss": loss, "examples": seen}


def difference(after: PyTree, before: PyTree) -> PyTree:
    """``after - before``, leaf by leaf, in float32."""
    return jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), after, before)


def server_step(
    optimizer: optax.GradientTransformation, params: PyTree, state: PyTree, update: PyTree
) -> tuple[PyTree, PyTree]:
    """One step of a server optimizer on the pseudo-gradient ``-update`` (Reddi et al., 2021)."""
    gradient = jax.tree.map(lambda u, p: -u.astype(p.dtype), update, params)
    with jax.numpy_dtype_promotion("standard"):
        change, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, change), state


def example_weight(num_examples: Int[Array, ""], uniform: bool) -> Float[Array, ""]:
    """1 for everybody, or the number of examples; float32."""
    return jnp.ones((), jnp.float32) if uniform else num_examples.astype(jnp.float32)
