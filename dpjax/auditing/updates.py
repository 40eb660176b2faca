"""What a server sees of one client's update: the views that reconstruction attacks are run on."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.types import PyTree, RandomKey, require_key

UpdateView = Literal["plain", "clipped", "noised", "aggregated"]
_FIXED_POINT = 2**20  # steps in one unit of an aggregated update


def observe_update(
    updates: Sequence[PyTree],
    view: UpdateView,
    *,
    l2_clip_norm: float = 1.0,
    noise_multiplier: float = 1.0,
    key: RandomKey | None = None,
) -> PyTree:
    """The update of the first client as the server gets to see it.

    * "plain": as it is.
    * "clipped": scaled down to the clip norm. A known direction is all that most attacks need.
    * "noised": clipped, and with Gaussian noise of ``noise_multiplier * l2_clip_norm``.
    * "aggregated": only the sum over all clients, of clipped updates in fixed point, as secure
      aggregation hands it out. This is the ideal view: what a protocol leaks beside is not in it.

    Args:
      updates: one pytree of float arrays for each client; the first is the victim.
      view: what to see.
      l2_clip_norm: above 0; in the units of the updates. Not used by "plain".
      noise_multiplier: noise stddev / clip norm, at least 0; of "noised".
      key: JAX random key, for "noised" only.

    Returns:
      A pytree like an update, float32.

    Raises:
      DpjaxError: an unknown view, no updates, one client to aggregate, or a missing key.

    Source: Bonawitz et al. (2017) for the sum; Geyer et al. (2017) for clients that clip.

    Example:
      >>> mine, other = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.0, 0.5])}
      >>> [f"{x:.2f}" for x in observe_update([mine, other], "clipped")["w"].tolist()]
      ['0.60', '0.80']
      >>> [f"{x:.2f}" for x in observe_update([mine, other], "aggregated")["w"].tolist()]
      ['0.60', '1.30']
    """
    if not updates:
        raise DpjaxError("there are no updates; give at least the victim's")
    if not l2_clip_norm > 0 or noise_multiplier < 0:
        raise DpjaxError(
            f"l2_clip_norm is {l2_clip_norm} and noise_multiplier {noise_multiplier}; use above 0"
            " and at least 0"
        )
    victim = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), updates[0])
    if view == "plain":
        return victim
    if view == "clipped":
        return _clipped(victim, l2_clip_norm)
    if view == "noised":
        leaves, structure = jax.tree.flatten(_clipped(victim, l2_clip_norm))
        keys = jax.random.split(require_key(key), len(leaves))
        stddev = jnp.float32(noise_multiplier * l2_clip_norm)
        noisy = [
            x + stddev * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(structure, noisy)
    if view == "aggregated":
        if len(updates) < 2:
            raise DpjaxError("an aggregate of 1 client is that client's update; give at least 2")
        clipped = [_clipped(u, l2_clip_norm) for u in updates]
        return jax.tree.map(_fixed_point_sum, *clipped)
    raise DpjaxError(f"view {view!r} is unknown; use plain, clipped, noised or aggregated")


def _clipped(update: PyTree, l2_clip_norm: float) -> PyTree:
    update = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), update)
    norm = jnp.sqrt(jnp.stack([jnp.sum(x * x) for x in jax.tree.leaves(update)]).sum())
    scale = jnp.minimum(1.0, l2_clip_norm / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda x: x * scale, update)


def _fixed_point_sum(*parts: jax.Array) -> jax.Array:
    """Sums as integers, so that the order of clients leaves no trace in the rounding."""
    total = sum(np.rint(np.asarray(p, np.float64) * _FIXED_POINT).astype(np.int64) for p in parts)
    return jnp.asarray((np.asarray(total) / _FIXED_POINT).astype(np.float32))
