"""Plots of the experiments. Matplotlib is imported when the first is drawn; it comes with the extra `eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.files import write_atomic

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # distinct to colour-blind eyes too
_MARKERS = ("o", "s", "^", "D", "v", "P")


def require_matplotlib() -> Any:
    """The `pyplot` module, drawing to files; to be called before long work whose result is plotted.

    Raises:
        ValueError: when Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def line_plot(
    path: Path, lines: Mapping[str, Mapping[float, float]], x_label: str, y_label: str, legend_title: str
) -> None:
    """Write curves as a PNG: name -> {x: y}."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(figsize=(4.8, 3.4), dpi=200, layout="constrained")
    for i, (name, points) in enumerate(lines.items()):
        style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 4}
        axes.plot(list(points), list(points.values()), label=name, linewidth=1.4, **style)
    axes.set(xlabel=x_label, ylabel=y_label, xticks=sorted({x for points in lines.values() for x in points}))
    axes.legend(title=legend_title, frameon=False)
    _finish(pyplot, figure, [axes], path)


def bar_plots(path: Path, names: Sequence[str], panels: Mapping[str, Sequence[float | None]], x_label: str) -> None:
    """Write one panel of bars for each quantity as a PNG: title -> a value for each name, None where there is none."""
    pyplot = require_matplotlib()
    figure, _ = pyplot.subplots(1, len(panels), figsize=(2.5 * len(panels), 2.8), dpi=200, layout="constrained")
    for axis, colour, (title, values) in zip(figure.axes, _COLOURS, panels.items()):
        bars = axis.bar(range(len(names)), [value or 0 for value in values], color=colour, width=0.62)
        labels = ["" if value is None else f"{value:.3g}" for value in values]
        axis.bar_label(bars, labels, padding=2, fontsize=8)
        axis.set(title=title, xlabel=x_label)
        axis.set_xticks(range(len(names)), names)
        axis.margins(y=0.15)
    _finish(pyplot, figure, figure.axes, path)


def _finish(pyplot: Any, figure: Any, axes: Sequence[Any], path: Path) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))
    pyplot.close(figure)
