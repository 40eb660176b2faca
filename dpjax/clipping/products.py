"""What a gradient leaf is made of: einsums of two operands, moved to their place.

A label in both operands and in the result is a batch axis; in both but not in the result,
contracted; in one and in the result, free; in one alone, summed. What follows a contraction on
the way to the leaf (reshapes, transposes, padding into a larger leaf) only moves its entries: a
`Layout`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from dpjax.clipping.jaxprs import Place


class Layout(NamedTuple):
    """One step that moves entries, applied under ``depth`` leading axes."""

    kind: str  # "reshape", "transpose", "rev" or "pad"
    data: tuple
    depth: int = 0


@dataclasses.dataclass(frozen=True)
class RowIndex:
    """The operand holds row numbers: it stands for one-hot vectors over ``size`` rows."""

    size: int
    label: int
    clips: bool  # whether numbers out of range count as the nearest row, or not at all


@dataclasses.dataclass(frozen=True)
class Operand:
    """Where one side of a product is found.

    Attributes:
      place: in the scope of the term.
      labels, sizes: of its axes, without the example axis, after ``view`` and without ``rows``.
      stack: how many leading axes scans have added; the example axis comes right behind them.
      dtype: of its values.
      view: a function of the array of one example, applied first.
      slices: (label, start, stop, stride) still to be cut out.
      rows: set where the operand is a list of row numbers.
    """

    place: Place
    labels: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: Any
    stack: int = 0
    view: Callable | None = None
    slices: tuple[tuple[int, int, int, int], ...] = ()
    rows: RowIndex | None = None

    def dims(self) -> dict[int, int]:
        """Size of each label, as the term sees it."""
        dims = dict(zip(self.labels, self.sizes, strict=True))
        for label, start, stop, stride in self.slices:
            dims[label] = -(-(stop - start) // stride)
        if self.rows is not None:
            dims[self.rows.label] = self.rows.size
        return dims


@dataclasses.dataclass(frozen=True)
class Product:
    """scale * layout(einsum(lhs, rhs -> core))."""

    lhs: Operand
    rhs: Operand
    core: tuple[int, ...]
    layout: tuple[Layout, ...] = ()
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Region:
    """scale * layout(x) for a value x in a checkpointed region that is a sum of products.

    Only norms and weighted sums leave the region: its operands are what it must not keep.
    """

    terms: tuple["Term", ...]  # in the scope of the region's body
    eqns: tuple[Any, ...]  # the region's equation, then the scans around it, inside out
    shape: tuple[int, ...]  # of x, with the axes of those scans
    layout: tuple[Layout, ...] = ()
    scale: float = 1.0

    @property
    def stack(self) -> int:
        return len(self.eqns) - 1


@dataclasses.dataclass(frozen=True)
class Carried:
    """The running sum of a scan, on its way through the body."""

    layout: tuple[Layout, ...] = ()
    scale: float = 1.0


Term: TypeAlias = Product | Region | Carried
