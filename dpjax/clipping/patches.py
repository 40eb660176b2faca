"""A convolution as a matrix product, so that its weight gradient has two operands like others."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class ConvSide(NamedTuple):
    """Labels and sizes of one side's axes after ``view``."""

    labels: tuple[int, ...]
    sizes: tuple[int, ...]
    view: Callable[[Array], Array] | None


def conv_operands(
    eqn: Any, fresh: Callable[[], int]
) -> tuple[ConvSide, ConvSide, tuple[int, ...], tuple[int, ...] | None] | None:
    """Both sides of a convolution as einsum operands, or None where features are grouped.

    out[b, f, s] = sum over n and p of padded_lhs[b, n, s * stride + p * dilation] * rhs[f, n, p].
    With batch groups (the weight gradient of a grouped convolution) b and f split into groups.

    Returns:
      left, right, the labels of the result, and the shape that merges its group axis (or None).
    """
    p = eqn.params
    if p["feature_group_count"] != 1:
        return None
    numbers = p["dimension_numbers"]
    lhs, rhs = (tuple(v.aval.shape) for v in eqn.invars)
    out = tuple(eqn.outvars[0].aval.shape)
    groups = p["batch_group_count"]
    spatial = len(lhs) - 2
    b, n, f, g = fresh(), fresh(), fresh(), fresh()
    s, k = [fresh() for _ in range(spatial)], [fresh() for _ in range(spatial)]
    out_sizes = [out[i] for i in numbers.out_spec[2:]]
    kernel_sizes = [rhs[i] for i in numbers.rhs_spec[2:]]

    def patches(x: Array) -> Array:
        config = [(0, 0, 0)] * x.ndim
        for i, (low, high), dilation in zip(
            numbers.lhs_spec[2:], p["padding"], p["lhs_dilation"], strict=True
        ):
            config[i] = (low, high, dilation - 1)
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
        # One strided slice for each position of the result: in a weight gradient these are the
        # few positions of the kernel, and the slices are as large as the activation.
        pieces = []
        for position in _positions(out_sizes):
            start, stop, stride = [0] * x.ndim, list(x.shape), [1] * x.ndim
            for axis, at, step, size, gap in zip(
                numbers.lhs_spec[2:],
                position,
                p["window_strides"],
                kernel_sizes,
                p["rhs_dilation"],
                strict=True,
            ):
                start[axis] = at * step
                stop[axis] = at * step + (size - 1) * gap + 1
                stride[axis] = gap
            pieces.append(lax.slice(x, start, stop, stride))
        axis = numbers.lhs_spec[0]
        stacked = jnp.stack(pieces, axis=axis)
        return _split(_split(stacked, axis, out_sizes), axis + spatial, batch_split)

    batch = lhs[numbers.lhs_spec[0]]
    batch_split = [groups, batch // groups] if groups > 1 else [batch]
    left_labels: list[int] = []
    left_sizes: list[int] = []
    for axis, size in enumerate(lhs):
        if axis == numbers.lhs_spec[0]:
            left_labels += [*s, *([g, b] if groups > 1 else [b])]
            left_sizes += [*out_sizes, *batch_split]
        elif axis == numbers.lhs_spec[1]:
            left_labels.append(n)
            left_sizes.append(size)
        else:
            i = numbers.lhs_spec[2:].index(axis)
            left_labels.append(k[i])
            left_sizes.append(kernel_sizes[i])

    features = rhs[numbers.rhs_spec[0]]
    feature_split = [groups, features // groups] if groups > 1 else [features]
    right_labels: list[int] = []
    right_sizes: list[int] = []
    for axis, size in enumerate(rhs):
        if axis == numbers.rhs_spec[0]:
            right_labels += [g, f] if groups > 1 else [f]
            right_sizes += feature_split
        elif axis == numbers.rhs_spec[1]:
            right_labels.append(n)
            right_sizes.append(size)
        else:
            right_labels.append(k[numbers.rhs_spec[2:].index(axis)])
            right_sizes.append(size)

    def split_features(y: Array) -> Array:
        return _split(y, numbers.rhs_spec[0], feature_split)

    result: list[int] = []
    for axis in range(len(out)):
        if axis == numbers.out_spec[0]:
            result.append(b)
        elif axis == numbers.out_spec[1]:
            result += [g, f] if groups > 1 else [f]
        else:
            result.append(s[numbers.out_spec[2:].index(axis)])
    return (
        ConvSide(tuple(left_labels), tuple(left_sizes), patches),
        ConvSide(tuple(right_labels), tuple(right_sizes), split_features if groups > 1 else None),
        tuple(result),
        out if groups > 1 else None,
    )


def _positions(sizes: list[int]) -> list[tuple[int, ...]]:
    total = math.prod(sizes)
    positions = []
    for flat in range(total):
        place = []
        for size in reversed(sizes):
            flat, at = divmod(flat, size)
            place.append(at)
        positions.append(tuple(reversed(place)))
    return positions


def _split(x: Array, axis: int, sizes: list[int]) -> Array:
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
