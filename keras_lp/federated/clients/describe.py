"""What clients hold: how many examples, and of which labels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_lp.federated.clients.arrays import class_of, count_examples
from keras_lp.federated.clients.clients import Clients, Population
from keras_lp.utils.progress import Progress
from keras_lp.utils.text_table import ShownAsText


@dataclasses.dataclass(frozen=True, repr=False)
class ClientLabels(ShownAsText):
    """What `lp.describe_clients` found.

    Attributes:
        examples: the number of examples by client.
        counts: by task (`"label"` where there is one), an array `(clients, classes)` of how many
            labels each client has; tasks whose labels are not class numbers are left out.
        classes: by task, the class numbers of the columns; -1 (missing) is not among them.
    """

    examples: dict[Any, int]
    counts: dict[str, np.ndarray]
    classes: dict[str, np.ndarray]

    def __str__(self) -> str:
        sizes = np.array(list(self.examples.values()))
        lines = [
            f"{len(sizes):,} clients, {sizes.sum():,} examples; a client has {sizes.min():,} to "
            f"{sizes.max():,}, median {np.median(sizes):,.0f}"
        ]
        for task, counts in self.counts.items():
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            most = np.median(shares.max(1, initial=0))
            lines.append(
                f"{task}: {len(self.classes[task])} classes; a client has a median of "
                f"{np.median((counts > 0).sum(1)):.0f}, the commonest is {most:.0%} of its labels"
            )
            lines += self._rows(task)
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Draws each client's labels as a bar, one panel per task.

        Args:
            path: where to write the picture. Defaults to None, which writes none.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("A plot needs matplotlib: pip install matplotlib.") from error
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
        """The first clients, one per line, where the classes fit in it."""
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
    """Prints how many examples and labels the clients have, and returns it to be plotted.

    All clients are loaded, one after the other.

    Args:
        clients: as in `FederatedAveraging.fit`.
        verbose: whether to print, and to show a progress bar in a terminal or notebook while
            the clients are loaded. Defaults to True.

    Returns:
        A `ClientLabels` with `examples`, `counts`, `classes` and `plot(path)`.

    Raises:
        ValueError: no client; an example without a label.
        TypeError: clients of another kind than `FederatedAveraging.fit` takes.

    Example:

    >>> import numpy as np, keras_lp as lp
    >>> x, y = np.zeros((6, 2)), np.array([0, 0, 0, 1, 1, 1])
    >>> labels = lp.describe_clients(lp.partition((x, y), by=["a", "a", "b", "b", "b", "b"]))
    2 clients, 6 examples; a client has 2 to 4, median 3
    label: 2 classes; a client has a median of 2, the commonest is 88% of its labels
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
                    values, counts = np.unique(labels[present], return_counts=True)
                    own = dict(zip(values.tolist(), counts.tolist(), strict=True))
                    found.setdefault(task, [{}] * (len(examples) - 1)).append(own)
            for own in found.values():  # a client without this task
                own += [{}] * (len(examples) - len(own))
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
