"""Norms and the weighted sum of per-example gradients, in at least float32 throughout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpjax.types import PyTree, accumulation_dtype


def _leaf_squared_norms(leaf: Array) -> Float[Array, " batch"]:
    wide = leaf.astype(accumulation_dtype(leaf.dtype))
    return jnp.sum(jnp.square(wide), axis=tuple(range(1, leaf.ndim)))


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
    leaves = jax.tree.leaves(per_example_grads)
    return jnp.sqrt(sum(_leaf_squared_norms(leaf) for leaf in leaves))


def clip_coefficients(
    norms: Float[Array, " batch"],
    l2_clip_norm: float,
    is_padding_example: Bool[Array, " batch"] | None = None,
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """Each example's factor min(1, l2_clip_norm / norm), and whether it takes part at all.

    Padding and examples whose norm is not finite get factor 0 and take no part.
    """
    takes_part = jnp.isfinite(norms)
    if is_padding_example is not None:
        takes_part &= ~is_padding_example
    # norm = 0 gives 0 / 0 only in the untaken branch; max keeps the quotient defined.
    tiny = jnp.finfo(norms.dtype).tiny
    coefficients = jnp.minimum(1.0, l2_clip_norm / jnp.maximum(norms, tiny)).astype(norms.dtype)
    return jnp.where(takes_part, coefficients, 0.0), takes_part


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
    norms = per_example_l2_norms(per_example_grads)
    coefficients, takes_part = clip_coefficients(norms, l2_clip_norm, is_padding_example)

    any_unclean = ~jnp.all(jnp.isfinite(norms))

    def weighted_sum(leaf: Array) -> Array:
        wide = leaf.astype(accumulation_dtype(leaf.dtype))

        def dot(rows: Array) -> Array:
            # Full precision: accelerators may run a float32 dot in a narrower type, which would
            # break the sensitivity by more than rounding.
            return jnp.tensordot(
                coefficients.astype(rows.dtype), rows, axes=1, precision=jax.lax.Precision.HIGHEST
            )

        def clean(rows: Array) -> Array:
            # 0 * NaN is NaN, so rows that take no part are replaced, not multiplied.
            kept = takes_part.reshape((-1,) + (1,) * (rows.ndim - 1))
            return dot(jnp.where(kept, rows, jnp.zeros((), rows.dtype)))

        # Cleaning copies the leaf, so it runs only for a batch that needs it.
        return jax.lax.cond(any_unclean, clean, dot, wide)

    return jax.tree.map(weighted_sum, per_example_grads), norms
