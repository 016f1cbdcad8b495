"""Which weights count by what: a head by its own labels, what is shared by examples."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np

from keras_lp.federated.clients.arrays import Arrays, count_examples
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import tasks


class Groups:
    """The groups of a model's trainable weights that are averaged with one weight per client.

    With one task there is one group. With several, each task's own layers are a group, and all
    that the tasks share is the first.

    Args:
        model: the model.
        weighting: `"examples"`, or `"uniform"`, where each client counts as one.

    Attributes:
        of_variables: the number of the group of each trainable variable.
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
        """Returns what one client weighs in each group, `(groups,)` float32."""
        counts = [count_examples(data)]
        for name, task in self._tasks.items():
            labels = data[1][name]
            present = ~np.isnan(labels) if np.isnan(task.missing) else labels >= 0
            if isinstance(task, Classification) and np.issubdtype(labels.dtype, np.floating):
                present = present.all(-1)  # distributions over the classes
            counts.append(present.sum())
        shares = np.array(counts, "float32")
        return np.sign(shares) if self._uniform else shares
