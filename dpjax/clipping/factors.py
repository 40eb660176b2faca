"""Norms and weighted sums of per-example gradients that are known only as products.

A gradient leaf of one example is a sum over positions k of outer products left[k] (x) right[k].
Shapes below: G independent matrices (layers, experts, heads; 1 where there are none), B examples,
K positions, M and N the two sides of the matrix. Everything is accumulated in float32 or wider.

Source: the Gram identity ||sum_k a_k (x) b_k||^2 = sum_kl <a_k, a_l> <b_k, b_l> is Goodfellow
(2015) for K = 1 and Li et al. (2022), "ghost clipping", for sequences; keeping the factors for
the second contraction is the book-keeping of Bu et al. (2023).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dpjax.types import accumulation_dtype

# Below this share of the sum of absolute terms, a Gram sum has lost too many digits to trust.
CANCELLATION = 1 / 256

# Below this share of the sum of its terms' norms, a gradient is made of rounding to 1 part in 10^4:
# another order of summation would give another gradient, which the norm does not bound.
ROUNDING = 1 / 400


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["index", "valid"], meta_fields=["size"]
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """One-hot left factors: position k writes to row ``index[k]``, if ``valid[k]``."""

    index: Int[Array, "G B K"]
    valid: Bool[Array, "G B K"]
    size: int  # M, rows of the matrix


class Segment(NamedTuple):
    """Some of the positions of a leaf."""

    left: Float[Array, "G B K M"] | Rows
    right: Float[Array, "G B K N"]


Segments: TypeAlias = Sequence[Segment]


def _dtype(*arrays: Array):
    is_double = any(a.dtype == jnp.float64 for a in arrays)
    return accumulation_dtype(jnp.float64 if is_double else jnp.float32)


def _dot(x: Array, y: Array, contracting: tuple, batching: tuple) -> Array:
    """Full-precision product: an accelerator's default may be narrower than what it multiplies."""
    wide = _dtype(x, y)
    if x.dtype != y.dtype:
        x, y = x.astype(wide), y.astype(wide)
    return lax.dot_general(
        x,
        y,
        (contracting, batching),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide,
    )


def _gram(x: Array, y: Array) -> Array:
    """Inner products of the positions of x with those of y: [G, B, Kx, Ky]."""
    if x.shape[0] == 1:  # one batch axis less makes simpler code for the common case
        return _dot(x[0], y[0], ((2,), (2,)), ((0,), (0,)))[None]
    return _dot(x, y, ((3,), (3,)), ((0, 1), (0, 1)))


def _left_gram(x: Array | Rows, y: Array | Rows) -> Array:
    if isinstance(x, Rows) and isinstance(y, Rows):
        same = x.index[..., :, None] == y.index[..., None, :]
        return same & x.valid[..., :, None] & y.valid[..., None, :]
    if isinstance(x, Rows):
        assert not isinstance(y, Rows)
        # <one-hot, y_l> is the entry of y_l in that row.
        index = jnp.where(x.valid, x.index, 0)[..., None, :]
        picked = jnp.take_along_axis(y, index, axis=3)  # [G, B, Ky, Kx]
        picked = jnp.where(x.valid[..., None, :], picked, jnp.zeros((), y.dtype))
        return jnp.swapaxes(picked, 2, 3)
    if isinstance(y, Rows):
        return jnp.swapaxes(_left_gram(y, x), 2, 3)
    return _gram(x, y)


def gram_squared_norms(segments: Segments) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Squared norms by Gram matrices, and which of them rounding may have spoilt.

    The terms of the sum can cancel. Where they cancel to less than `CANCELLATION` of their
    absolute sum, the result may be wrong by more than float32 rounding of the norm, even too
    small: such examples are flagged, for `product_squared_norms` to do again.
    """
    total = magnitude = jnp.zeros((), _dtype(segments[0].right))
    for i, x in enumerate(segments):
        for j, y in enumerate(segments[i:], i):
            left, right = _left_gram(x.left, y.left), _gram(x.right, y.right)
            if left.dtype == bool:
                terms = jnp.where(left, right, jnp.zeros((), right.dtype))
            else:
                terms = left.astype(right.dtype) * right
            weight = 1.0 if i == j else 2.0
            total = total + weight * jnp.sum(terms, axis=(0, 2, 3))
            magnitude = magnitude + weight * jnp.sum(jnp.abs(terms), axis=(0, 2, 3))
            if i == j and left.dtype != bool:
                total = total + _underflow(x, left, right)
    return jnp.maximum(total, 0.0), total < CANCELLATION * magnitude


def _underflow(segment: Segment, left: Array, right: Array) -> Array:
    """What squares too small for the type can have lost, at most; far below any clip norm.

    Without it, factors of 1e-25 beside factors of 1e20 would give a norm of zero.
    """
    assert not isinstance(segment.left, Rows)
    tiny = float(jnp.finfo(right.dtype).tiny)
    traces = [jnp.trace(g, axis1=2, axis2=3).sum(axis=0) for g in (left, right)]
    sizes = [x.shape[0] * x.shape[2] * x.shape[3] for x in (segment.left, segment.right)]
    return traces[0] * (sizes[1] * tiny) + traces[1] * (sizes[0] * tiny)


def products(segments: Segments) -> Float[Array, "G B M N"]:
    """The per-example gradients themselves."""
    total = None
    for left, right in segments:
        if isinstance(left, Rows):
            wide = right.astype(_dtype(right))
            part = jax.vmap(jax.vmap(_scatter, (0, 0, None)), (0, 0, None))(
                _index(left), wide, left.size
            )
        elif left.shape[0] == 1:
            part = _dot(left[0], right[0], ((1,), (1,)), ((0,), (0,)))[None]
        else:
            part = _dot(left, right, ((2,), (2,)), ((0, 1), (0, 1)))
        total = part if total is None else total + part
    assert total is not None
    return total


def product_squared_norms(segments: Segments) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Squared norms from the gradients themselves, and whose terms cancel to mere rounding."""

    def one(example: list[Segment]) -> Array:
        alone = jax.tree.map(lambda x: x[:, None], example)
        return jnp.sum(jnp.square(products(alone)))

    square = lax.map(one, _by_example(segments))
    terms = total_of([jnp.sum(_norms(x.left) * _norms(x.right), axis=(0, 2)) for x in segments])
    return square, square < jnp.square(ROUNDING * terms)


def _norms(x: Array | Rows) -> Array:
    """Norm of each position's factor: [G, B, K]."""
    if isinstance(x, Rows):
        return x.valid.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(_dtype(x))), axis=3))


def _by_example(segments: Segments) -> list[Segment]:
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), list(segments))


def total_of(arrays: Sequence[Array]) -> Array:
    """Their sum, without a broadcast zero to start from."""
    total = arrays[0]
    for x in arrays[1:]:
        total = total + x
    return total


def weighted_sum(
    segments: Segments,
    weights: Float[Array, " B"],
    is_unclean: Bool[Array, " B"],
    in_doubt: Bool[Array, " B"],
) -> Float[Array, "G M N"]:
    """Sum over examples of weights[b] times the gradient of b, without holding the gradients.

    Examples that are unclean (their factors may hold NaN or infinity) add exactly zero. Those in
    doubt, whose terms cancel, are added one by one from the very gradient that their norm was
    taken of; in the common contraction they would come out with other rounding errors, and those
    errors are all that they consist of.
    """

    def contract(parts: list[Segment], factor: Array) -> Array:
        return total_of(
            [
                _scatter_weighted(left, right, factor)
                if isinstance(left, Rows)
                else _dot_weighted(left, right, factor)
                for left, right in parts
            ]
        )

    def careful(parts: list[Segment]) -> Array:
        # 0 * NaN is NaN, so what takes no part is replaced, not multiplied.
        def kept(x):
            return jnp.where(is_unclean[None, :, None, None], jnp.zeros((), x.dtype), x)

        clean = [Segment(x if isinstance(x, Rows) else kept(x), kept(y)) for x, y in parts]
        alone = in_doubt & ~is_unclean

        def add(total: Array, example: tuple) -> tuple[Array, None]:
            parts, weight, chosen = example

            def added() -> Array:
                gradient = products(jax.tree.map(lambda x: x[:, None], parts))[:, 0]
                return total + weight.astype(total.dtype) * gradient

            return lax.cond(chosen, added, lambda: total), None

        start = contract(clean, jnp.where(alone, 0.0, weights).astype(weights.dtype))
        return lax.scan(add, start, (_by_example(clean), weights, alone))[0]

    # The careful way copies the factors, so it is taken only for a batch that needs it.
    needed = jnp.any(is_unclean | in_doubt)
    return lax.cond(needed, careful, lambda parts: contract(parts, weights), list(segments))


def _index(rows: Rows) -> Array:
    """Row numbers, one past the end where nothing is to be written."""
    return jnp.where(rows.valid, rows.index, rows.size)


def _scatter(index: Array, values: Array, size: int) -> Array:
    """A matrix of ``size`` rows, to which values[k] is added at index[k]."""
    empty = jnp.zeros((size, values.shape[-1]), values.dtype)
    return empty.at[index.reshape(-1)].add(values.reshape(-1, values.shape[-1]), mode="drop")


def _scatter_weighted(rows: Rows, right: Array, weights: Array) -> Array:
    wide = _dtype(right)
    values = right.astype(wide) * weights[None, :, None, None].astype(wide)
    return jax.vmap(_scatter, (0, 0, None))(_index(rows), values, rows.size)


def _dot_weighted(left: Array, right: Array, weights: Array) -> Array:
    """Contracts over examples and positions at once; the smaller factor carries the weights."""
    scaled, other = (left, right) if left.size <= right.size else (right, left)
    wide = scaled.astype(_dtype(left, right)) * weights[None, :, None, None].astype(
        _dtype(left, right)
    )
    if other.dtype == jnp.bfloat16:
        # A weighted factor rounded to bfloat16 could move an example past its clip norm. Two
        # bfloat16 terms hold it to 2^-17, and their products with the other factor are exact.
        # reduce_precision, because compilers may leave out a cast there and back.
        high = lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
        parts = [high.astype(jnp.bfloat16), (wide - high).astype(jnp.bfloat16)]
    else:
        parts = [wide]
    total = None
    for part in parts:
        pair = (part, other) if scaled is left else (other, part)
        flat = [x.reshape(x.shape[0], -1, x.shape[3]) for x in pair]
        if left.shape[0] == 1:
            product = _dot(flat[0][0], flat[1][0], ((0,), (0,)), ((), ()))[None]
        else:
            product = _dot(flat[0], flat[1], ((1,), (1,)), ((0,), (0,)))
        total = product if total is None else total + product
    assert total is not None
    return total
