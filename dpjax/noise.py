"""Noise as optax gradient transformations on an already clipped sum."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dpjax.errors import DpjaxError
from dpjax.types import PyTree, RandomKey, accumulation_dtype, require_key


class NoiseState(NamedTuple):
    """State of a privatizer that draws independent noise at every call."""

    key: RandomKey  # typed scalar key; never changes
    # The name is optax's; that a tuple has a method of this name does not matter to anyone.
    count: Int[Array, ""]  # int32, calls so far  # pyright: ignore[reportIncompatibleMethodOverride]


def gaussian_noise_like(tree: PyTree, stddev: float, key: RandomKey) -> PyTree:
    """Independent N(0, stddev^2) in every coordinate, drawn in float32 or wider.

    Each leaf has its own key, so a leaf's draw depends on its place and shape only, not on how
    the leaf is sharded over devices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> gaussian_noise_like(jnp.zeros(3, jnp.bfloat16), 1.0, jax.random.key(0)).dtype
      dtype('float32')
    """
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    draws = [
        stddev * jax.random.normal(k, leaf.shape, accumulation_dtype(leaf.dtype))
        for k, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, draws)


def gaussian_privatizer(stddev: float, key: RandomKey) -> optax.GradientTransformation:
    """Adds Gaussian noise to a clipped sum, afresh at every call.

    Args:
      stddev: absolute standard deviation per coordinate, in the units of the sum:
        ``noise_multiplier * grad_fn.sensitivity(neighboring_relation)``. 0 adds nothing.
      key: JAX random key; required, because two runs with one key release the same noise.

    Returns:
      An optax transformation. Its state, ``NoiseState(key, count)``, is all that a resume needs:
      call ``count`` draws from ``fold_in(key, count)``, so no draw is ever repeated or skipped.

    Guarantee:
      One call is the Gaussian mechanism on its input with noise multiplier stddev / sensitivity,
      under the neighbouring relation that the sensitivity was taken for. Noise is drawn and added
      in float32 whatever the dtype of the input, and the output keeps that width. The key and the
      count are secret: who knows them can subtract the noise. float32 sampling is not exact
      (Mironov 2012), which no accountant covers.

    Source: Dwork and Roth (2014), section 3.5.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> privatizer = gaussian_privatizer(stddev=2.0, key=jax.random.key(0))
      >>> total = jnp.zeros(10_000)
      >>> noisy, state = privatizer.update(total, privatizer.init(total))
      >>> print(noisy.std().round(1), state.count)
      2.0 1
    """
    if not (stddev >= 0 and math.isfinite(stddev)):
        raise DpjaxError(
            f"stddev is {stddev}; it must be finite and at least 0: "
            "noise_multiplier * grad_fn.sensitivity(neighboring_relation)"
        )
    key = require_key(key)

    def init(params: PyTree) -> NoiseState:
        del params
        return NoiseState(key, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        if stddev == 0:
            return updates, NoiseState(state.key, state.count + 1)
        noise = gaussian_noise_like(updates, stddev, jax.random.fold_in(state.key, state.count))
        noisy = jax.tree.map(lambda u, z: u.astype(z.dtype) + z, updates, noise)
        return noisy, NoiseState(state.key, state.count + 1)

    return optax.GradientTransformation(init, update)
