"""A table of how `clipped_grad` will find each gradient leaf, and what that costs."""

import math
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from dpjax.clipping import lazy
from dpjax.clipping.api import METHODS, Method
from dpjax.errors import DpjaxError
from dpjax.types import LossFn, PyTree


class LeafStrategy(NamedTuple):
    """One gradient leaf. Costs are those of one example, beyond an ordinary training step."""

    path: str
    shape: tuple[int, ...]
    strategy: str
    what: str  # the products that were recognised: positions x (one side + other side)
    norm_flops: float
    held_bytes: float  # from the backward pass to the weighted sum
    gradient_bytes: float  # what one gradient per example holds: the cost under "vmap"


def explain(
    loss_fn: LossFn,
    params: PyTree,
    example: PyTree,
    *,
    method: Method = "auto",
    has_aux: bool = False,
    memory_budget: float | None = None,
    show: bool = True,
) -> list[LeafStrategy]:
    """Prints the strategy for each gradient leaf of ``loss_fn``, with its cost.

    Nothing is computed but shapes, so ``params`` and ``example`` may be `jax.ShapeDtypeStruct`.

    Args:
      loss_fn: the loss of ONE example.
      params: its first argument.
      example: its second argument, without a batch axis.
      method, has_aux, memory_budget: as in `clipped_grad`; the budget is in bytes per example.
      show: False prints nothing.

    Returns:
      One row for each leaf. Strategies: "per-example" holds a gradient per example as the loss's
      own backward pass makes it; "patches" does so for a convolution, made as a matrix product;
      "gram" and "product" hold the operands of the gradient's products instead, and take the norm
      from Gram matrices or from gradients formed one example at a time; "two passes" holds nothing
      of a `jax.checkpoint` region and runs it twice; "zero" has no gradient.

    Raises:
      DpjaxError: an unknown method.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss_fn(params, x):
      ...     return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))
      >>> params = {"w": jnp.zeros((64, 64)), "b": jnp.zeros(64)}
      >>> for row in explain(loss_fn, params, jnp.zeros((4, 64)), show=False):
      ...     print(row.path, row.strategy, row.what, row.held_bytes, row.gradient_bytes)
      b per-example not a product 256.0 256.0
      w gram dot 4 x (64 + 64) 2048.0 16384.0
    """
    if method not in METHODS:
        raise DpjaxError(f"method is {method!r}; use one of: {', '.join(METHODS)}")
    traced = lazy.trace(loss_fn, has_aux, params, example)
    rows = [
        LeafStrategy(
            p.path, p.shape, p.strategy, p.what, p.flops, p.bytes, 4.0 * math.prod(p.shape)
        )
        for p in lazy.plan(traced, 1, method, memory_budget)
    ]
    if show:
        _print(rows)
    return rows


def _print(rows: list[LeafStrategy]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("leaf", "shape", "strategy", "what"):
        table.add_column(name)
    for name in ("norm MFLOP", "held kB", "under vmap kB"):
        table.add_column(name, justify="right")
    totals = [0.0, 0.0, 0.0]
    for row in rows:
        costs = (row.norm_flops / 1e6, row.held_bytes / 1e3, row.gradient_bytes / 1e3)
        totals = [a + b for a, b in zip(totals, costs, strict=True)]
        shape = "x".join(map(str, row.shape)) or "scalar"
        table.add_row(row.path, shape, row.strategy, row.what, *(f"{c:,.2f}" for c in costs))
    table.add_section()
    table.add_row("for each example", "", "", "", *(f"{c:,.2f}" for c in totals))
    Console(width=140).print(table)
