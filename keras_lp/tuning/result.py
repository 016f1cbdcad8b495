"""The result of `lp.tune`: the best model, the trials, and a model trained on all data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import keras

from keras_lp.utils.text_table import ShownAsText, text_table


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """One trial of a search.

    Attributes:
        name: the number of the trial in the order of their start, as text.
        hyperparameters: the chosen values by name.
        score: the best value of the objective over the epochs; None if the trial failed.
        epochs: number of epochs after which it was reached, including those of the trial that it
            continues.
        error: the error message of a failed trial.
    """

    name: str
    hyperparameters: dict[str, Any]
    score: float | None
    epochs: int
    error: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class TuningResult(ShownAsText):
    """The result of `lp.tune`; printed as a table of the trials, the best first.

    Attributes:
        model: the compiled model of the best trial, with the weights of its best epoch.
        hyperparameters: the values of the best trial by name.
        objective: name of the result that was improved, such as `"val_accuracy"`.
        direction: `"max"` or `"min"`.
        trials: all trials in the order of their start.
        logarithmic: names of the hyperparameters that were searched on a logarithmic scale.
    """

    model: keras.Model
    hyperparameters: dict[str, Any]
    objective: str
    direction: str
    trials: tuple[TrialResult, ...]
    logarithmic: frozenset[str]
    _refit: Callable[[Any], keras.Model]

    @property
    def best(self) -> TrialResult:
        """The trial with the best score; of equal ones the first."""
        return self._ranked()[0]

    def refit(self, data: Any) -> keras.Model:
        """Trains a new model with the best hyperparameters and returns it.

        It trains for as many epochs as the best trial needed for its best score. Pass the training
        and validation data together, never test data that you want to report.

        Args:
            data: as in `lp.tune`.
        """
        return self._refit(data)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plots the score by trial and by each hyperparameter.

        Args:
            path: file to write, such as `"tuning.png"`. Defaults to None: the figure is not
                written.

        Returns:
            The `matplotlib` figure.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        from keras_lp.tuning.plot import plot

        return plot(self, path)

    def __str__(self) -> str:
        names = list(dict.fromkeys(k for trial in self.trials for k in trial.hyperparameters))
        rows = [["trial", self.objective, "epochs", *names]]
        for trial in self._ranked():
            score = "failed" if trial.score is None else f"{trial.score:.4f}"
            values = [_shown(trial.hyperparameters.get(name)) for name in names]
            rows.append([trial.name, score, str(trial.epochs), *values])
        return text_table(rows)

    def _ranked(self) -> list[TrialResult]:
        sign = -1 if self.direction == "max" else 1
        done = [trial for trial in self.trials if trial.score is not None]
        failed = [trial for trial in self.trials if trial.score is None]
        return [*sorted(done, key=lambda trial: sign * (trial.score or 0.0)), *failed]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
