"""Which way to take for each gradient leaf: a cost model in FLOPs and bytes."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dpjax.clipping.leaves import Group, Pair, group_products
from dpjax.clipping.products import Operand, Product, Region, Term
from dpjax.clipping.terms import Reader

Strategy = Literal["per-example", "patches", "gram", "product", "two passes", "zero"]

# FLOPs that a matrix product does while memory moves one byte: that of a CPU core; a GPU does tens
# in float32, hundreds in bfloat16, where the budget keeps held gradients in bounds.
FLOPS_PER_BYTE = 8.0

# What "auto" may hold beyond "lazy", as a share of the operands that "lazy" holds.
DEFAULT_BUDGET = 0.25


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How the gradient of one parameter is found, and at what cost beyond an ordinary step.

    Attributes:
      path: the parameter's place, such as "blocks/0/kernel".
      shape: of the parameter.
      strategy: "per-example" holds one gradient per example, as the loss's own backward pass makes
        it; "patches" too, but makes a convolution's as a matrix product over its patches; "gram"
        and "product" hold the operands, and take the norm from Gram matrices or from gradients
        formed one example at a time; "two passes" holds nothing of a checkpointed region and runs
        it twice; "zero" has no gradient.
      what: the products that were recognised, as positions x (one side + other side), or why the
        gradient is held.
      flops: of the norm, for the batch.
      bytes: held from the backward pass to the weighted sum, for the batch. Operands that several
        leaves share count at the first.
      groups, region: what the strategy works on.
    """

    path: str
    shape: tuple[int, ...]
    strategy: Strategy
    what: str
    flops: float
    bytes: float
    groups: tuple[Group, ...] = ()
    region: Region | None = None


def make_plan(
    reader: Reader,
    leaves: Sequence[tuple[str, Any]],
    depends_on_example: set,
    batch: int,
    method: str = "auto",
    memory_budget: float | None = None,
) -> list[LeafPlan]:
    """Chooses a strategy for each leaf.

    Args:
      reader: of the flat jaxpr of loss and gradient.
      leaves: path and variable of each gradient leaf.
      depends_on_example: the variables that do.
      batch: examples at once.
      method: "vmap" holds every gradient; "lazy" holds as little as it can; "auto" may spend
        ``memory_budget`` bytes more where that saves time.
      memory_budget: None is `DEFAULT_BUDGET` of what "lazy" holds.
    """
    held: set = set()
    plans = [_plan(path, var, reader, depends_on_example, batch, held) for path, var in leaves]
    if method == "vmap":
        return [_holding(p, batch, p.what) if p.strategy != "zero" else p for p in plans]
    if method == "lazy":
        return plans
    if memory_budget is None:
        memory_budget = DEFAULT_BUDGET * sum(p.bytes for p in plans)
    return _spend(plans, batch, memory_budget)


def _plan(path, var, reader, depends_on_example, batch, held) -> LeafPlan:
    shape = tuple(var.aval.shape)
    terms = reader.terms(var)
    if terms is None:
        return _held(path, shape, batch, "not a product")
    if not terms:
        return LeafPlan(path, shape, "zero", "no gradient", 0.0, 0.0)
    region = terms[0] if len(terms) == 1 and isinstance(terms[0], Region) else None
    groups = group_products(region.terms if region else terms)
    if groups is None:
        return _held(path, shape, batch, "products that overlap")
    what = " + ".join(_described(g) for g in groups)
    norm = norm_strategy(groups)
    flops = batch * sum(gram_flops(g) if norm == "gram" else product_flops(g) for g in groups)
    if region:
        if is_small(groups) and not any(is_convolution(g) for g in groups):
            return _held(path, shape, batch, f"small: {what}")
        flops *= math.prod(region.shape[: region.stack])
        what = f"{norm} of {what}, in a checkpointed region"
        return LeafPlan(path, shape, "two passes", what, flops, 0.0, tuple(groups), region)
    if not _is_per_example(terms, depends_on_example):
        return _held(path, shape, batch, "an operand that all examples share")
    if is_small(groups):
        small = LeafPlan(path, shape, "gram", what, 0.0, 0.0, tuple(groups))
        return _holding(small, batch, f"small: {what}")
    new = {s.place: operand_bytes(s) for s in _operands(groups) if s.place not in held}
    held |= set(new)
    return LeafPlan(path, shape, norm, what, flops, batch * sum(new.values()), tuple(groups))


def _held(path: str, shape: tuple[int, ...], batch: int, why: str) -> LeafPlan:
    size = float(math.prod(shape) * batch)
    return LeafPlan(path, shape, "per-example", why, 2.0 * size, 4.0 * size)


def _holding(plan: LeafPlan, batch: int, why: str) -> LeafPlan:
    """The plan, but with a gradient for each example.

    That of a convolution is made from patches: under vmap it would be a convolution in groups,
    which XLA runs slowly on CPU, splits wrongly over devices (0.10 and 0.11), and through which a
    NaN of one example can reach the others.
    """
    held = _held(plan.path, plan.shape, batch, why)
    if not any(is_convolution(g) for g in plan.groups):
        return held
    if plan.region is not None:
        return plan
    return dataclasses.replace(held, strategy="patches", groups=plan.groups)


def _spend(plans: list[LeafPlan], batch: int, memory_budget: float) -> list[LeafPlan]:
    """Lets leaves hold their gradients where that saves time, while the budget lasts.

    Held gradients are written once and read twice, and copied out of a loop besides. Gram
    matrices cost FLOPs and one more pass over the operands.
    """
    users = collections.Counter(
        place for p in plans for place in {side.place for side in _operands(p.groups)}
    )
    gains = []
    for i, plan in enumerate(plans):
        if plan.strategy in ("gram", "product"):
            operands = {side.place: side for side in _operands(plan.groups)}
            alone = [side for place, side in operands.items() if users[place] == 1]
            size = _gradient_bytes(plan.groups, batch)
            extra = max(size - batch * sum(map(operand_bytes, alone)), 1.0)
            passes = 9.0 if any(side.stack for side in operands.values()) else 3.0
            read = batch * sum(map(operand_bytes, operands.values()))
            saved = plan.flops / FLOPS_PER_BYTE + read - passes * size
            if saved > 0:
                gains.append((saved / extra, i, extra))
    plans = list(plans)
    for _, i, extra in sorted(gains, reverse=True):
        if extra <= memory_budget:
            memory_budget -= extra
            plans[i] = _holding(plans[i], batch, f"faster: {plans[i].what}")
    return plans


def norm_strategy(groups: Sequence[Group]) -> Strategy:
    """The cheaper norm: by Gram matrices, or from gradients formed one example at a time."""
    grams = sum(map(gram_flops, groups))
    return "gram" if grams <= sum(map(product_flops, groups)) else "product"


def gram_flops(group: Group) -> float:
    """Of the Gram matrices of all pairs of products, for one example."""
    g, m, n = group.sizes
    total = 0.0
    for i, one in enumerate(group.pairs):
        for other in group.pairs[i:]:
            is_sparse = one.left.rows is not None or other.left.rows is not None
            total += 2.0 * g * positions(one) * positions(other) * ((0 if is_sparse else m) + n)
    return total


def product_flops(group: Group) -> float:
    """Of forming the gradient of one example and squaring it."""
    g, m, n = group.sizes
    sparse = sum(positions(p) for p in group.pairs if p.left.rows is not None)
    dense = sum(positions(p) for p in group.pairs if p.left.rows is None)
    return 2.0 * g * n * (m * dense + sparse + m)


def positions(pair: Pair) -> int:
    """How many outer products an operand pair adds up."""
    dims = pair.left.dims() | pair.right.dims()
    return math.prod(dims[label] for label in pair.contracted)


def operand_bytes(operand: Operand) -> float:
    """Of one example."""
    return float(math.prod(operand.sizes) * np.dtype(operand.dtype).itemsize)


def is_convolution(group: Group) -> bool:
    """Whether an operand has to be cut into patches first."""
    return any(p.left.rows is None and (p.left.view or p.right.view) for p in group.pairs)


def is_small(groups: Sequence[Group]) -> bool:
    """Whether the gradient takes no more room than the operands it is made of."""
    operands = {side.place: operand_bytes(side) for side in _operands(groups)}
    return _gradient_bytes(groups, 1) <= sum(operands.values())


def _gradient_bytes(groups: Sequence[Group], batch: int) -> float:
    return 4.0 * batch * sum(math.prod(g.sizes) for g in groups)


def _operands(groups: Sequence[Group]) -> list[Operand]:
    return [side for g in groups for pair in g.pairs for side in (pair.left, pair.right)]


def _is_per_example(terms: Sequence[Term], depends_on_example: set) -> bool:
    """Whether no operand is a parameter or made of parameters only.

    Such a product is a sum in disguise (a bias under a later matrix): the loss's own way to
    compute it is the better one.
    """
    for term in terms:
        assert isinstance(term, Product)
        for side in (term.lhs, term.rhs):
            var = getattr(side.place, "var", None)
            if var is not None and var not in depends_on_example:
                return False
    return True


def _described(group: Group) -> str:
    g, m, n = group.sizes
    kinds = "+".join(
        "rows" if p.left.rows else "conv" if p.left.view or p.right.view else "dot"
        for p in group.pairs
    )
    repeats = f"{g} x " if g > 1 else ""
    return f"{repeats}{kinds} {sum(map(positions, group.pairs))} x ({m} + {n})"
