"""Describes the examples and labels of clients."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_lp.federated.clients.arrays import class_of, count_examples
from keras_lp.federated.clients.clients import Clients, Population
from keras_lp.utils.progress import Progress
from keras_lp.utils.text_table import ShownAsText

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colors of Okabe and Ito, which color-blind people can tell apart, and grey.
_COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999",
)  # fmt: skip
_LONGEST = 20  # characters of a name in a plot


@dataclasses.dataclass(frozen=True, repr=False)
class ClientLabels(ShownAsText):
    """The result of `lp.describe_clients`. Can be printed.

    Attributes:
        examples: the number of examples by client.
        counts: label counts `(clients, classes)` by task (`"label"` for a single task), without
            tasks whose labels are not classes.
        classes: the classes of the columns by task, without missing labels (-1).
    """

    examples: dict[Any, int]
    counts: dict[str, np.ndarray]
    classes: dict[str, np.ndarray]

    def __str__(self) -> str:
        sizes = np.array(list(self.examples.values()))
        lines = [
            f"{len(sizes):,} clients, {sizes.sum():,} examples; {sizes.min():,} to "
            f"{sizes.max():,} per client, median {np.median(sizes):,.0f}"
        ]
        for task, counts in self.counts.items():
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            most = np.median(shares.max(1, initial=0))
            lines.append(
                f"{task}: {len(self.classes[task])} classes; median per client: "
                f"{np.median((counts > 0).sum(1)):.0f} classes, {most:.0%} in the most frequent one"
            )
            lines += self._rows(task)
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws the label counts of each client, with one panel per task.

        Up to 8 classes are stacked bars, one per client. More classes are a heat map of classes by
        clients. Without classes the bars show the numbers of examples.

        Args:
            path: path of an image to write. Defaults to None: no image is written.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("A plot needs matplotlib: pip install matplotlib.") from error
        names = [_short(client) for client in self.examples]
        heights = [6 if len(c) > 20 else 3.5 for c in self.classes.values()] or [3.5]
        size = (7 if len(names) <= 20 else 10, sum(heights))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        if not self.counts:
            axes[0].bar(range(len(names)), [*self.examples.values()], color=_COLORS[0])
            axes[0].set(ylabel="examples", title="examples")
            axes[0].yaxis.get_major_locator().set_params(integer=True)
        for panel, (task, table) in zip(axes, self.counts.items(), strict=False):
            classes = [_short(name) for name in self.classes[task]]
            (_draw_bars if len(classes) <= len(_COLORS) else _draw_map)(panel, table, classes)
            panel.set_title(task)
        for panel in axes:
            _name_clients(panel, names, below=panel is axes[-1])
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _rows(self, task: str, shown: int = 10) -> list[str]:
        """Returns a line for each of the first clients, if there are at most 12 classes."""
        counts, classes = self.counts[task], self.classes[task]
        if len(classes) > 12:
            return []
        width = max(len(f"{number}") for number in (*counts.flat, *classes)) + 1
        names = [str(client) for client in self.examples][:shown]
        margin = max(map(len, ("class", *names)))
        rows = [("class", classes), *zip(names, counts[:shown], strict=True)]
        lines = [
            f"  {name:<{margin}}" + "".join(f"{number:>{width}}" for number in row)
            for name, row in rows
        ]
        return lines + (["  ..."] if len(counts) > shown else [])


def _short(name: Any) -> str:
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _draw_bars(axes: Any, table: np.ndarray, classes: Sequence[str]) -> None:
    """Draws a bar per client, its classes on top of one another."""
    bottom = np.zeros(len(table))
    for column, name, color in zip(table.T, classes, _COLORS, strict=False):
        axes.bar(range(len(table)), column, 0.9, bottom, label=name, color=color)
        bottom += column
    axes.set_ylabel("labels")
    axes.yaxis.get_major_locator().set_params(integer=True)
    if classes:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(  # in the order of the bars, from the top
            handles[::-1],
            labels[::-1],
            title="class",
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            fontsize="small",
        )


def _draw_map(axes: Any, table: np.ndarray, classes: Sequence[str]) -> None:
    """Draws the labels of each class and client as colours, none as white."""
    image = axes.imshow(
        np.ma.masked_equal(table.T, 0), cmap="viridis_r", vmin=0, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    bar = axes.figure.colorbar(image, ax=axes, label="labels (white: none)")
    bar.locator.set_params(integer=True)
    step = math.ceil(len(classes) / 25)
    axes.set_yticks(range(0, len(classes), step), classes[::step], fontsize="small")
    axes.set_ylabel("class")


def _name_clients(axes: Any, names: Sequence[str], below: bool) -> None:
    """Marks the clients on the axis, every so many where they are many; `below` names them."""
    step = math.ceil(len(names) / 40)
    axes.set_xticks(range(0, len(names), step))
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.tick_params("x", labelbottom=below, labelsize="small")
    if below:
        upright = len(names) * max(map(len, names)) > 60
        axes.set_xticklabels(names[::step], rotation=90 if upright else 0)
        axes.set_xlabel("client" if step == 1 else f"client (one name in {step})")


def describe_clients(clients: Clients, *, verbose: bool = True) -> ClientLabels:
    """Prints and returns the number of examples and labels of each client.

    All clients are loaded, one at a time.

    Args:
        clients: as in `FederatedAveraging.fit`.
        verbose: whether to print, and to show a progress bar in a terminal or notebook while the
            clients are loaded. Defaults to True.

    Returns:
        A `ClientLabels` with `examples`, `counts`, `classes` and `plot(path)`.

    Raises:
        ValueError: there are no clients, or inputs and labels of a client differ in length.
        TypeError: `clients` has a type that `FederatedAveraging.fit` does not accept.

    Example:

    >>> import numpy as np, keras_lp as lp
    >>> x, y = np.zeros((6, 2)), np.array([0, 0, 0, 1, 1, 1])
    >>> labels = lp.describe_clients(lp.partition((x, y), by=["a", "a", "b", "b", "b", "b"]))
    2 clients, 6 examples; 2 to 4 per client, median 3
    label: 2 classes; median per client: 2 classes, 88% in the most frequent one
      class 0 1
      a     2 0
      b     1 3
    """
    population = Population(clients)
    examples: dict[Any, int] = {}
    found: dict[str, list[dict[int, int]]] = {}
    with Progress("Clients loaded", len(population.ids), "auto" if verbose else 0) as progress:
        for client in population.ids:
            arrays = population.load(client)
            examples[client] = count_examples(arrays, f" of client {client!r}")
            y = arrays[1]
            for task, labels in (y if isinstance(y, Mapping) else {"label": y}).items():
                labels = class_of(labels)
                if labels is not None:
                    present = labels >= 0 if labels.dtype.kind in "iub" else labels != ""
                    values, numbers = np.unique(labels[present], return_counts=True)
                    own = dict(zip(values.tolist(), numbers.tolist(), strict=True))
                    found.setdefault(task, [{}] * (len(examples) - 1)).append(own)
            for each in found.values():  # a client without this task
                each += [{}] * (len(examples) - len(each))
            progress.step()
    classes = {task: np.unique([c for own in each for c in own]) for task, each in found.items()}
    counts = {
        task: np.array([[own.get(c, 0) for c in classes[task].tolist()] for own in each])
        for task, each in found.items()
    }
    result = ClientLabels(examples, counts, classes)
    if verbose:
        print(result)
    return result
