"""Plots: panels in one style, and curves with a band of one standard deviation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.scores import deviation

GREY, BLUE, ORANGE = "#5f6368", "#1a73e8", "#e8710a"
STYLES = [(GREY, "o-"), (BLUE, "s-"), (ORANGE, "^--"), ("#12a594", "v:"), ("#a142f4", "d-.")]


@contextlib.contextmanager
def panels(
    path: Path, columns: int, rows: int = 1, size: tuple[float, float] = (9.5, 4), **options: Any
) -> Iterator[list[Any]]:
    """Yields the axes of a figure, and writes it; the labels of the first make the legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **options
    )
    yield list(axes.flat)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        place = {"loc": "outside lower center", "ncols": len(labels), "frameon": False}
        figure.legend(handles, labels, **place)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"Plot: {path}")


def curves(
    axis: Any,
    ticks: Sequence[int],
    found: Mapping[str, Sequence[np.ndarray]],
    unit: str = "",
    **labels: str,
) -> None:
    """Draws a curve for each name: mean and deviation of the values at each tick, x logarithmic.

    Args:
        axis: of the panel.
        ticks: the numbers of examples.
        found: for each name the values by tick; fewer values end the curve earlier.
        unit: after each tick.
        **labels: of `axis.set`.
    """
    for (name, values), (colour, style) in zip(found.items(), STYLES, strict=False):
        mean = np.array([np.mean(one) for one in values])
        band = np.array([deviation(one) for one in values])
        x = ticks[: len(values)]
        axis.fill_between(x, mean - band, mean + band, color=colour, alpha=0.15, lw=0)
        axis.plot(x, mean, style, color=colour, label=name, markersize=5)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}{unit}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.set(**labels)


def dots(
    axis: Any, found: Mapping[str, np.ndarray], colours: Mapping[str, str], **labels: str
) -> None:
    """Draws a row for each name: every value, the mean and the standard deviation."""
    for i, (name, values) in enumerate(found.items()):
        colour = colours.get(name, GREY)
        axis.plot(values, [i] * len(values), "o", color=colour, alpha=0.35, markersize=4)
        error = {"xerr": deviation(values), "fmt": "D", "capsize": 4}
        axis.errorbar(np.mean(values), i, color=colour, **error)
    axis.set_yticks(range(len(found)), list(found))
    axis.grid(alpha=0.25, axis="x")
    axis.set(**labels)
