"""The callbacks of keras-tuner, without what costs time in each step and epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import keras_tuner
import numpy as np

from keras_lp.backbones.freezing import is_frozen


def cheaper(callbacks: Iterable[Any]) -> list[Any]:
    """Replaces the callbacks that keras-tuner adds to a trial; the results are the same.

    Its checkpoints are written once, at the end of the trial, and its hooks of single steps are
    left out where they do nothing, so that `fit` can run several steps per call.
    """
    callbacks = list(callbacks)
    tuners = (getattr(callback, "tuner", None) for callback in callbacks)
    tuner = next((one for one in tuners if getattr(one, "loads_only_the_best", False)), None)
    return [_replaced(callback, tuner) for callback in callbacks]


def _replaced(callback: Any, tuner: Any) -> Any:
    name, module = type(callback).__name__, type(callback).__module__
    if not module.startswith("keras_tuner."):
        return callback
    if name == "SaveBestEpoch":
        return _SaveAtEnd(callback, tuner)
    own, given = type(callback.tuner) if name == "TunerCallback" else None, keras_tuner.Tuner
    hooks = ("on_batch_begin", "on_batch_end")
    if own is not None and all(getattr(own, hook) is getattr(given, hook) for hook in hooks):
        return _Epochs(callback)
    return callback


class _Epochs(keras.callbacks.Callback):
    """Passes epochs on, and no steps."""

    by_epoch = True

    def __init__(self, callback: Any) -> None:
        super().__init__()
        self._callback = callback

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._callback.set_model(model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._callback.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._callback.on_epoch_end(epoch, logs)


class _SaveAtEnd(keras.callbacks.Callback):
    """Keeps the weights of the best epoch in memory, and writes them at the end of training.

    The state of the optimizer is that of the best epoch too.

    Args:
        callback: the callback of keras-tuner.
        tuner: the tuner if it loads the weights of the best trial only: those of others are not
            written. Defaults to None.
    """

    by_epoch = True

    def __init__(self, callback: Any, tuner: Any = None) -> None:
        super().__init__()
        self._callback = callback  # has the best value over several executions
        self._tuner = tuner
        self._best: list[np.ndarray] | None = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        objective = self._callback.objective
        if objective.has_value(logs):
            value = objective.get_value(logs)
            if not objective.better_than(value, self._callback.best_value):
                return
            self._callback.best_value = value
        self._best = [np.array(variable) for variable in self._variables()]

    def on_train_end(self, logs: Any = None) -> None:
        if self._best is None or self._is_beaten():
            return
        last = [np.array(variable) for variable in self._variables()]
        self._assign(self._best)
        self.model.save_weights(self._callback.filepath)
        self._assign(last)
        self._best = None

    def _is_beaten(self) -> bool:
        """Whether an earlier trial is at least as good."""
        if self._tuner is None:
            return False
        done = [one for one in self._tuner.oracle.get_best_trials(1) if one.score is not None]
        better = self._callback.objective.better_than
        return any(not better(self._callback.best_value, one.score) for one in done)

    def _variables(self) -> list[keras.Variable]:
        """Returns what training changes."""
        layers = [layer for layer in self.model.layers if is_frozen(layer)]
        frozen = {id(weight) for layer in layers for weight in layer.weights}
        own = [weight for weight in self.model.weights if id(weight) not in frozen]
        return [*own, *self.model.optimizer.variables]

    def _assign(self, values: list[np.ndarray]) -> None:
        for variable, value in zip(self._variables(), values, strict=True):
            variable.assign(value)
