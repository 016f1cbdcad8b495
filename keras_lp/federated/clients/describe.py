"""Describes the examples and labels of clients."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_lp.federated.clients.arrays import class_of, count_examples
from keras_lp.federated.clients.clients import Clients, Population
from keras_lp.utils.text_table import ShownAsText

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        """Draws the label counts of each client as a bar, with one panel per task.

        Args:
            path: path of an image to write. Defaults to None: no image is written.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("`plot` needs matplotlib: pip install matplotlib.") from error
        counts = self.counts or {"examples": np.array(list(self.examples.values()))[:, None]}
        figure = Figure(figsize=(7, 3 * len(counts)), layout="constrained")
        panels = figure.subplots(len(counts), squeeze=False)[:, 0]
        for axes, (task, table) in zip(panels, counts.items(), strict=True):
            left = np.zeros(len(table))
            for i, column in enumerate(table.T):
                name = str(self.classes[task][i]) if task in self.classes else None
                color = colormaps["tab20"](i % 20)
                axes.bar(np.arange(len(table)), column, 1.0, left, label=name, color=color)
                left += column
            axes.set(xlabel="client", ylabel="labels", title=task)
            if 1 < table.shape[1] <= 20:
                axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
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


def describe_clients(clients: Clients, *, verbose: bool = True) -> ClientLabels:
    """Prints and returns the number of examples and labels of each client.

    All clients are loaded, one at a time.

    Args:
        clients: as in `FederatedAveraging.fit`.
        verbose: whether to print the result. Defaults to True.

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
    classes = {task: np.unique([c for own in each for c in own]) for task, each in found.items()}
    counts = {
        task: np.array([[own.get(c, 0) for c in classes[task].tolist()] for own in each])
        for task, each in found.items()
    }
    result = ClientLabels(examples, counts, classes)
    if verbose:
        print(result)
    return result
