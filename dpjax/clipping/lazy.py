"""Clipping without per-example gradients: the loss's own jaxpr, asked for operands instead."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from dpjax.clipping import factors, leaves
from dpjax.clipping import plan as planning
from dpjax.clipping.compat import Literal, Scope, make_scope, scan_arity
from dpjax.clipping.jaxprs import Computed, Here, evaluate, evaluate_from, flatten
from dpjax.clipping.norms import leaf_paths, squared_norms, weighted_sum
from dpjax.clipping.plan import LeafPlan
from dpjax.clipping.rules import ClipRule
from dpjax.clipping.terms import Reader, Region, producers
from dpjax.types import LossFn, PyTree, accumulation_dtype


class Trace(NamedTuple):
    """The loss and gradient of one example, as a flat jaxpr."""

    scope: Scope
    structure: Any  # pytree structure of (loss, aux)
    loss: list[Any]  # variables of loss and aux
    grads: list[Any]  # variables of the gradient leaves
    paths: list[str]
    avals: list[Any]  # of the parameters


def trace(loss_fn: LossFn, has_aux: bool, params: PyTree, example: PyTree) -> Trace:
    """Traces ``value_and_grad(loss_fn)`` for one example (arrays or shapes)."""
    function = jax.value_and_grad(loss_fn, has_aux=has_aux)
    scope, shapes = make_scope(function, params, example)
    scope = flatten(scope, [v.aval for v in scope.jaxpr.invars])
    value, grads = shapes
    count = len(jax.tree.leaves(value))
    paths = leaf_paths(grads)
    outvars = scope.jaxpr.outvars
    return Trace(
        scope,
        jax.tree.structure(value),
        list(outvars[:count]),
        list(outvars[count:]),
        paths,
        [v.aval for v in outvars[count:]],
    )


def make_plan(
    traced: Trace, batch: int, method: str, memory_budget: float | None
) -> list[LeafPlan]:
    """Chooses a strategy for each leaf, for a batch of ``batch`` examples."""
    reader = Reader(traced.scope)
    plans: list[LeafPlan] = []
    held: set = set()
    for path, var in zip(traced.paths, traced.grads, strict=True):
        plans.append(_plan_leaf(path, var, reader, batch, held))
    if method == "lazy":
        return plans
    return planning.promote(plans, batch, 1e15 if memory_budget is None else memory_budget)


def _plan_leaf(path: str, var: Any, reader: Reader, batch: int, held: set) -> LeafPlan:
    shape = tuple(var.aval.shape)
    size = 4.0 * math.prod(shape) * batch
    dense = LeafPlan(path, shape, "per-example", "", size / 2, size)

    def because(why: str) -> LeafPlan:
        return dataclasses.replace(dense, why=why)

    terms = reader.terms(var)
    if terms is None:
        return because("not a product")
    if not terms:
        return dataclasses.replace(dense, strategy="zero", why="no gradient", flops=0.0, bytes=0.0)
    if len(terms) == 1 and isinstance(terms[0], Region):
        region = terms[0]
        groups = leaves.group_products(region.terms)
        if groups is None:
            return because("overlapping products")
        if planning.is_small(groups):
            return because("small")
        strategy = planning.cheaper_norm(groups)
        repeats = math.prod(region.shape[: region.stack])
        flops = planning.norm_flops(groups, strategy, batch) * repeats
        return dataclasses.replace(
            dense,
            strategy="two passes",
            why=f"{strategy} in a checkpointed region",
            flops=flops,
            bytes=0.0,
            groups=tuple(groups),
            region=region,
        )
    groups = leaves.group_products(terms)
    if groups is None:
        return because("overlapping products")
    small = planning.is_small(groups)
    if small and planning.is_inside_loop(terms):
        return because("small")
    operands = {place: 0.0 for g in groups for place, _ in leaves.places(g)}
    for group in groups:
        for pair in group.pairs:
            for side in (pair.left, pair.right):
                operands[side.place] = planning.operand_bytes(side, batch)
    kept = sum(n for place, n in operands.items() if place not in held)
    held |= set(operands)
    what = _describe(groups)
    if small:
        flops = planning.norm_flops(groups, "reuse", batch)
        size = planning.reuse_bytes(groups, batch)
        return dataclasses.replace(
            dense, strategy="reuse", why=what, flops=flops, bytes=size, groups=tuple(groups)
        )
    strategy = planning.cheaper_norm(groups)
    flops = planning.norm_flops(groups, strategy, batch)
    return dataclasses.replace(
        dense, strategy=strategy, why=what, flops=flops, bytes=kept, groups=tuple(groups)
    )


def _describe(groups: Sequence[leaves.Group]) -> str:
    words = []
    for group in groups:
        kinds = [
            "rows" if p.left.rows else "conv" if (p.left.view or p.right.view) else "dot"
            for p in group.pairs
        ]
        g, m, n = group.sizes
        words.append(f"{'+'.join(kinds)} {group.positions}x({m}+{n})" + (f" x{g}" if g > 1 else ""))
    return ", ".join(words)


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
    plans = make_plan(traced, size, method, memory_budget)

    def coefficients(squares: list[Array]):
        return rule.factors(squares, traced.paths, is_padding_example, relative_clip_norm)

    total, value, norms = run(traced, plans, params, batch, coefficients)
    return jax.tree.unflatten(jax.tree.structure(params), total), value, norms


def run(
    traced: Trace,
    plans: list[LeafPlan],
    params: PyTree,
    batch: PyTree,
    coefficients: Callable[[list[Array]], tuple[list[Array], Array, Array]],
) -> tuple[list[Array], Any, Array]:
    """The sum of clipped gradients (leaf by leaf), the values of the loss, and the norms.

    Args:
      traced, plans: of the loss.
      params, batch: leaves of ``batch`` have a leading example axis.
      coefficients: squared norms of each leaf [B] -> (factor of each leaf [B], norms [B], which
        examples must be cleaned of NaN and infinity [B]).
    """
    flat_params, flat_batch = jax.tree.leaves(params), jax.tree.leaves(batch)
    order: dict[Any, tuple[int, int]] = {}  # place -> (number, example axis)

    def number(place: Any, axis: int) -> int:
        return order.setdefault(place, (len(order), axis))[0]

    value_places = [Here(v) for v in traced.loss]
    wanted: list[list[int]] = []
    saved: dict[Any, int | None] = {}
    batched = _depends_on(traced.scope, len(flat_params))
    for plan, var in zip(plans, traced.grads, strict=True):
        if plan.strategy == "per-example":
            wanted.append([number(_OutPlace(var), 0)])
        elif plan.strategy == "two passes":
            region = plan.region
            assert region is not None
            norm = Computed(
                tuple(p for g in plan.groups for p, _ in leaves.places(g)), _norm_of(plan)
            )
            wanted.append([number(leaves.region_place(region, norm), region.stack)])
            for v in region.eqns[-1].invars:
                if not isinstance(v, Literal):
                    saved[v] = _example_axis(v, traced.scope) if v in batched else None
        else:
            wanted.append([number(p, stack) for g in plan.groups for p, stack in leaves.places(g)])
    ordered = sorted(order.items(), key=lambda item: item[1][0])
    places = [p.place if isinstance(p, _OutPlace) else p for p, _ in ordered]
    axes = [axis for _, (_, axis) in ordered]
    kept = [Here(v) for v in saved]

    def one(example: list[Array]) -> tuple[list, list, list]:
        out = evaluate(traced.scope, [*flat_params, *example], [*value_places, *places, *kept])
        a, b = len(value_places), len(value_places) + len(places)
        return out[:a], out[a:b], out[b:]

    value, found, kept_values = jax.vmap(
        one, out_axes=([0] * len(value_places), axes, list(saved.values()))
    )(flat_batch)

    size = flat_batch[0].shape[0]
    squares, deferred = [], []
    for plan, numbers in zip(plans, wanted, strict=True):
        arrays = [found[i] for i in numbers]
        square, again = _squared_norm(plan, arrays, size)
        squares.append(square)
        deferred.append(again)
    squares = _exact_where_needed(squares, deferred)
    factors_of_leaves, norms, is_unclean = coefficients(squares)

    totals: list[Any] = []
    for plan, numbers, weights, var in zip(
        plans, wanted, factors_of_leaves, traced.grads, strict=True
    ):
        arrays = [found[i] for i in numbers]
        totals.append(_weighted(plan, arrays, weights, is_unclean, var.aval))
    _second_pass(traced, plans, saved, kept_values, factors_of_leaves, is_unclean, totals)
    return totals, jax.tree.unflatten(traced.structure, value), norms


class _OutPlace(NamedTuple):
    """A leaf that is computed as it stands; a literal among the outputs is not hashable."""

    var: Any

    @property
    def place(self) -> Here:
        return Here(self.var)

    def __hash__(self):
        return id(self.var)

    def __eq__(self, other):
        return isinstance(other, _OutPlace) and self.var is other.var


def _segments(plan: LeafPlan, arrays: Sequence[Array]) -> list[list[factors.Segment]]:
    out, start = [], 0
    for group in plan.groups:
        count = 2 * len(group.pairs)
        out.append(leaves.segments(group, arrays[start : start + count]))
        start += count
    return out


def _squared_norm(plan: LeafPlan, arrays: list[Array], size: int):
    """[B], and for Gram matrices (which to do again [B], how to)."""
    if plan.strategy == "zero":
        return jnp.zeros(size, jnp.float32), None
    if plan.strategy == "two passes":
        return jnp.sum(arrays[0], axis=tuple(range(arrays[0].ndim - 1))), None
    if plan.strategy == "per-example":
        return squared_norms(arrays[0]), None
    parts = _segments(plan, arrays)
    if plan.strategy == "reuse":
        return sum(squared_norms(factors.products(s), axis=1) for s in parts), None
    if plan.strategy == "product":
        return sum(factors.product_squared_norms(s) for s in parts), None
    found = [factors.gram_squared_norms(s) for s in parts]
    again = jnp.any(jnp.stack([doubt for _, doubt in found]), axis=0)
    return sum(square for square, _ in found), (
        again,
        lambda: sum(factors.product_squared_norms(s) for s in parts),
    )


def _exact_where_needed(squares: list[Array], deferred: list[Any]) -> list[Array]:
    doubts = [d[0] for d in deferred if d is not None]
    if not doubts:
        return squares

    def again(values: list[Array]) -> list[Array]:
        return [
            v if d is None else jnp.where(d[0], d[1](), v)
            for v, d in zip(values, deferred, strict=True)
        ]

    return lax.cond(jnp.any(jnp.stack(doubts)), again, lambda values: values, squares)


def _weighted(plan: LeafPlan, arrays, weights, is_unclean, aval) -> Array | None:
    wide = accumulation_dtype(aval.dtype)
    if plan.strategy == "zero":
        return jnp.zeros(aval.shape, wide)
    if plan.strategy == "two passes":
        return None
    if plan.strategy == "per-example":
        return weighted_sum(arrays[0], weights, is_unclean)
    total = None
    for group, parts in zip(plan.groups, _segments(plan, arrays), strict=True):
        if plan.strategy == "reuse":
            part = weighted_sum(factors.products(parts), weights, is_unclean, axis=1)
        else:
            part = factors.weighted_sum(parts, weights, is_unclean)
        part = leaves.to_leaf(group, part)
        total = part if total is None else total + part
    return total


def _depends_on(scope: Scope, start: int) -> set:
    """Variables that depend on the inputs from number ``start`` on: the example."""
    found = set(scope.jaxpr.invars[start:])
    for eqn in scope.jaxpr.eqns:
        if any(v in found for v in eqn.invars if not isinstance(v, Literal)):
            found |= set(eqn.outvars)
    return found


def _example_axis(var: Any, scope: Scope) -> int:
    """Where the example axis of a value lies without moving it: behind the axis of a scan."""
    eqn, output = producers(scope).get(var, (None, 0))
    if eqn is not None and eqn.primitive.name == "scan":
        return int(output >= scan_arity(eqn)[1])
    return 0


def _batched_rule(plan: LeafPlan, function: Callable) -> Callable:
    """A function of one example's operands that sees all examples at once under vmap."""
    stacks = [stack for g in plan.groups for _, stack in leaves.places(g)]

    def gather(arrays, in_batched, size):
        out = []
        for x, is_batched, stack in zip(arrays, in_batched, stacks, strict=False):
            if not is_batched:
                x = jnp.broadcast_to(x, (size, *x.shape))
            out.append(jnp.moveaxis(x, 0, stack))
        return out

    @jax.custom_batching.custom_vmap
    def call(*args):
        whole = [jnp.asarray(a)[None] for a in args]
        return function(gather(whole, [True] * len(stacks), 1), whole[len(stacks) :])[0]

    @call.def_vmap
    def rule(size, in_batched, *args):
        arrays = gather(args[: len(stacks)], in_batched[: len(stacks)], size)
        rest = [
            x if b else jnp.broadcast_to(x, (size, *x.shape))
            for x, b in zip(args[len(stacks) :], in_batched[len(stacks) :], strict=True)
        ]
        return function(arrays, rest)

    return call


def _norm_of(plan: LeafPlan) -> Callable:
    def function(arrays, _):
        parts = _segments(plan, arrays)
        if planning.cheaper_norm(plan.groups) == "product":
            return sum(factors.product_squared_norms(s) for s in parts), True
        found = [factors.gram_squared_norms(s) for s in parts]
        again = jnp.any(jnp.stack([doubt for _, doubt in found]), axis=0)
        square = sum(s for s, _ in found)
        exact = lax.cond(
            jnp.any(again),
            lambda: jnp.where(again, sum(factors.product_squared_norms(s) for s in parts), square),
            lambda: square,
        )
        return exact, True

    call = _batched_rule(plan, function)
    return lambda inputs, extra: call(*inputs)


def _second_pass(traced, plans, saved, kept_values, weights, is_unclean, totals) -> None:
    """Runs the checkpointed regions again, now for the weighted sums alone."""
    chosen = [i for i, plan in enumerate(plans) if plan.strategy == "two passes"]
    if not chosen:
        return
    places = []
    for number, i in enumerate(chosen):
        plan = plans[i]
        assert plan.region is not None
        inputs = tuple(p for g in plan.groups for p, _ in leaves.places(g))
        places.append(leaves.region_place(plan.region, Computed(inputs, _sum_of(plan, number))))

    def one(kept, factor, unclean):
        env = dict(zip(saved, kept, strict=True))
        return evaluate_from(traced.scope, env, places, (factor, unclean))

    per_leaf = [weights[i] for i in chosen]
    found = jax.vmap(one, in_axes=(list(saved.values()), 0, 0), out_axes=None)(
        kept_values, per_leaf, is_unclean
    )
    for i, total in zip(chosen, found, strict=True):
        plan = plans[i]
        assert plan.region is not None
        totals[i] = leaves.laid_out(total, plan.region.layout) * jnp.asarray(
            plan.region.scale, total.dtype
        )


def _sum_of(plan: LeafPlan, number: int) -> Callable:
    def function(arrays, rest):
        total = None
        for group, parts in zip(plan.groups, _segments(plan, arrays), strict=True):
            part = leaves.to_leaf(group, factors.weighted_sum(parts, rest[0], rest[1]))
            total = part if total is None else total + part
        return total, False

    call = _batched_rule(plan, function)
    return lambda inputs, extra: call(*inputs, extra[0][number], extra[1])
