"""Clipping without per-example gradients: the loss's own jaxpr, asked for operands instead."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from dpjax.clipping import factors
from dpjax.clipping.compat import SCAN, Literal, Scope, make_scope, scan_arity
from dpjax.clipping.jaxprs import Computed, Here, evaluate, evaluate_from, flatten
from dpjax.clipping.leaves import laid_out, places, region_place, segments, to_leaf
from dpjax.clipping.norms import leaf_paths, squared_norms, weighted_sums
from dpjax.clipping.plan import LeafPlan, make_plan, norm_strategy
from dpjax.clipping.rules import ClipRule
from dpjax.clipping.terms import Reader, producers
from dpjax.types import LossFn, PyTree, accumulation_dtype


class Trace(NamedTuple):
    """The loss and gradient of one example, as a flat jaxpr."""

    scope: Scope
    structure: Any  # pytree structure of the value of ``value_and_grad``: loss, or (loss, aux)
    value: list[Any]  # its variables
    grads: list[Any]  # variables of the gradient leaves
    paths: list[str]
    depends_on_example: set  # variables


def trace(loss_fn: LossFn, has_aux: bool, params: PyTree, example: PyTree) -> Trace:
    """Traces ``value_and_grad(loss_fn)`` for one example (arrays or shapes)."""
    scope, shapes = make_scope(jax.value_and_grad(loss_fn, has_aux=has_aux), params, example)
    scope = flatten(scope, [v.aval for v in scope.jaxpr.invars])
    value, grads = shapes
    count = len(jax.tree.leaves(value))
    outvars = list(scope.jaxpr.outvars)
    found = set(scope.jaxpr.invars[len(jax.tree.leaves(params)) :])
    for eqn in scope.jaxpr.eqns:
        if any(v in found for v in eqn.invars if not isinstance(v, Literal)):
            found |= set(eqn.outvars)
    structure = jax.tree.structure(value)
    return Trace(scope, structure, outvars[:count], outvars[count:], leaf_paths(grads), found)


def plan(
    traced: Trace, batch: int, method: str = "auto", memory_budget: float | None = None
) -> list[LeafPlan]:
    """A strategy for each leaf; see `make_plan`."""
    leaves = list(zip(traced.paths, traced.grads, strict=True))
    reader = Reader(traced.scope)
    return make_plan(reader, leaves, traced.depends_on_example, batch, method, memory_budget)


def clip_and_sum(
    loss_fn: LossFn,
    has_aux: bool,
    params: PyTree,
    batch: PyTree,
    rule: ClipRule,
    is_padding_example: Bool[Array, " batch"] | None,
    relative_clip_norm: Float[Array, ""] | None,
    method: str,
    memory_budget: float | None,
) -> tuple[PyTree, Any, Float[Array, " batch"]]:
    """The sum of clipped gradients, the values of ``loss_fn`` and the norms before clipping."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    traced = trace(loss_fn, has_aux, params, example)
    size = jax.tree.leaves(batch)[0].shape[0]
    plans = plan(traced, size, method, memory_budget)
    value, found, kept = _run(traced, plans, params, batch)

    arrays = [_as_stored(found[id(p)]) for p in plans]
    held = [_held_gradients(p, x) for p, x in zip(plans, arrays, strict=True)]
    measured = [_squared_norm(*leaf, size) for leaf in zip(plans, arrays, held, strict=True)]
    squares = _again_where_needed(measured)
    doubts = [m.in_doubt for m in measured]
    weights, norms, is_unclean = rule.factors(
        squares, traced.paths, is_padding_example, relative_clip_norm
    )
    sums = _sums_of_held(plans, held, weights, is_unclean)
    sums |= _second_pass(traced, plans, kept, weights, is_unclean, doubts)
    totals = []
    for i, p in enumerate(plans):
        if p.strategy == "zero":
            totals.append(jnp.zeros(p.shape, norms.dtype))
        elif i in sums:
            totals.append(sums[i])
        else:
            in_doubt = doubts[i]
            assert in_doubt is not None
            parts = [
                to_leaf(g, factors.weighted_sum(s, weights[i], is_unclean, in_doubt))
                for g, s in zip(p.groups, _segments(p, arrays[i]), strict=True)
            ]
            totals.append(factors.total_of(parts))
    return jax.tree.unflatten(jax.tree.structure(params), totals), value, norms


def _held_gradients(p: LeafPlan, arrays: Sequence[Array]) -> list[tuple[Array, int]]:
    """Per-example gradients that a leaf holds (in parts), each with its example axis."""
    if p.strategy == "per-example":
        return [(arrays[0], 0)]
    if p.strategy == "patches":
        return [(factors.products(s), 1) for s in _segments(p, arrays)]
    return []


def _sums_of_held(plans, held, weights, is_unclean) -> dict[int, Array]:
    """Weighted sums of the leaves that hold their gradients, by number."""
    flat = [(i, *part) for i, parts in enumerate(held) for part in parts]
    sums = weighted_sums(
        [rows for _, rows, _ in flat],
        [weights[i] for i, _, _ in flat],
        is_unclean,
        [axis for _, _, axis in flat],
    )
    by_leaf: dict[int, list[Array]] = {}
    for (i, _, _), part in zip(flat, sums, strict=True):
        by_leaf.setdefault(i, []).append(part)
    for i, parts in by_leaf.items():
        if plans[i].strategy == "patches":
            parts = [to_leaf(g, y) for g, y in zip(plans[i].groups, parts, strict=True)]
        by_leaf[i] = parts
    return {i: factors.total_of(parts) for i, parts in by_leaf.items()}


class _Kept(NamedTuple):
    """What a second pass through checkpointed regions starts from."""

    variables: list[Any]
    axes: list[int | None]  # of the examples; None where all share the value
    values: list[Array]


def _run(traced: Trace, plans: list[LeafPlan], params: PyTree, batch: PyTree):
    """Forward and backward pass: the loss, and for each plan the arrays it works on."""
    requests: list[tuple[Any, int]] = []  # (place, example axis)
    numbers: dict[Any, int] = {}

    def ask(place: Any, axis: int) -> int:
        if isinstance(place, Here) and isinstance(place.var, Literal):
            requests.append((place, axis))
            return len(requests) - 1
        if place not in numbers:
            numbers[place] = len(requests)
            requests.append((place, axis))
        return numbers[place]

    value = [ask(Here(v), 0) for v in traced.value]
    wanted: dict[int, list[int]] = {}
    regions: dict[Any, int | None] = {}
    sources = producers(traced.scope)
    for p, var in zip(plans, traced.grads, strict=True):
        if p.strategy == "per-example":
            wanted[id(p)] = [ask(Here(var), 0)]
        elif p.region is not None:
            norm = Computed(_inputs(p), _norm_in_region(p))
            wanted[id(p)] = [ask(region_place(p.region, norm), p.region.stack)]
            for v in p.region.eqns[-1].invars:
                if not isinstance(v, Literal):
                    is_shared = v not in traced.depends_on_example
                    regions[v] = None if is_shared else _example_axis(v, sources)
        else:
            wanted[id(p)] = [ask(*at) for g in p.groups for at in places(g)]
    kept = list(regions)
    flat_params = jax.tree.leaves(params)

    def one(example: list[Array]) -> tuple[list, list]:
        asked = [*(place for place, _ in requests), *(Here(v) for v in kept)]
        out = evaluate(traced.scope, [*flat_params, *example], asked)
        return out[: len(requests)], out[len(requests) :]

    axes = [axis for _, axis in requests]
    found, values = jax.vmap(one, out_axes=(axes, list(regions.values())))(jax.tree.leaves(batch))
    loss = jax.tree.unflatten(traced.structure, [found[i] for i in value])
    arrays = {key: [found[i] for i in indices] for key, indices in wanted.items()}
    return loss, arrays, _Kept(kept, list(regions.values()), values)


def _example_axis(var: Any, sources: dict) -> int:
    """Where the example axis of a value lies without moving it: behind the axis of a scan."""
    eqn, output = sources.get(var, (None, 0))
    if eqn is None or eqn.primitive.name != SCAN:
        return 0
    return int(output >= scan_arity(eqn)[1])


def _inputs(p: LeafPlan) -> tuple:
    return tuple(place for g in p.groups for place, _ in places(g))


def _as_stored(arrays: Sequence[Array]) -> list[Array]:
    """Operands as they are in memory.

    Compilers may skip a cast to a narrow type whose value goes straight into arithmetic: norm and
    sum would then see operands that were rounded differently.
    """
    return [lax.optimization_barrier(x) if jnp.dtype(x.dtype).itemsize < 4 else x for x in arrays]


def _segments(p: LeafPlan, arrays: Sequence[Array]) -> list[list[factors.Segment]]:
    out, start = [], 0
    for group in p.groups:
        count = 2 * len(group.pairs)
        out.append(segments(group, arrays[start : start + count]))
        start += count
    return out


class _Measured(NamedTuple):
    """Squared norms; where terms cancel they are in doubt, and to be taken again if possible."""

    squares: Array
    in_doubt: Array | None = None
    again: Callable[[], Array] | None = None


def _squared_norm(
    p: LeafPlan, arrays: list[Array], held: list[tuple[Array, int]], size: int
) -> _Measured:
    if p.strategy == "zero":
        return _Measured(jnp.zeros(size, jnp.float32))
    if p.region is not None:
        inner = jnp.sum(arrays[0], axis=tuple(range(arrays[0].ndim - 2)))
        return _Measured(inner[:, 0] * p.region.scale**2, ~(inner[:, 1] == 0))
    if held:
        return _Measured(factors.total_of([squared_norms(rows, axis) for rows, axis in held]))
    return _factored_norm(_segments(p, arrays), p.strategy)


def _factored_norm(parts: list[list[factors.Segment]], strategy: str) -> _Measured:
    measured = [factors.product_squared_norms(s) for s in parts] if strategy == "product" else []
    if measured:
        return _Measured(factors.total_of([square for square, _ in measured]), _any(measured))
    found = [factors.gram_squared_norms(s) for s in parts]

    def again() -> Array:
        return factors.total_of([factors.product_squared_norms(s)[0] for s in parts])

    return _Measured(factors.total_of([square for square, _ in found]), _any(found), again)


def _any(found: Sequence[tuple[Array, Array]]) -> Array:
    return jnp.any(jnp.stack([doubt for _, doubt in found]), axis=0)


def _again_where_needed(measured: list[_Measured]) -> list[Array]:
    """One branch for all leaves, taken when the norm of any example is in doubt."""
    squares = [m.squares for m in measured]
    doubts = [m.in_doubt for m in measured if m.in_doubt is not None and m.again is not None]
    if not doubts:
        return squares

    def again() -> list[Array]:
        return [
            m.squares
            if m.in_doubt is None or m.again is None
            else jnp.where(m.in_doubt, m.again(), m.squares)
            for m in measured
        ]

    return lax.cond(jnp.any(jnp.stack(doubts)), again, lambda: squares)


# Checkpointed regions. The first pass computes norms where the operands live and lets go of them;
# the second runs the regions again for the weighted sums. Both work on all examples at once from
# inside a function of one example: the batching rule of a custom_vmap sees the whole batch.


def _for_all_examples(p: LeafPlan, function: Callable, is_batched: bool) -> Callable:
    """A function of one example's operands (and more) whose batching rule is ``function``."""
    stacks = [stack for g in p.groups for _, stack in places(g)]

    def run(size: int, batched: Sequence[bool], args: Sequence[Array]) -> Array:
        whole = [
            x if b else jnp.broadcast_to(x, (size, *x.shape))
            for x, b in zip(args, batched, strict=True)
        ]
        count = len(stacks)
        arrays = [jnp.moveaxis(x, 0, s) for x, s in zip(whole[:count], stacks, strict=True)]
        return function(_segments(p, _as_stored(arrays)), *whole[count:])

    @jax.custom_batching.custom_vmap
    def call(*args):
        out = run(1, [False] * len(args), args)
        return out[0] if is_batched else out

    @call.def_vmap
    def rule(size, batched, *args):
        return run(size, batched, args), is_batched

    return call


def _norm_in_region(p: LeafPlan) -> Callable:
    def norm(parts):
        measured = _factored_norm(parts, norm_strategy(p.groups))
        square = _again_where_needed([measured])[0]
        assert measured.in_doubt is not None
        return jnp.stack([square, measured.in_doubt.astype(square.dtype)], axis=1)

    call = _for_all_examples(p, norm, is_batched=True)
    return lambda inputs, extra: call(*inputs)


def _sum_in_region(p: LeafPlan, number: int) -> Callable:
    def weigh(parts, weights, is_unclean, in_doubt):
        return factors.total_of(
            [
                to_leaf(group, factors.weighted_sum(s, weights, is_unclean, in_doubt))
                for group, s in zip(p.groups, parts, strict=True)
            ]
        )

    call = _for_all_examples(p, weigh, is_batched=False)
    return lambda inputs, extra: call(*inputs, extra[0][number], extra[1], extra[2][number])


def _second_pass(traced, plans, kept: _Kept, weights, is_unclean, doubts) -> dict[int, Array]:
    """Weighted sums of the leaves in checkpointed regions, by number."""
    chosen = [i for i, p in enumerate(plans) if p.region is not None]
    if not chosen:
        return {}
    asked = [
        region_place(plans[i].region, Computed(_inputs(plans[i]), _sum_in_region(plans[i], n)))
        for n, i in enumerate(chosen)
    ]

    def one(values, factor, unclean, doubt):
        env = dict(zip(kept.variables, values, strict=True))
        return evaluate_from(traced.scope, env, asked, (factor, unclean, doubt))

    found = jax.vmap(one, in_axes=(kept.axes, 0, 0, 0), out_axes=None)(
        kept.values, [weights[i] for i in chosen], is_unclean, [doubts[i] for i in chosen]
    )
    totals = {}
    for i, total in zip(chosen, found, strict=True):
        region = plans[i].region
        leaf = laid_out(total.astype(accumulation_dtype(total.dtype)), region.layout)
        totals[i] = leaf if region.scale == 1.0 else leaf * region.scale
    return totals
