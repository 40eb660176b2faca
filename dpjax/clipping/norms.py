"""Norms and the weighted sum of per-example gradients, in at least float32 throughout."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from dpjax.clipping.rules import ClipRule
from dpjax.types import PyTree, accumulation_dtype

SMALL_LEAF = 2**18  # numbers in all its per-example gradients


def squared_norms(rows: Array, axis: int = 0) -> Float[Array, " batch"]:
    """Squared L2 norm of each row along ``axis``, summed in float32 or wider."""
    wide = rows.astype(accumulation_dtype(rows.dtype))
    return jnp.sum(jnp.square(wide), axis=tuple(i for i in range(rows.ndim) if i != axis))


def weighted_sums(
    rows: Sequence[Array],
    weights: Sequence[Float[Array, " batch"]],
    is_unclean: Bool[Array, " batch"],
    axes: Sequence[int],
) -> list[Array]:
    """For each leaf, the sum over b of weights[b] * rows[b]; unclean rows add exactly zero.

    Args:
      rows: per-example gradients of the leaves.
      weights: of each leaf.
      is_unclean: examples whose rows may hold NaN or infinity.
      axes: where the example axis of each leaf lies.
    """

    def dot(x: Array, factor: Array, axis: int) -> Array:
        # Full precision: accelerators may run a float32 dot in a narrower type, which would
        # break the sensitivity by more than rounding.
        x = x.astype(accumulation_dtype(x.dtype))
        return jnp.tensordot(
            factor.astype(x.dtype), x, axes=((0,), (axis,)), precision=lax.Precision.HIGHEST
        )

    def clean(x: Array, axis: int) -> Array:
        # 0 * NaN is NaN, so rows that take no part are replaced, not multiplied.
        shape = [1] * x.ndim
        shape[axis] = -1
        return jnp.where(is_unclean.reshape(shape), jnp.zeros((), x.dtype), x)

    def sums(numbers: Sequence[int]) -> list[Array]:
        def plain(leaves: Sequence[Array]) -> list[Array]:
            return [dot(x, weights[i], axes[i]) for i, x in zip(numbers, leaves, strict=True)]

        def careful(leaves: Sequence[Array]) -> list[Array]:
            return plain([clean(x, axes[i]) for i, x in zip(numbers, leaves, strict=True)])

        # Cleaning copies the rows, so it runs only for a batch that needs it.
        return lax.cond(jnp.any(is_unclean), careful, plain, [rows[i] for i in numbers])

    # Every branch costs compilation time, and a branch over many leaves holds all their copies
    # at once: the small leaves share one.
    small = [i for i, x in enumerate(rows) if x.size < SMALL_LEAF]
    together = [small] if small else []
    total: dict[int, Array] = {}
    for numbers in [*together, *([i] for i in range(len(rows)) if i not in small)]:
        total.update(zip(numbers, sums(numbers), strict=True))
    return [total[i] for i in range(len(rows))]


def leaf_paths(tree: PyTree) -> list[str]:
    """The path of each leaf, such as "blocks/0/kernel".

    Example:
      >>> leaf_paths({"dense": {"kernel": 1.0, "bias": 2.0}})
      ['dense/bias', 'dense/kernel']
    """
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def per_example_l2_norms(per_example_grads: PyTree) -> Float[Array, " batch"]:
    """L2 norm of each example's whole gradient.

    Args:
      per_example_grads: pytree whose leaves have a leading axis ``batch``, any float dtype.

    Returns:
      float32[batch] (float64 if a leaf is float64). Squares are taken and summed in that type
      whatever the leaf's: a bfloat16 accumulator stops growing at 256 equal terms.

    Example:
      >>> import jax.numpy as jnp
      >>> print(per_example_l2_norms({"w": jnp.ones((2, 900), jnp.bfloat16)}))
      [30. 30.]
    """
    return jnp.sqrt(sum(squared_norms(leaf) for leaf in jax.tree.leaves(per_example_grads)))


def clip_and_sum(
    per_example_grads: PyTree,
    l2_clip_norm: float,
    is_padding_example: Bool[Array, " batch"] | None = None,
) -> tuple[PyTree, Float[Array, " batch"]]:
    """Clips each example's gradient to ``l2_clip_norm`` and sums over the batch.

    Args:
      per_example_grads: pytree whose leaves have a leading axis ``batch``.
      l2_clip_norm: largest L2 norm one example may contribute; ``inf`` clips nothing.
      is_padding_example: True where a row is not an example.

    Returns:
      The sum (leaves without the batch axis, float32 or wider) and the norms before clipping,
      float32[batch].

    Guarantee:
      Adding or removing one example moves the sum by at most ``l2_clip_norm`` in L2 (up to
      float32 rounding of the sum). An example whose gradient holds a NaN or an infinity, or whose
      squared norm overflows float32, adds exactly zero, as if it were absent; padding likewise.
      Nothing is divided by a realised count.

    Example:
      >>> import jax.numpy as jnp
      >>> grads = jnp.array([[6.0, 8.0], [0.375, 0.25], [jnp.nan, 1.0]])
      >>> print(clip_and_sum(grads, 5.0)[0])
      [3.375 4.25 ]
    """
    rows, structure = jax.tree.flatten(per_example_grads)
    factors, norms, is_unclean = ClipRule(l2_clip_norm).factors(
        [squared_norms(x) for x in rows], leaf_paths(per_example_grads), is_padding_example, None
    )
    sums = weighted_sums(rows, factors, is_unclean, [0] * len(rows))
    return jax.tree.unflatten(structure, sums), norms
