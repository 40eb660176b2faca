"""Curves as SVG text that follows the page: light or dark, any width, no fonts to load."""

import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dpjax.errors import DpjaxError

# Okabe and Ito (2008), the four that read on white and on black; dashes repeat what colours say.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_DASHES = ("-", "--", "-.", ":")
_LONG = 60  # points; longer training curves are smoothed
_INK = "#010203"  # stands for the colour of the page's text
_SIZE = (3.7, 2.7)  # inches; small, so that labels stay legible at a phone's width


class Curve(NamedTuple):
    """One line of a figure."""

    name: str  # e.g. of the model
    iterations: Sequence[float] | np.ndarray  # [points], ascending
    values: Sequence[float] | np.ndarray  # [points]
    kind: Literal["training", "held out"] = "training"
    covered: bool = False  # whether the privacy bound covers the values


def loss_figure(curves: Sequence[Curve], prefix: str = "loss") -> str:
    """Losses in nats per token against iterations, as one inline SVG element.

    Curves of one name share a colour: held-out losses are thick and dotted, training losses thin.
    A long training curve is drawn faint, under its running mean.

    Args:
      curves: of one or several models.
      prefix: makes the element's ids unique in a page.

    Example:
      >>> svg = loss_figure([Curve("private", [0, 100], [4.0, 3.1], "held out")])
      >>> svg.startswith("<svg") and "private, held out, ends at 3.10" in svg
      True
    """
    _check(curves)
    figure, axes = _axes("Iterations", "Loss (nats per token)")
    names = list(dict.fromkeys(curve.name for curve in curves))
    ends = []
    for curve in curves:
        style = _style(names.index(curve.name))
        iterations, values = np.asarray(curve.iterations), np.asarray(curve.values)
        label = f"{curve.name}, {curve.kind}"
        if curve.kind == "held out":
            style |= {"linewidth": 1.8, "marker": "o", "markersize": 3.0}
        else:
            style |= {"linewidth": 1.2}
            if len(values) > _LONG:
                color = style["color"]
                axes.plot(iterations, values, color=color, linewidth=0.6, alpha=0.35)
                iterations, values = _running_mean(iterations, values)
        axes.plot(iterations, values, label=_plain(label), **style)
        ends.append(f"{label}, ends at {values[-1]:.2f}")
    return _svg(figure, axes, "Loss against iterations", "; ".join(ends), prefix)


def _running_mean(iterations: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of a twentieth of the curve, at the windows' last iterations."""
    window = len(values) // 20
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return iterations[window - 1 :], (sums[window:] - sums[:-window]) / window


def epsilon_figure(
    curves: Sequence[Curve], target_epsilon: float | None = None, prefix: str = "epsilon"
) -> str:
    """Epsilon spent against iterations, with the budget as a horizontal line, as inline SVG.

    Args:
      curves: e.g. `DPSGD.epsilon_curve`; a single point is drawn as a diamond.
      target_epsilon: the budget, nats.
      prefix: makes the element's ids unique in a page.

    Example:
      >>> svg = epsilon_figure([Curve("RDP", [0, 10], [0.0, 1.5])], target_epsilon=2.0)
      >>> "RDP reaches 1.50" in svg and "budget 2" in svg
      True
    """
    _check(curves)
    figure, axes = _axes("Iterations", "Epsilon spent (nats)")
    ends = []
    for index, curve in enumerate(curves):
        style = _style(index) | {"linewidth": 1.8}
        if len(curve.values) == 1:
            style |= {"linestyle": "none", "marker": "D", "markersize": 5}
        axes.plot(curve.iterations, curve.values, label=_plain(curve.name), **style)
        ends.append(f"{curve.name} reaches {curve.values[-1]:.2f}")
    if target_epsilon is not None:
        label = f"budget {target_epsilon:g}"
        axes.axhline(target_epsilon, color=_INK, linestyle=(0, (2, 2)), linewidth=1, label=label)
        ends.append(label)
    axes.set_ylim(bottom=0)
    return _svg(figure, axes, "Epsilon against iterations", "; ".join(ends), prefix)


def roc_figure(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    guarantee: tuple[float, float] | None = None,
    prefix: str = "roc",
) -> str:
    """True-positive against false-positive rates on logarithmic axes, as inline SVG.

    On linear axes an attack that is sure of a few people looks like a blind guess.

    Args:
      curves: name -> (false-positive rates, true-positive rates), e.g. from
        `dpjax.auditing.roc_curve`.
      guarantee: (epsilon, delta): draws what no attack on such a model can pass.
      prefix: makes the element's ids unique in a page.

    Source: Carlini et al. (2022), section II, for the axes.

    Example:
      >>> rates = np.linspace(0, 1, 101)
      >>> svg = roc_figure({"loss": (rates, rates**0.5)}, guarantee=(8.0, 1e-5))
      >>> "loss finds 10.0% at 1% false positives" in svg and "epsilon 8" in svg
      True
    """
    if not curves:
        raise DpjaxError("there is no curve to draw; leave the figure out")
    figure, axes = _axes("False-positive rate", "True-positive rate")
    low, ends = 0.1, []
    for index, (name, (false_positives, true_positives)) in enumerate(curves.items()):
        fpr, tpr = np.asarray(false_positives), np.asarray(true_positives)
        if fpr.shape != tpr.shape or fpr.ndim != 1 or not fpr.size:
            raise DpjaxError(f"curve {name!r} has {fpr.shape} and {tpr.shape} rates; give pairs")
        if np.any(fpr > 0):
            low = min(low, float(np.min(fpr[fpr > 0])))
        axes.step(fpr, tpr, where="post", label=_plain(name), **_style(index) | {"linewidth": 1.5})
        found = float(np.max(tpr[fpr <= 0.01], initial=0.0))
        ends.append(f"{name} finds {100 * found:.1f}% at 1% false positives")
    low = max(1e-5, low)
    grid = np.geomspace(low, 1, 200)
    axes.plot(grid, grid, color=_INK, linestyle=(0, (1, 2)), linewidth=1, label="blind guess")
    if guarantee is not None:
        epsilon, delta = guarantee
        missed = np.maximum(
            1 - delta - np.exp(epsilon) * grid, np.exp(-epsilon) * (1 - delta - grid)
        )
        label = f"limit of epsilon {epsilon:g}"
        style = {"linestyle": (0, (4, 2)), "linewidth": 1, "label": label}
        axes.plot(grid, 1 - np.maximum(missed, 0), color=_INK, **style)
        ends.append(label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, 1)
    axes.set_ylim(low, 1.1)
    return _svg(figure, axes, "ROC on logarithmic axes", "; ".join(ends), prefix)


def curves_figure(
    curves: Sequence[Curve],
    labels: tuple[str, str],
    title: str,
    description: str,
    prefix: str,
) -> str:
    """Lines between points, as inline SVG.

    Args:
      curves: their ``iterations`` are the horizontal axis.
      labels: of the two axes.
      title, description: what a screen reader says.
      prefix: makes the element's ids unique in a page.

    Example:
      >>> svg = curves_figure([Curve("a", [0, 1], [2, 3])], ("x", "y"), "Title", "a rises", "p")
      >>> "Title: a rises" in svg
      True
    """
    _check(curves)
    figure, axes = _axes(*labels)
    for index, curve in enumerate(curves):
        style = _style(index) | {"linewidth": 1.5}
        axes.plot(curve.iterations, curve.values, label=_plain(curve.name), **style)
    return _svg(figure, axes, title, description, prefix)


def standalone(svg: str) -> str:
    """An inline figure as a file of its own, readable on white.

    Example:
      >>> standalone('<svg xmlns="http://www.w3.org/2000/svg">').startswith('<?xml')
      True
    """
    if "xmlns=" not in svg.split(">", 1)[0]:
        svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    opening, rest = svg.split(">", 1)
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n{opening} color="#111">'
        f'<rect width="100%" height="100%" fill="#fff"/>{rest}\n'
    )


def _check(curves: Sequence[Curve]) -> None:
    if not curves:
        raise DpjaxError("there is no curve to draw; leave the figure out")
    for curve in curves:
        found = len(curve.iterations), len(curve.values)
        if found[0] != found[1] or not found[0]:
            raise DpjaxError(
                f"curve {curve.name!r} has {found[0]} iterations and {found[1]} values; "
                "give one value for each, and at least one"
            )
        if not np.all(np.isfinite(np.asarray(curve.values, np.float64))):
            raise DpjaxError(
                f"curve {curve.name!r} has values that are not finite; drop them, or the curve"
            )


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLORS[index % len(_COLORS)],
        # Shifted at every turn of the colours, so that no two of the first 16 look alike.
        "linestyle": _DASHES[(index + index // len(_COLORS)) % len(_DASHES)],
    }


def _plain(text: str) -> str:
    """Text that matplotlib neither hides (a leading underscore) nor reads as a formula."""
    return ("\u200b" + text if text.startswith("_") else text).replace("$", r"\$")


def _axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import, and only reports draw

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, x_label, y_label)
    figure.patch.set_visible(False)
    return figure, axes


def _dress(axes: Any, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, color=_INK, fontsize=9)
    axes.set_ylabel(y_label, color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8, length=3, width=0.6)
    axes.grid(True, color=_INK, alpha=0.13, linewidth=0.6)
    axes.patch.set_visible(False)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_INK)
        spine.set_linewidth(0.6)


def _svg(figure: Any, axes: Any, title: str, description: str, prefix: str) -> str:
    import matplotlib

    columns = 1 if len(axes.lines) < 3 else 2
    figure.legend(
        loc="outside lower left", ncols=columns, frameon=False, fontsize=8, labelcolor=_INK
    )
    buffer = io.StringIO()
    # Text stays text: it takes the page's font and can be read aloud. The salt makes it repeatable.
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpjax"}),
        warnings.catch_warnings(),
    ):
        # A name in a script that matplotlib's own font lacks is only measured a little wrong.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor")
    for index, color in enumerate(_COLORS):  # a dark page may name brighter ones
        svg = svg.replace(color, f"var(--series-{index + 1}, {color})")
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    spoken = html.escape(f"{title}: {description}", quote=True)
    return (
        f'{opening} role="img" aria-label="{spoken}" style="max-width: 100%; height: auto">'
        f"<title>{html.escape(title)}</title><desc>{spoken}</desc>{rest}"
    )
