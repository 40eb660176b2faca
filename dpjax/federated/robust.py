"""Means that a few clients cannot move at will: median, trimmed mean, Krum, norm bound.

Each is a ``combine(updates, weights) -> update`` for `Algorithm.combine`: leaves of ``updates`` are
float32[clients, ...]; rows of weight 0 are absent and influence nothing, even if they hold NaN.
They see single updates, so they exclude secure aggregation, and the sensitivity of none is that of
a sum, so they exclude `private`.
"""

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Algorithm
from dpjax.types import PyTree

Combine: TypeAlias = Callable[[PyTree, Float[Array, " clients"]], PyTree]


def robust(algorithm: Algorithm, combine: Combine) -> Algorithm:
    """The same algorithm, with ``combine`` in place of the weighted mean.

    Args:
      algorithm: one that the server may combine as it likes: neither `private` (a median's
        sensitivity is not a sum's) nor under an aggregator that hides single updates.
      combine: e.g. `coordinate_median`.

    Raises:
      DpjaxError: an algorithm that is summed, or has a ``combine`` already.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg
      >>> robust(fed_avg(lambda w, e: (w - e) ** 2, optax.sgd(0.1)), coordinate_median()).name
      'fed_avg+coordinate_median'
    """
    if algorithm.normalize_by is not None or algorithm.combine is not None:
        raise DpjaxError(
            f"{algorithm.name} needs the sum of updates or combines them already; make the robust "
            "algorithm from the plain one, without private, with_aggregator or another combine"
        )
    label = getattr(combine, "__name__", "combine")
    return algorithm._replace(name=f"{algorithm.name}+{label}", combine=combine)


def coordinate_median() -> Combine:
    """The median of every coordinate over present clients; the mean of the middle two of an even
    number.

    Weights only say who is present. Withstands less than half of the clients. Nobody gives zeros.

    Source: Yin et al. (2018), definition 1.

    Example:
      >>> rows = jnp.float32([[1, 5], [2, 6], [900, -900]])
      >>> coordinate_median()(rows, jnp.ones(3)).tolist()
      [2.0, 5.0]
    """

    def coordinate_median(updates, weights):
        present, count = _present(weights)

        def of_leaf(x):
            ordered = jnp.sort(_absent_as(x, present, jnp.inf), axis=0)
            low = jnp.maximum(count - 1, 0) // 2
            # Halves first: the sum of two large values could overflow.
            middle = 0.5 * ordered[low] + 0.5 * ordered[count // 2]
            return jnp.where(count > 0, middle, 0.0)

        return jax.tree.map(of_leaf, updates)

    return coordinate_median


def trimmed_mean(share: float) -> Combine:
    """The mean of every coordinate without its ``share`` smallest and ``share`` largest values.

    Of n present clients floor(share * n) are left out at each end. Weights only say who is present.
    Withstands that share of the clients. Nobody gives zeros.

    Args:
      share: at each end, in [0, 0.5).

    Source: Yin et al. (2018), definition 2.

    Example:
      >>> rows = jnp.float32([[1], [2], [3], [9], [-900]])
      >>> trimmed_mean(0.2)(rows, jnp.ones(5)).tolist()
      [2.0]
    """
    if not 0 <= share < 0.5:
        raise DpjaxError(f"share is {share}; it must be at least 0 and below 0.5")
    exact = Fraction(share).limit_denominator(10**6)  # 0.3 * 10 must not be 2.9999...

    def trimmed_mean(updates, weights):
        present, count = _present(weights)
        table = [int(exact * n) for n in range(weights.shape[0] + 1)]
        cut = jnp.asarray(table, jnp.int32)[count]

        def of_leaf(x):
            ordered = jnp.sort(_absent_as(x, present, jnp.inf), axis=0)
            rank = jnp.arange(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1))
            kept = (rank >= cut) & (rank < count - cut)
            total = jnp.sum(jnp.where(kept, ordered, 0.0), axis=0)
            return total / jnp.maximum(count - 2 * cut, 1).astype(jnp.float32)

        return jax.tree.map(of_leaf, updates)

    return trimmed_mean


def krum(num_byzantine: int, *, multi: int = 1) -> Combine:
    """The update that is nearest to its n - num_byzantine - 2 nearest others, or the mean of a few.

    Weights only say who is present. Below 2 * num_byzantine + 3 present clients nothing is known
    about any update, and the result is zeros. Costs n^2 distances.

    Args:
      num_byzantine: f, clients that may send anything.
      multi: m, updates of least distance that are averaged; no more than n - f are.

    Source: Blanchard et al. (2017), section 4; m > 1 is their Multi-Krum.

    Example:
      >>> rows = jnp.float32([[1.0], [1.1], [1.3], [50], [1.15]])
      >>> round(float(krum(1)(rows, jnp.ones(5))[0]), 4)
      1.1
    """
    if num_byzantine < 0 or multi < 1:
        raise DpjaxError(
            f"num_byzantine is {num_byzantine} and multi {multi}; use at least 0 and at least 1"
        )

    def krum(updates, weights):
        present, count = _present(weights)
        rows = jax.tree.map(lambda x: _absent_as(x, present, 0.0), updates)
        size = weights.shape[0]

        def distances(at):
            # Differences, not |a|^2 + |b|^2 - 2ab: beside one huge update that loses every digit.
            squares = [
                jnp.sum(jnp.square(x - x[at][None]).reshape(size, -1), axis=1)
                for x in jax.tree.leaves(rows)
            ]
            total = functools.reduce(jnp.add, squares)
            return jnp.where(present & (jnp.arange(size) != at), total, jnp.inf)

        nearest = jnp.sort(jax.lax.map(distances, jnp.arange(size)), axis=1)
        near = jnp.arange(size)[None] < count - num_byzantine - 2
        score = jnp.sum(jnp.where(near, nearest, 0.0), axis=1)
        # Absent after present, also where a present score overflows.
        order = jnp.lexsort((score, ~present))
        chosen = jnp.minimum(multi, count - num_byzantine)
        enough = count >= 2 * num_byzantine + 3
        picked = jnp.zeros(size, bool).at[order].set(jnp.arange(size) < chosen) & enough
        share = picked.astype(jnp.float32) / jnp.maximum(chosen, 1).astype(jnp.float32)
        return jax.tree.map(lambda x: _weighted_sum(_absent_as(x, picked, 0.0), share), rows)

    return krum


def norm_bounded(l2_norm: float) -> Combine:
    """The weighted mean of updates whose L2 norm over all leaves is cut to ``l2_norm``.

    One client moves the mean by at most its share of the weights times ``l2_norm``. Weights are
    what clients claim: use uniform weights where they may lie. Nobody gives zeros.

    Source: Sun et al. (2019), *Can you really backdoor federated learning?*, section 4.

    Example:
      >>> rows = jnp.float32([[3, 4], [0, 0.5]])
      >>> [round(float(x), 4) for x in norm_bounded(1.0)(rows, jnp.ones(2))]
      [0.3, 0.65]
    """
    if not 0 < l2_norm < float("inf"):
        raise DpjaxError(f"l2_norm is {l2_norm}; it must be positive and finite")

    def norm_bounded(updates, weights):
        present, _ = _present(weights)
        rows = jax.tree.map(lambda x: _absent_as(x, present, 0.0), updates)
        flat = [jnp.abs(x).reshape(x.shape[0], -1) for x in jax.tree.leaves(rows)]
        largest = functools.reduce(jnp.maximum, [jnp.max(x, axis=1, initial=0.0) for x in flat])
        unit = jnp.where(largest > 0, largest, 1.0)
        # Squares of x / largest: those of x overflow above 1e19, and a norm of inf cuts to 0.
        squares = [jnp.sum(jnp.square(x / unit[:, None]), axis=1) for x in flat]
        root = jnp.sqrt(functools.reduce(jnp.add, squares))
        relative = jnp.minimum(1.0, (l2_norm / unit) / jnp.where(root > 0, root, 1.0))
        share = weights.astype(jnp.float32) / jnp.maximum(jnp.sum(weights), 1e-30)
        return jax.tree.map(lambda x: _weighted_sum(x * _along(relative, x), share), rows)

    return norm_bounded


def _present(weights: Float[Array, " clients"]) -> tuple[Bool[Array, " clients"], Array]:
    present = weights > 0
    return present, jnp.sum(present, dtype=jnp.int32)


def _along(row: Array, x: Array) -> Array:
    return row.reshape(-1, *[1] * (x.ndim - 1))


def _absent_as(x: Array, present: Array, value: float) -> Array:
    return jnp.where(_along(present, x), x.astype(jnp.float32), np.float32(value))


def _weighted_sum(x: Array, share: Array) -> Array:
    return jnp.sum(x * _along(share, x), axis=0)
