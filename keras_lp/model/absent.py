"""Results of tasks without labels: they are unknown, which is different from 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import ops

from keras_lp.balancing.ways import balancing_of
from keras_lp.model.compiled import has_own_losses
from keras_lp.tasks.heads import heads


def seen(model: keras.Model, names: Iterable[str]) -> dict[str, Any]:
    """Returns for each result whether it includes a label, a boolean tensor.

    Labels of weight 0 do not count. Names are those of `get_metrics_result`. The weights of
    balanced tasks do not depend on labels.
    """
    known = heads(model)
    if not known or not has_own_losses(model):
        return {name: ops.convert_to_tensor(True) for name in names}
    balancing = balancing_of(model)
    weights = {mean.name for mean in balancing.weight_means} if balancing is not None else set()
    by_task = {task: ops.greater(head.loss_mean.count, 0) for task, head in known.items()}
    by_task = {task: ops.convert_to_tensor(one) for task, one in by_task.items()}
    any_task = ops.any(ops.stack(list(by_task.values())))
    longest_first = sorted(by_task, key=len, reverse=True)
    found = {}
    for name in names:
        if name in weights:
            found[name] = ops.convert_to_tensor(True)
            continue
        task = next((task for task in longest_first if name.startswith(f"{task}_")), None)
        found[name] = by_task[task] if task is not None and len(known) > 1 else any_task
    return found


def unknown_as_nan(model: keras.Model, logs: dict[str, Any]) -> dict[str, Any]:
    """Returns results with NaN for those that include no label."""
    labels = seen(model, logs)
    return {name: ops.where(labels[name], value, float("nan")) for name, value in logs.items()}


def unknown(model: keras.Model, results: Iterable[str], prefix: str = "") -> set[str]:
    """Returns the names of the results that include no label, with this prefix."""
    return {f"{prefix}{name}" for name, label in seen(model, results).items() if not label}


def with_unknown_hidden(
    callbacks: Sequence[keras.callbacks.Callback], names: set[str] | None = None
) -> list[keras.callbacks.Callback]:
    """Returns callbacks that do not receive the results of an epoch that include no label.

    EarlyStopping then reports that a value is not available, instead of taking it for the best.
    Later callbacks, such as the history, get NaN.

    Args:
        callbacks: the callbacks.
        names: names of the unknown results, set before each end of an epoch. Defaults to None:
            they are determined from the metrics of the model, as in `fit`.
    """
    hidden = _Hidden(set() if names is None else names)
    find = [_Find(hidden.names)] if names is None else []
    return [*find, hidden, *callbacks, _Shown(hidden.names)]


class _Unknown(keras.callbacks.Callback):
    """Base class: `names` are those of the results of this epoch that include no label."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names


class _Find(_Unknown):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.names.clear()
        self._validated = False

    def on_test_begin(self, logs: Any = None) -> None:
        """Stores the unknown results of training before validation resets the counts."""
        self._validated = True
        self.names |= unknown(self.model, self.model.get_metrics_result())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        prefix = "val_" if self._validated else ""
        self.names |= unknown(self.model, self.model.get_metrics_result(), prefix)


class _Hidden(_Unknown):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for name in self.names:
            logs.pop(name, None)


class _Shown(_Unknown):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs.update(dict.fromkeys(sorted(self.names), float("nan")))
