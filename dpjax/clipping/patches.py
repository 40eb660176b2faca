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
) -> tuple[ConvSide, ConvSide, tuple[int, ...], tuple[int, ...] | None]:
    """Both sides of a convolution as einsum operands.

    out[b, f, s] = sum over n and p of padded_lhs[b, n, s * stride + p * dilation] * rhs[f, n, p].
    In groups, f splits into groups, and with it b (batch groups: the weight gradient of a
    convolution with feature groups) or the features n of the left side (feature groups).

    Returns:
      left, right, the labels of the result, and the shape that merges its group axis (or None).
    """
    p = eqn.params
    numbers = p["dimension_numbers"]
    lhs, rhs = (tuple(v.aval.shape) for v in eqn.invars)
    out = tuple(eqn.outvars[0].aval.shape)
    groups = max(p["batch_group_count"], p["feature_group_count"])
    by_batch = p["batch_group_count"] > 1
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
        return jnp.stack(pieces, axis=numbers.lhs_spec[0]).reshape(left_sizes)

    def split(label: int, size: int, grouped: bool) -> list[tuple[int, int]]:
        return [(g, groups), (label, size // groups)] if grouped else [(label, size)]

    left: list[tuple[int, int]] = []
    for axis, size in enumerate(lhs):
        if axis == numbers.lhs_spec[0]:
            left += [*zip(s, out_sizes, strict=True), *split(b, size, by_batch)]
        elif axis == numbers.lhs_spec[1]:
            left += split(n, size, groups > 1 and not by_batch)
        else:
            i = numbers.lhs_spec[2:].index(axis)
            left.append((k[i], kernel_sizes[i]))
    left_sizes = tuple(size for _, size in left)

    right: list[tuple[int, int]] = []
    for axis, size in enumerate(rhs):
        if axis == numbers.rhs_spec[0]:
            right += split(f, size, groups > 1)
        elif axis == numbers.rhs_spec[1]:
            right.append((n, size))
        else:
            right.append((k[numbers.rhs_spec[2:].index(axis)], size))
    right_sizes = tuple(size for _, size in right)

    result: list[int] = []
    for axis in range(len(out)):
        if axis == numbers.out_spec[0]:
            result.append(b)
        elif axis == numbers.out_spec[1]:
            result += [g, f] if groups > 1 else [f]
        else:
            result.append(s[numbers.out_spec[2:].index(axis)])
    return (
        ConvSide(tuple(label for label, _ in left), left_sizes, patches),
        ConvSide(
            tuple(label for label, _ in right),
            right_sizes,
            (lambda y: y.reshape(right_sizes)) if groups > 1 else None,
        ),
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
