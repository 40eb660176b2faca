"""One device's part of a round: its clients, one chunk after another, summed as they go."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpjax.federated.algorithm import Algorithm, LocalData
from dpjax.federated.clients import Cohort
from dpjax.types import PyTree, RandomKey


class Totals(NamedTuple):
    """Sums over clients; added over devices as they are."""

    update: PyTree  # float32, times weights; uint32 modulo 2^32; () where updates are collected
    weight: Float[Array, ""]  # float32
    num_clients: Int[Array, ""]  # int32, present
    num_rejected: Int[Array, ""]  # int32, of these
    metrics: dict[str, Float[Array, ""]]


class ShardResult(NamedTuple):
    """What a device hands on."""

    totals: Any  # Totals; or their specs, or ()
    clients: PyTree  # leaves [C, ...]: what each client keeps
    updates: PyTree  # leaves [C, ...] where the algorithm combines them itself, otherwise ()
    weights: Any  # float32[C], 0 where absent or rejected; or ()


class _One(NamedTuple):
    totals: Totals
    client: PyTree
    update: PyTree
    weight: Any


def run_shard(
    algorithm: Algorithm, at_once: int, server: Any, mine: PyTree, cohort: Cohort, key: RandomKey
) -> ShardResult:
    """Trains one shard's clients, ``at_once`` side by side.

    Memory is ``at_once`` updates and one sum, unless the algorithm has ``combine``. Padding that
    comes after the last client takes no time.

    Guarantee: padding, and clients whose update or weight is not finite, add nothing to any sum,
    whatever their numbers (uint32 leaves too), and keep their state.

    Args:
      mine: leaves [C, ...], the states of the shard's clients.
      cohort: one shard of it, without the leading axis.
    """
    slots = cohort.client.shape[0]
    collects = algorithm.combine is not None

    def one(client_state, place):
        data = LocalData(
            cohort.examples,
            cohort.batches,
            cohort.first_step[place],
            cohort.num_steps[place],
            cohort.steps_per_epoch[place],
            cohort.num_examples[place],
        )
        own_key = jax.random.fold_in(key, cohort.client[place])
        result = algorithm.local_update(server, client_state, data, own_key)
        update = jax.tree.map(_summand, result.update)
        finite = jnp.isfinite(result.weight) & (result.weight >= 0)
        for leaf in jax.tree.leaves(update):
            finite &= jnp.all(jnp.isfinite(leaf))
        # The last chunk may reach past the end, where indexing repeats the last client.
        present = cohort.is_client[place] & (place < slots)
        counts = present & finite
        weight = jnp.where(counts, result.weight.astype(jnp.float32), 0.0)
        # Not only a product: zero times a value that is not finite is not zero.
        update = jax.tree.map(lambda x: jnp.where(counts, x, jnp.zeros_like(x)), update)
        if not collects:
            update = jax.tree.map(lambda x: x if is_modular(x) else x * weight, update)
        metrics = {
            name: jnp.where(counts, x.astype(jnp.float32), 0.0)
            for name, x in result.metrics.items()
        }
        kept = jax.tree.map(
            lambda new, old: jnp.where(counts, new, old), result.client, client_state
        )
        totals = Totals(
            () if collects else update,
            weight,
            present.astype(jnp.int32),
            (present & ~finite).astype(jnp.int32),
            metrics,
        )
        return _One(totals, kept, update if collects else (), weight if collects else ())

    def step(number, carry):
        if at_once == 1:
            places = number
            found = one(_take_at(carry.clients, places), places)
            added = found.totals
        else:
            places = number * at_once + jnp.arange(at_once)
            found = jax.vmap(one)(_take_at(carry.clients, places), places)
            added = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), found.totals)
        return ShardResult(
            jax.tree.map(jnp.add, carry.totals, added),
            *jax.tree.map(
                lambda all_, new: all_.at[places].set(new, mode="drop"), carry[1:], found[1:]
            ),
        )

    shapes = jax.eval_shape(one, _take_at(mine, 0), jnp.zeros((), jnp.int32))
    nothing = ShardResult(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.totals),
        mine,
        *jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), shapes[2:]),
    )
    # Clients come first in a shard, so that what is left is padding.
    chunks = -(-jnp.sum(cohort.is_client, dtype=jnp.int32) // at_once)
    return jax.lax.fori_loop(0, chunks, step, nothing)


def is_modular(x: Array) -> bool:
    """Whether a leaf of an update is summed modulo 2^32."""
    return x.dtype == jnp.uint32


def _summand(x: Array) -> Array:
    return x if is_modular(x) else x.astype(jnp.float32)


def _take_at(tree: PyTree, places: Any) -> PyTree:
    return jax.tree.map(lambda x: jnp.take(x, places, axis=0, mode="clip"), tree)
