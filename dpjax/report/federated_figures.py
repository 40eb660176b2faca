"""How examples are spread over clients."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpjax.errors import DpjaxError
from dpjax.report import figures

_MOST = 50  # columns that can still be told apart, and a file of some 100 kB


def partition_figure(counts: np.ndarray, labels: Sequence[Any], prefix: str = "partition") -> str:
    """Sizes of clients above, and below how much of each client every label makes up, as SVG.

    Clients stand from the largest to the smallest. Of more than 50 some are drawn, evenly spread
    over that order. A square's strength is the label's share of the client's examples: alike
    columns are an IID partition, a single dark square in each the most unlike one.

    Args:
      counts: int[K, L] examples of each label on each client, as `label_counts` gives them.
      labels: L names, in the order of the columns.
      prefix: makes the element's ids unique in a page.

    Raises:
      DpjaxError: no clients, or not one column for each label.

    Example:
      >>> svg = partition_figure(np.array([[3, 1], [0, 2]]), ["cat", "dog"])
      >>> "2 clients with 2 to 4 examples; the commonest label makes up 88% of a client" in svg
      True
    """
    found = np.asarray(counts)
    if found.ndim != 2 or not found.size or found.shape[1] != len(labels) or np.any(found < 0):
        raise DpjaxError(
            f"counts have shape {found.shape} for {len(labels)} labels; give one row for each "
            "client and one column for each label, all at least 0"
        )
    sizes = found.sum(axis=1)
    order = np.argsort(-sizes, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, _MOST).round().astype(int))]
    shares = found / np.maximum(sizes, 1)[:, None]

    figure, above = figures._axes("", "Examples")
    above.remove()
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.8))
    figures._dress(above, "", "Examples")
    figures._dress(below, "Clients, from the largest", "Label")
    blue, places = figures._COLORS[0], np.arange(len(shown))
    above.bar(places, sizes[shown], width=0.8, color=blue)
    above.tick_params(bottom=False)
    # A faint square is still a square: one example must not look like none.
    rows, columns = np.nonzero(shares[shown].T)
    for row, column in zip(rows, columns, strict=True):
        strength = 0.08 + 0.92 * float(shares[shown[column], row])
        below.bar(column, 0.9, 0.9, row - 0.45, color=blue, alpha=strength, linewidth=0)
    below.bar(0, 0, color=blue, label="the stronger, the more of the client's examples")
    below.grid(False)
    step = -(-len(labels) // 12)
    names = [figures._plain(str(name)) for name in labels]
    below.set_yticks(range(0, len(labels), step), names[::step])
    below.set_ylim(len(labels) - 0.4, -0.6)
    below.set_xticks([])
    part = f", {len(shown)} of them drawn" if len(shown) < len(found) else ""
    commonest = shares.max(axis=1)[sizes > 0].mean() if sizes.any() else 0.0
    spoken = (
        f"{len(found)} clients with {sizes.min()} to {sizes.max()} examples; the commonest label "
        f"makes up {100 * commonest:.0f}% of a client{part}"
    )
    return figures._svg(figure, below, "Examples over clients", spoken, prefix)
