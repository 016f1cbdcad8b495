"""The plot of a search: the score by trial and by each hyperparameter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from keras_lp.tuning.result import TrialResult, TuningResult

_COLUMNS = 3


def plot(result: TuningResult, path: str | os.PathLike[str] | None) -> Any:
    """Returns the figure of `TuningResult.plot`, and writes it to a file if a path is given."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot needs matplotlib. Install it: pip install 'keras_lp[plots]'"
        ) from error
    done = [trial for trial in result.trials if trial.score is not None]
    names = list(dict.fromkeys(name for trial in done for name in trial.hyperparameters))
    rows = -(-(1 + len(names)) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    _by_trial(axes[0], result, done)
    for ax, name in zip(axes[1:], names, strict=False):
        _by_value(ax, result, name, [t for t in done if name in t.hyperparameters])
    for ax in axes[1 + len(names) :]:
        ax.set_axis_off()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _by_trial(ax: Any, result: TuningResult, done: Sequence[TrialResult]) -> None:
    numbers = [int(trial.name) + 1 for trial in done]
    scores = np.array([trial.score for trial in done], float)
    best = np.maximum if result.direction == "max" else np.minimum
    so_far = best.accumulate(scores)
    ax.plot(numbers, so_far, color="#0072B2", drawstyle="steps-post", label="best so far")
    ax.plot(numbers, scores, "o", color="#E69F00", label="trial")
    ax.set_xlabel("trial")
    ax.set_ylabel(result.objective)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()


def _by_value(ax: Any, result: TuningResult, name: str, trials: Sequence[TrialResult]) -> None:
    values: list[Any] = [trial.hyperparameters[name] for trial in trials]
    scores = [trial.score for trial in trials]
    if name in result.logarithmic:
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter("")  # labels of a short axis would overlap
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        ax.plot(values, scores, "o", color="#E69F00")
    else:
        options = sorted({str(value) for value in values})
        ax.plot([options.index(str(value)) for value in values], scores, "o", color="#E69F00")
        ax.set_xticks(range(len(options)), options)
    ax.set_xlabel(name)
    ax.set_ylabel(result.objective)
