"""Canaries for the DP step itself: examples whose gradient is a direction that the auditor chose.

They are the worst case that a guarantee speaks about. A released gradient's projection on a
direction tells whether its canary was in the batch, up to the noise.
"""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpjax.errors import DpjaxError
from dpjax.types import LossFn, PyTree, RandomKey, TrainingData, accumulation_dtype, require_key

REAL = -1
"""The field ``canary`` of an example that is none."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiracDirections:
    """Single coordinates of the parameters, one for each canary."""

    leaf: Int[Array, " num"]  # int32, which leaf, in jax.tree.leaves' order
    index: Int[Array, " num"]  # int32, which of its entries, in C order

    def __len__(self) -> int:
        return self.leaf.shape[0]

    def dot(self, number: Int[Array, ""], tree: PyTree) -> Float[Array, ""]:
        """Inner product of direction ``number`` with a pytree like the parameters."""
        leaf, index = self.leaf[number], self.index[number]
        total = jnp.zeros((), jnp.float32)
        for place, array in enumerate(jax.tree.leaves(tree)):
            # Clipped, because an entry that another leaf has may be outside of this one.
            value = array.reshape(-1)[jnp.minimum(index, array.size - 1)].astype(total.dtype)
            total = total + jnp.where(leaf == place, value, jnp.zeros_like(value))
        return total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomDirections:
    """Unit vectors of uniformly random direction, made again from their keys at every use."""

    keys: RandomKey  # typed key[num]

    def __len__(self) -> int:
        return self.keys.shape[0]

    def dot(self, number: Int[Array, ""], tree: PyTree) -> Float[Array, ""]:
        """Inner product of direction ``number`` with a pytree like the parameters."""
        leaves = jax.tree.leaves(tree)
        ends = np.cumsum([leaf.size for leaf in leaves]).tolist()
        drawn = jax.random.normal(self.keys[number], (ends[-1],), jnp.float32)
        drawn = drawn / jnp.linalg.norm(drawn)
        parts = [
            jnp.dot(drawn[end - leaf.size : end], leaf.reshape(-1).astype(jnp.float32))
            for end, leaf in zip(ends, leaves, strict=True)
        ]
        return functools.reduce(jnp.add, parts)


Directions = DiracDirections | RandomDirections


def dirac_directions(params: PyTree, num: int, key: RandomKey) -> DiracDirections:
    """``num`` different coordinates, uniformly drawn over all parameters.

    Args:
      params: pytree of arrays, each with fewer than 2^31 entries.

    Raises:
      DpjaxError: for fewer parameters than canaries.

    Source: Nasr et al. (2023), "Tight auditing of differentially private machine learning".

    Example:
      >>> params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
      >>> directions = dirac_directions(params, 5, jax.random.key(0))
      >>> sorted(zip(directions.leaf.tolist(), directions.index.tolist()))
      [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    """
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(params)], np.int64)
    total = int(sizes.sum())
    if not 1 <= num <= total:
        raise DpjaxError(f"num is {num}; pass 1 to {total}, the number of parameters")
    if sizes.max() >= 2**31:
        raise DpjaxError(f"a leaf has {sizes.max()} entries; split it: an index must fit int32")
    # numpy's choice takes memory for the draws alone, and 64-bit places; its seed is the key.
    words = np.asarray(jax.random.key_data(require_key(key))).reshape(-1)
    places = np.random.default_rng(words.tolist()).choice(total, num, replace=False, shuffle=True)
    ends = np.cumsum(sizes)
    leaf = np.searchsorted(ends, places, side="right")
    index = places - (ends - sizes)[leaf]
    return DiracDirections(jnp.asarray(leaf, jnp.int32), jnp.asarray(index, jnp.int32))


def random_directions(params: PyTree, num: int, key: RandomKey) -> RandomDirections:
    """``num`` independent unit vectors, normalised Gaussians over all parameters together.

    Only keys are kept. Each use takes the memory of one copy of the parameters, for every example
    of a microbatch under ``vmap``.

    Raises:
      DpjaxError: for a number below 1, or no parameters.

    Example:
      >>> directions = random_directions(jnp.zeros(4), 2, jax.random.key(0))
      >>> direction = jax.grad(lambda w: directions.dot(1, w))(jnp.zeros(4))
      >>> bool(abs(jnp.linalg.norm(direction) - 1) < 1e-6)
      True
    """
    if num < 1 or not jax.tree.leaves(params):
        raise DpjaxError(f"num is {num}; pass at least 1, and parameters that are not empty")
    return RandomDirections(jax.random.split(require_key(key), num))


@dataclasses.dataclass(frozen=True, eq=False)
class _MixedLoss:
    loss_fn: LossFn
    directions: Directions
    scale: float

    def __call__(self, params: PyTree, example: dict[str, Any]) -> Float[Array, ""]:
        if "canary" not in example:
            raise DpjaxError(
                f"the example has no field 'canary', only {sorted(example)}; train on "
                "CanaryRows(dataset, included)"
            )
        canary = example["canary"]
        rest = {name: value for name, value in example.items() if name != "canary"}
        loss = self.loss_fn(params, rest)
        linear = self.directions.dot(jnp.maximum(canary, 0), params)
        linear = (jnp.float32(self.scale) * linear).astype(loss.dtype)
        return jnp.where(canary >= 0, linear, loss)


def with_gradient_canaries(loss_fn: LossFn, directions: Directions, scale: float) -> LossFn:
    """A loss for real examples and gradient canaries in one data set.

    Args:
      loss_fn: ``loss_fn(params, example)`` for ONE real example, a dict.
      directions: one for each canary.
      scale: length of a canary's gradient. Well above the clip norm, say 100 times, its
        contribution is the direction at the clip norm.

    Returns:
      A loss for examples with the further field ``canary``: int32[], the canary's number, or -1
      for a real one, whose loss and gradient are those of ``loss_fn``. It works under
      `clipped_grad` with every method. A canary example still needs the other fields, at values
      where the real gradient is finite (`CanaryRows` repeats real rows): NaN times zero is NaN, and
      clipping would drop the canary.

    Raises:
      DpjaxError: for a scale that is not positive and finite.

    Example:
      >>> directions = dirac_directions(jnp.zeros(3), 3, jax.random.key(0))
      >>> loss_fn = with_gradient_canaries(lambda w, e: jnp.sum(w * e["x"]), directions, 5.0)
      >>> gradient = jax.grad(loss_fn)(jnp.zeros(3), {"x": jnp.ones(3), "canary": jnp.int32(2)})
      >>> sorted(gradient.tolist())
      [0.0, 0.0, 5.0]
    """
    if not 0 < scale < float("inf"):
        raise DpjaxError(f"scale is {scale}; use a positive number, e.g. 100 times the clip norm")
    return _MixedLoss(loss_fn, directions, float(scale))


def canary_scores(noisy_grads: PyTree, directions: Directions) -> np.ndarray:
    """Projections of a released gradient on every direction: float64[num], higher = included.

    With plain SGD, parameters before minus after serve as well. Add the scores of all iterations.

    Args:
      noisy_grads: pytree like the parameters.

    Example:
      >>> directions = dirac_directions(jnp.zeros(3), 3, jax.random.key(0))
      >>> print(np.sort(canary_scores(jnp.array([1.0, 2.0, 3.0]), directions)))
      [1. 2. 3.]
    """
    return np.asarray(_projections(noisy_grads, directions), np.float64)


@jax.jit
def _projections(noisy_grads, directions):
    wide = jax.tree.map(lambda x: x.astype(accumulation_dtype(x.dtype)), noisy_grads)
    numbers = jnp.arange(len(directions), dtype=jnp.int32)
    # One after the other: all directions at once would take num copies of the parameters.
    return jax.lax.map(lambda number: directions.dot(number, wide), numbers)


@dataclasses.dataclass(frozen=True, eq=False)
class CanaryRows:
    """A data set of dicts with the field ``canary`` and the included canaries behind its rows.

    Attributes:
      dataset: the real examples; its other fields are repeated in canary rows, where the loss of
        `with_gradient_canaries` does not look at them.
      included: bool[num], e.g. `fair_coins`.

    Example:
      >>> from dpjax.data import ArrayDataset
      >>> rows = CanaryRows(ArrayDataset({"x": np.arange(2.0)}), np.array([False, True]))
      >>> len(rows), rows.take(np.array([0, 2]))["canary"].tolist()
      (3, [-1, 1])
    """

    dataset: TrainingData
    included: np.ndarray

    def __post_init__(self):
        if np.asarray(self.included).dtype != np.bool_ or np.ndim(self.included) != 1:
            raise DpjaxError("included must be a list of bools, one for each canary")
        if len(self.dataset) == 0:
            raise DpjaxError("the data set is empty; give it at least one record")

    def __len__(self) -> int:
        return len(self.dataset) + int(np.sum(self.included))

    def take(self, indices: Any) -> dict[str, Any]:
        """Examples at ``indices``; ``canary`` is int32, -1 for real ones."""
        places, real = np.asarray(indices), len(self.dataset)
        if places.size and (places.min() < 0 or places.max() >= len(self)):
            raise DpjaxError(f"an index is outside the data set of {len(self)} examples")
        is_real = places < real
        numbers = np.append(np.flatnonzero(self.included), REAL)
        canary = np.where(is_real, REAL, numbers[np.where(is_real, -1, places - real)])
        return {**self.dataset.take(places % real), "canary": canary.astype(np.int32)}

    def fingerprint(self) -> str:
        """SHA-256 of the real rows, marked with the canaries' bits."""
        bits = np.packbits(self.included).tobytes()
        mark = f"{self.dataset.fingerprint()} {len(self.included)} ".encode()
        return hashlib.sha256(mark + bits).hexdigest()
