"""How a federated model serves its clients, one by one."""

from collections.abc import Mapping, Sequence

import numpy as np

from dpjax.errors import DpjaxError
from dpjax.report.figures import Curve, curves_figure


def clients_figure(
    losses: Mapping[str, Sequence[float] | np.ndarray], prefix: str = "clients"
) -> str:
    """Share of clients whose loss is at most so much, as inline SVG: the worst served are on top.

    A mean hides them; noise and clipping cost people whose data are unlike the others' most.

    Args:
      losses: name of a model -> each client's loss, nats per token.
      prefix: makes the element's ids unique in a page.

    Example:
      >>> svg = clients_figure({"before": [5.0, 6.0], "after": [3.0, 5.5]})
      >>> "after: half of the clients below 4.25, a tenth above 5.25" in svg
      True
    """
    curves, spoken = [], []
    for name, values in losses.items():
        own = np.sort(np.asarray(values, np.float64))
        if not own.size or not np.all(np.isfinite(own)):
            raise DpjaxError(f"losses of {name!r} are empty or not finite; drop that model")
        curves.append(Curve(name, own, np.arange(1, own.size + 1) / own.size))
        half, tenth = np.quantile(own, [0.5, 0.9])
        spoken.append(f"{name}: half of the clients below {half:.2f}, a tenth above {tenth:.2f}")
    return curves_figure(
        curves,
        ("A client's loss (nats per token)", "Share of clients"),
        "Loss of each client",
        "; ".join(spoken),
        prefix,
    )
