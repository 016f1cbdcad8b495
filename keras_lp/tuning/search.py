"""The tuner of `lp.tune`: one of keras-tuner with seeds, progress and bounded files."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any, Literal

import keras_tuner
from keras_tuner import errors

from keras_lp.tuning.hypermodel import seed_trial

TunerName = Literal["hyperband", "random", "bayesian", "grid"]
_FACTOR = 3  # of Hyperband: a third of the trials goes on, for three times as many epochs
CHECKPOINT = "checkpoint.weights.h5"


def make_tuner(
    kind: TunerName,
    hypermodel: Any,
    *,
    objective: keras_tuner.Objective,
    max_trials: int,
    epochs: int,
    executions_per_trial: int,
    directory: str,
    seed: int,
    verbose: bool,
) -> Any:
    """Returns a tuner of keras-tuner.

    Args:
        kind: name of the tuner.
        hypermodel: the hypermodel.
        objective: the objective.
        max_trials: number of trials.
        epochs: number of epochs of a trial, at most.
        executions_per_trial: as in keras-tuner.
        directory: folder of the search.
        seed: random seed of the search and of the trials.
        verbose: whether to print a line per trial.

    Raises:
        ValueError: if Hyperband cannot finish its first bracket.
    """
    common = {
        "objective": objective,
        "directory": directory,
        "project_name": "search",
        "executions_per_trial": executions_per_trial,
    }
    names = {
        "random": keras_tuner.RandomSearch,
        "bayesian": keras_tuner.BayesianOptimization,
        "grid": keras_tuner.GridSearch,
        "hyperband": keras_tuner.Hyperband,
    }
    made = type("Search", (_Search, names[kind]), {})
    with contextlib.redirect_stdout(None):  # "Reloading Tuner from ..."
        if kind == "hyperband":
            check_bracket(max_trials, epochs)
            tuner = made(
                hypermodel,
                max_epochs=epochs,
                factor=_FACTOR,
                hyperband_iterations=None,  # until there are enough trials
                seed=seed + 1,  # 0 is a random seed for keras-tuner
                **common,
            )
            tuner.oracle.max_trials = max_trials
        else:
            tuner = made(hypermodel, max_trials=max_trials, seed=seed + 1, **common)
    if kind != "grid" and isinstance(tuner.oracle, keras_tuner.Oracle):  # not that of a worker
        _start_with_defaults(tuner.oracle)
    tuner.seed, tuner.max_trials, tuner.verbose = seed, max_trials, verbose
    tuner.loads_only_the_best = kind != "hyperband" and executions_per_trial == 1
    tuner.seconds = []
    return tuner


def check_bracket(max_trials: int, epochs: int) -> None:
    """Raises `ValueError` unless Hyperband can finish its first bracket."""
    brackets = 0
    while _FACTOR**brackets <= epochs:
        brackets += 1
    end = math.ceil(1 + math.log(epochs, _FACTOR)) / brackets
    factors = [_FACTOR ** (brackets - 1 - i) for i in range(brackets)]
    rounds = [(math.ceil(end * factor), math.ceil(epochs / factor)) for factor in factors]
    needed = sum(size for size, _ in rounds)
    if max_trials < needed:
        steps = ", ".join(f"{size} of {length} epochs" for size, length in rounds)
        raise ValueError(
            f'tuner="hyperband" with epochs={epochs} needs max_trials={needed} or more for one '
            f"round of successive halving: {steps}. Received: max_trials={max_trials}. Pass fewer "
            'epochs, or tuner="random".'
        )


def still_needed(oracle: Any) -> set[str]:
    """Returns the trials that Hyperband may continue."""
    brackets = oracle.get_state().get("brackets", [])
    return {trial["id"] for bracket in brackets for trials in bracket["rounds"] for trial in trials}


def _start_with_defaults(oracle: Any) -> None:
    """Lets the first trial have the default values, so that a search includes them."""
    populate = oracle.populate_space

    def populate_space(trial_id: str) -> Any:
        first = not oracle.trials
        response = populate(trial_id)
        if first and response.get("values"):
            defaults = keras_tuner.HyperParameters()
            for one in oracle.get_space().space:
                defaults.merge([one])
                if defaults.is_active(one):
                    defaults.values[one.name] = one.default
            own = {k: v for k, v in response["values"].items() if k.startswith("tuner/")}
            response["values"] = {**defaults.values, **own}
        return response

    oracle.populate_space = populate_space


class _Search(keras_tuner.Tuner):
    """Mixed into a tuner of keras-tuner, which is the next class of `super()`."""

    def run_trial(self: Any, trial: Any, *args: Any, **kwargs: Any) -> Any:
        seed_trial(self.seed, trial.trial_id)
        self.started = time.monotonic()
        try:
            return super().run_trial(trial, *args, **kwargs)
        except (TypeError, ValueError) as error:
            if isinstance(error, errors.FatalError) or self.seconds:
                raise
            # Nothing has worked yet: the data or the arguments are wrong, as they will be later.
            fatal = (
                errors.FatalTypeError if isinstance(error, TypeError) else errors.FatalValueError
            )
            raise fatal(str(error)) from error

    def on_trial_end(self: Any, trial: Any) -> None:
        super().on_trial_end(trial)
        self.seconds.append(time.monotonic() - self.started)
        best = self.oracle.get_best_trials(1)[0]
        if isinstance(self.oracle, keras_tuner.Oracle):  # not one of several workers
            kept = {best.trial_id, *still_needed(self.oracle)}
            for name in set(self.oracle.trials) - kept:
                Path(self.get_trial_dir(name), CHECKPOINT).unlink(missing_ok=True)
        if self.verbose:
            print(self._line(self.oracle.get_trial(trial.trial_id), best), flush=True)

    def _line(self: Any, trial: Any, best: Any) -> str:
        name = self.oracle.objective.name
        if trial.score is None or trial.status != "COMPLETED":
            score = f"failed: {_last_line(trial.message)}"
        else:
            score = f"{name}: {trial.score:.4f} - best: {best.score:.4f}"
        number = int(trial.trial_id) + 1
        left = self.max_trials - number
        seconds = sum(self.seconds) / len(self.seconds) * left
        rest = f" - about {_duration(seconds)} left" if left else ""
        return f"Trial {number}/{self.max_trials} - {_duration(self.seconds[-1])} - {score}{rest}"


def _last_line(message: str | None) -> str:
    lines = (message or "").strip().splitlines()
    return lines[-1] if lines else "no message"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    return f"{minutes}min" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}min"
