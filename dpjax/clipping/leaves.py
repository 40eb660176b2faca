"""Gradient leaves as groups of like products: what `terms` found, in the shape `factors` needs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dpjax.clipping.factors import Rows, Segment
from dpjax.clipping.jaxprs import Inside, Place
from dpjax.clipping.products import Layout, Operand, Product, Region, Term

_EXAMPLE = -1  # label of the example axis


class Pair(NamedTuple):
    """One product of a group: its operands, which axes of each meet, and a factor."""

    left: Operand
    right: Operand
    group: tuple[int, ...]
    left_free: tuple[int, ...]
    right_free: tuple[int, ...]
    contracted: tuple[int, ...]
    scale: float


@dataclasses.dataclass(frozen=True)
class Group:
    """Products that add up in the same place: one matrix product over all their positions.

    Attributes:
      pairs: the products.
      sizes: (G, M, N) as in `factors`.
      core: sizes of the axes of the result, and for each the side it belongs to.
      layout: from the result to the leaf.
    """

    pairs: tuple[Pair, ...]
    sizes: tuple[int, int, int]
    core: tuple[tuple[str, int], ...]
    layout: tuple[Layout, ...]


def group_products(terms: Sequence[Term]) -> list[Group] | None:
    """Sorts products into groups; None if two groups might write to the same entry."""
    found: dict[Any, list[Pair]] = {}
    sizes: dict[Any, tuple[int, int, int]] = {}
    for term in terms:
        if not isinstance(term, Product):
            return None
        pair, core, size = _pair(term)
        if pair.right.rows is not None:
            return None
        key = (core, term.layout)
        found.setdefault(key, []).append(pair)
        sizes[key] = size
    groups = [Group(tuple(pairs), sizes[key], key[0], key[1]) for key, pairs in found.items()]
    if len(groups) > 1:
        boxes = [_box(tuple(n for _, n in g.core), g.layout) for g in groups]
        for i, one in enumerate(boxes):
            for other in boxes[i + 1 :]:
                if one is None or other is None or _overlap(one, other):
                    return None
    return groups


def _pair(term: Product) -> tuple[Pair, tuple[tuple[str, int], ...], tuple[int, int, int]]:
    left, right = term.lhs, term.rhs
    dims = left.dims() | right.dims()

    def labels(side: Operand) -> tuple[int, ...]:
        return (*side.labels, *([side.rows.label] if side.rows is not None else []))

    def free(one: Operand, other: Operand) -> tuple[int, ...]:
        return tuple(v for v in term.core if v in labels(one) and v not in labels(other))

    group = tuple(v for v in term.core if v in labels(left) and v in labels(right))
    contracted = tuple(v for v in left.labels if v in right.labels and v not in term.core)
    left_free, right_free = free(left, right), free(right, left)
    # The side of the first free axis is the left one, so that like products look alike; row
    # numbers are on the left in any case.
    first = next((v for v in term.core if v not in group), None)
    swap = first in right_free if left.rows is None else False
    if right.rows is not None:
        swap = True
    if swap:
        left, right, left_free, right_free = right, left, right_free, left_free
    side = (
        dict.fromkeys(group, "G") | dict.fromkeys(left_free, "M") | dict.fromkeys(right_free, "N")
    )
    core = tuple((side[v], dims[v]) for v in term.core)
    size = tuple(math.prod(dims[v] for v in part) for part in (group, left_free, right_free))
    pair = Pair(left, right, group, left_free, right_free, contracted, term.scale)
    return pair, core, (size[0], size[1], size[2])


def _box(shape: tuple[int, ...], layout: Sequence[Layout]) -> list[tuple[int, int]] | None:
    """The range of each leaf axis that a group can write to, or None where that is not a box."""
    whole, box = shape, [(0, n) for n in shape]
    for step in layout:
        outer, whole = whole[: step.depth], whole[step.depth :]
        lead, box = box[: step.depth], box[step.depth :]
        if step.kind == "reshape":
            if box == [(0, n) for n in whole]:
                box = [(0, n) for n in step.data]
            else:
                if [n for n in whole if n != 1] != [n for n in step.data if n != 1]:
                    return None
                kept = iter([b for b, n in zip(box, whole, strict=True) if n != 1])
                box = [(0, 1) if n == 1 else next(kept) for n in step.data]
            whole = step.data
        elif step.kind == "transpose":
            box = [box[i] for i in step.data]
            whole = tuple(whole[i] for i in step.data)
        elif step.kind == "rev":
            box = [
                (n - b, n - a) if i in step.data else (a, b)
                for i, ((a, b), n) in enumerate(zip(box, whole, strict=True))
            ]
        else:
            padded, grown = [], []
            for (a, b), n, (low, high, inner) in zip(box, whole, step.data, strict=True):
                padded.append((a * (inner + 1) + low, (b - 1) * (inner + 1) + 1 + low))
                grown.append(low + n + max(n - 1, 0) * inner + high)
            box, whole = padded, tuple(grown)
        box, whole = [*lead, *box], (*outer, *whole)
    return box


def _overlap(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))


def places(group: Group) -> list[tuple[Place, int]]:
    """Where the operands of a group are found, and how many stacked axes each has."""
    return [(side.place, side.stack) for pair in group.pairs for side in (pair.left, pair.right)]


def segments(group: Group, arrays: Sequence[Array]) -> list[Segment]:
    """The operands of a batch, in the axis order that `factors` works on.

    Args:
      group: of one leaf.
      arrays: for each of `places`, with its example axis behind the stacked ones.
    """
    out = []
    for pair, left, right in zip(group.pairs, arrays[::2], arrays[1::2], strict=True):
        k = pair.contracted
        y = _arranged(pair.right, right, pair.group, k, pair.right_free)
        if pair.scale != 1.0:
            y = y * jnp.asarray(pair.scale, y.dtype)
        if pair.left.rows is None:
            out.append(Segment(_arranged(pair.left, left, pair.group, k, pair.left_free), y))
            continue
        index = _arranged(pair.left, left, pair.group, k, ())[..., 0]
        size = pair.left.rows.size
        if pair.left.rows.clips:
            index = jnp.clip(index, 0, size - 1)
        valid = (index >= 0) & (index < size)
        out.append(Segment(Rows(index, valid, size), y))
    return out


def _arranged(side: Operand, x: Array, group, contracted, free) -> Array:
    """[G, B, K, free] from the array as the evaluation left it."""
    if side.view is not None:
        view = side.view
        for _ in range(side.stack + 1):
            view = jax.vmap(view)
        x = view(x)
    labels = [*side.labels[: side.stack], _EXAMPLE, *side.labels[side.stack :]]
    for label, start, stop, stride in side.slices:
        x = lax.slice_in_dim(x, start, stop, stride, axis=labels.index(label))
    summed = tuple(
        i for i, v in enumerate(labels) if v not in (*group, _EXAMPLE, *contracted, *free)
    )
    if summed:
        x = jnp.sum(x, axis=summed, dtype=jnp.promote_types(x.dtype, jnp.float32))
        labels = [v for i, v in enumerate(labels) if i not in summed]
    order = [*group, _EXAMPLE, *contracted, *free]
    x = jnp.transpose(x, [labels.index(v) for v in order])
    g, k = len(group), len(contracted)
    shape = x.shape
    return x.reshape(
        math.prod(shape[:g]),
        shape[g],
        math.prod(shape[g + 1 : g + 1 + k]),
        math.prod(shape[g + 1 + k :]),
    )


def to_leaf(group: Group, matrices: Array) -> Array:
    """Moves [G, M, N] of a group to its place in the leaf."""
    sides = "GMN"
    order = sorted(range(len(group.core)), key=lambda i: (sides.index(group.core[i][0]), i))
    x = matrices.reshape([group.core[i][1] for i in order])
    x = jnp.transpose(x, [order.index(i) for i in range(len(order))])
    return laid_out(x, group.layout)


def laid_out(x: Array, layout: Sequence[Layout]) -> Array:
    """Applies the steps of a layout."""
    for step in layout:
        x = _step(x, step)
    return x


def _step(x: Array, step: Layout) -> Array:
    if step.depth:
        return jax.vmap(lambda y: _step(y, step._replace(depth=step.depth - 1)))(x)
    if step.kind == "reshape":
        return x.reshape(step.data)
    if step.kind == "transpose":
        return jnp.transpose(x, step.data)
    if step.kind == "rev":
        return lax.rev(x, step.data)
    return lax.pad(x, jnp.zeros((), x.dtype), step.data)


def region_place(region: Region, value: Place) -> Place:
    """The place, seen from the outermost scope, of something computed in the region's body."""
    for eqn in region.eqns:
        value = Inside(eqn, value)
    return value
