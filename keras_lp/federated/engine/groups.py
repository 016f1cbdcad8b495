"""Weights of clients in the mean: heads by their labels, shared layers by examples."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np

from keras_lp.federated.clients.arrays import Arrays, count_examples
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import tasks


class Groups:
    """Groups of trainable weights that are averaged with the same weight per client.

    A model with one task has one group. With several tasks, the first group is the shared layers,
    and the layers of each task are one group each.

    Args:
        model: the model.
        weighting: `"examples"`, or `"uniform"` for equal weights of all clients.

    Attributes:
        of_variables: the index of the group of each trainable variable.
    """

    def __init__(self, model: keras.Model, weighting: str) -> None:
        self._uniform = weighting == "uniform"
        several = len(tasks(model)) > 1 and isinstance(model.output, Mapping)
        self._tasks = tasks(model) if several else {}
        users: dict[int, set[int]] = {}
        for number, name in enumerate(self._tasks, 1):
            for operation in keras.Model(model.inputs, model.output[name]).operations:
                for variable in getattr(operation, "trainable_variables", []):
                    users.setdefault(id(variable), set()).add(number)
        owners = [users.get(id(v), {0}) for v in model.trainable_variables]
        self.of_variables = [next(iter(own)) if len(own) == 1 else 0 for own in owners]

    def __len__(self) -> int:
        return 1 + len(self._tasks)

    def shares(self, data: Arrays) -> np.ndarray:
        """Returns the weight of a client in each group, float32 `(groups,)`."""
        counts = [count_examples(data)]
        for name, task in self._tasks.items():
            labels = data[1][name]
            present = ~np.isnan(labels) if np.isnan(task.missing) else labels >= 0
            if isinstance(task, Classification) and np.issubdtype(labels.dtype, np.floating):
                present = present.all(-1)  # distributions over the classes
            counts.append(present.sum())
        shares = np.array(counts, "float32")
        return np.sign(shares) if self._uniform else shares
