"""Which way to take for each gradient leaf: a cost model in FLOPs and bytes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dpjax.clipping.leaves import Group
from dpjax.clipping.terms import Operand, Product, Region

Strategy = Literal["per-example", "reuse", "gram", "product", "two passes", "zero"]

# FLOPs that a matrix product does while memory moves one byte: between a CPU core (about 8) and a
# GPU (about 100 for float32). The choice it decides is rarely close.
FLOPS_PER_BYTE = 16.0


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """One gradient leaf: how it is found and what that costs beyond an ordinary step.

    Attributes:
      path: its place in the parameters.
      shape: of the parameter.
      strategy: "per-example" holds one gradient per example as the loss's own backward pass makes
        it; "reuse" makes it from the operands; "gram" and "product" keep the operands, and differ
        in how the norm comes from them; "two passes" keeps nothing of a checkpointed region and
        runs it twice; "zero" has no gradient.
      why: what was recognised, or why nothing was.
      flops: of the norm, for the batch.
      bytes: held between norm and weighted sum, for the batch (operands shared by leaves count
        once, at the first).
      groups, region: what the strategy works on.
    """

    path: str
    shape: tuple[int, ...]
    strategy: Strategy
    why: str
    flops: float
    bytes: float
    groups: tuple[Group, ...] = ()
    region: Region | None = None


def operand_bytes(operand: Operand, batch: int) -> float:
    """Bytes of an operand for the whole batch."""
    return float(math.prod(operand.sizes) * batch * np.dtype(operand.dtype).itemsize)


def gram_flops(group: Group, batch: int) -> float:
    """Of the Gram matrices of all pairs of products."""
    g, m, n = group.sizes
    lengths = [_positions(pair) for pair in group.pairs]
    total = 0.0
    for i, (pair, k) in enumerate(zip(group.pairs, lengths, strict=True)):
        for other, l in zip(group.pairs[i:], lengths[i:], strict=True):
            sparse = pair.left.rows is not None or other.left.rows is not None
            total += 2.0 * g * k * l * ((0 if sparse else m) + n)
    return total * batch


def product_flops(group: Group, batch: int) -> float:
    """Of forming the per-example gradients."""
    g, m, n = group.sizes
    rows = sum(_positions(p) for p in group.pairs if p.left.rows is not None)
    formed = g * m * n
    return 2.0 * (g * n * (m * (group.positions - rows) + rows) + formed) * batch


def _positions(pair: Any) -> int:
    dims = pair.left.dims() | pair.right.dims()
    return math.prod(dims[label] for label in pair.contracted)


def norm_flops(groups: Sequence[Group], strategy: Strategy, batch: int) -> float:
    """Of the norm, beyond what an ordinary step does."""
    if strategy == "gram":
        return sum(gram_flops(g, batch) for g in groups)
    if strategy == "product":
        return sum(product_flops(g, batch) for g in groups)
    return 2.0 * batch * sum(math.prod(g.sizes) for g in groups)


def reuse_bytes(groups: Sequence[Group], batch: int) -> float:
    """Of the per-example gradients in float32."""
    return 4.0 * batch * sum(math.prod(g.sizes) for g in groups)


def is_small(groups: Sequence[Group]) -> bool:
    """Whether the gradients take no more room than the operands they are made of."""
    operands = {}
    for group in groups:
        for pair in group.pairs:
            for side in (pair.left, pair.right):
                operands[side.place] = operand_bytes(side, 1)
    return reuse_bytes(groups, 1) <= sum(operands.values())


def cheaper_norm(groups: Sequence[Group]) -> Strategy:
    """By Gram matrices, or by forming the gradients one example at a time."""
    grams = sum(gram_flops(g, 1) for g in groups)
    return "gram" if grams <= sum(product_flops(g, 1) for g in groups) else "product"


def promote(plans: list[LeafPlan], batch: int, memory_budget: float) -> list[LeafPlan]:
    """Lets leaves keep their gradients where that saves time, while the budget lasts.

    Reuse writes the gradients once and reads them twice, where Gram matrices cost FLOPs and one
    more pass over the operands.
    """
    gains = []
    for i, plan in enumerate(plans):
        if plan.strategy not in ("gram", "product"):
            continue
        size = reuse_bytes(plan.groups, batch)
        extra = max(size - plan.bytes, 1.0)
        saved = plan.flops / FLOPS_PER_BYTE + plan.bytes - 3.0 * size
        if saved > 0:
            gains.append((saved / extra, i, extra, size))
    for _, i, extra, size in sorted(gains, reverse=True):
        if extra <= memory_budget:
            memory_budget -= extra
            flops = norm_flops(plans[i].groups, "reuse", batch)
            plans[i] = dataclasses.replace(plans[i], strategy="reuse", flops=flops, bytes=size)
    return plans


def is_inside_loop(terms: Sequence[Any]) -> bool:
    """Whether an operand would have to be carried out of a scan."""
    return any(side.stack > 0 for t in terms if isinstance(t, Product) for side in (t.lhs, t.rhs))
