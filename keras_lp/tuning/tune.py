"""`lp.tune`: a search in one call."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import keras
import keras_tuner
import numpy as np
from keras_tuner.engine.trial import Trial

from keras_lp.model.data import is_batches, readable
from keras_lp.multitask.comparison import Comparison
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import tasks
from keras_lp.tuning.federated import FederatedHyperModel
from keras_lp.tuning.hypermodel import BuilderHyperModel, seed_trial
from keras_lp.tuning.multitask import GAIN, MultitaskHyperModel
from keras_lp.tuning.objective import make_objective
from keras_lp.tuning.result import TrialResult, TuningResult
from keras_lp.tuning.search import CHECKPOINT, TunerName, make_tuner
from keras_lp.utils.arguments import Verbose, check_choice, check_positive
from keras_lp.utils.files import whole_file

_HELD_OUT = 5  # one of so many examples


def tune(
    hypermodel: keras_tuner.HyperModel,
    data: Any,
    *,
    max_trials: int,
    validation_data: Any = None,
    tuner: TunerName = "hyperband",
    objective: str | keras_tuner.Objective | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    executions_per_trial: int = 1,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    directory: str | os.PathLike[str] | None = None,
    seed: int = 0,
    verbose: Verbose = "auto",
) -> TuningResult:
    """Searches for good settings of a builder with keras-tuner.

    The first trial has the default settings (except with `"grid"`). With `"hyperband"` it has the
    shortest number of epochs, unless it is among the best. Choose with validation data only: keep
    test data for the model that this function returns.

    With `directory`, a killed program that is started again continues: the trial that was running
    is repeated, and the search ends as if it had not been killed. A higher `max_trials` continues a
    search that has ended. Only the weights that are still needed are stored: those of the best
    trial, and with `"hyperband"` those of the trials that may go on (several processes keep all).

    Several processes share one search as in keras-tuner: start this function in each with the same
    `directory` and the environment variables `KERASTUNER_TUNER_ID` (`"chief"` in one process),
    `KERASTUNER_ORACLE_IP` and `KERASTUNER_ORACLE_PORT`. The chief runs no trials; its result has
    those of all workers.

    Args:
        hypermodel: `lp.TransferHyperModel`, `lp.FinetuneHyperModel`, `lp.MultitaskHyperModel`,
            `lp.FederatedHyperModel`, or any `keras_tuner.HyperModel`.
        data: `(x, y)` or `(x, y, sample_weight)` arrays, or a batched `tf.data.Dataset`. For
            `lp.FederatedHyperModel` the clients of `lp.FederatedAveraging.fit`.
        max_trials: number of trials. With `"hyperband"` a trial that goes on counts again.
        validation_data: data in the same form; for a federation, central data. Defaults to None:
            a fifth of the arrays, with the same share of each class.
        tuner: `"hyperband"`, `"random"`, `"bayesian"` or `"grid"`. Defaults to `"hyperband"`, which
            starts many short trials and continues the best third of them.
        objective: the name of a task, which means its first metric; the name of a result, such as
            `"val_loss"`; or an objective of keras-tuner. Defaults to None: the first metric of one
            task; for `lp.MultitaskHyperModel` the mean gain over single-task models, which are
            trained first; `"val_loss"` for other models with several tasks.
        epochs: number of epochs (or federated rounds) of a trial, at most. Defaults to 10.
        batch_size: batch size for arrays. Defaults to 32.
        executions_per_trial: number of times that each trial is trained; the mean counts. Defaults
            to 1.
        callbacks: callbacks of each trial, which are copied. Defaults to none.
        directory: folder of the search. Defaults to None: a temporary folder.
        seed: random seed, 0 or more. Trials call `keras.utils.set_random_seed`. Defaults to 0.
        verbose: 0 is silent; otherwise a line per trial is printed. Defaults to `"auto"`.

    Returns:
        A `TuningResult`: the best `model`, its `hyperparameters`, the `trials` (printed as a
        table), `plot(path)` and `refit(all_data)`.

    Raises:
        ValueError: if nothing is searched, the objective is unknown, `max_trials` is too small for
            Hyperband, `validation_data` is needed, the data are invalid, or `directory` has
            another search.
        TypeError: if the data have another type.
        RuntimeError: if three trials in a row failed.
        ImportError: if keras-tuner is not installed.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu")])
    >>> hypermodel = lp.TransferHyperModel(backbone, ["small", "large"])
    >>> x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    >>> data = x, (x.sum(1) > 0).astype(int)
    >>> found = lp.tune(hypermodel, data, max_trials=3, tuner="random", epochs=2, verbose=0)
    >>> len(found.trials), found.objective
    (3, 'val_accuracy')
    >>> model = found.refit(data)

    Reference: Li et al., 2018, Hyperband (arXiv:1603.06560).
    """
    check_positive("max_trials", max_trials, integer=True)
    check_positive("epochs", epochs, integer=True)
    check_positive("executions_per_trial", executions_per_trial, integer=True)
    check_choice("tuner", tuner, get_args(TunerName))
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"`seed` must be an integer of 0 or more. Received: seed={seed!r}.")
    space = keras_tuner.HyperParameters()
    model = hypermodel.build(space)
    _check_space(space)
    goal = make_objective(objective, model, hypermodel)
    arguments = _arguments(hypermodel, model, data, validation_data, batch_size, int(seed))
    with _folder(directory) as folder:
        _check_folder(folder, {
            "hypermodel": type(hypermodel).__name__,
            "tasks": {name: repr(task) for name, task in tasks(model).items()},
            "space": json.loads(json.dumps(space.get_config()["space"])),
            "objective": goal.name,
            "tuner": tuner,
            "epochs": int(epochs),
            "executions_per_trial": int(executions_per_trial),
            "seed": int(seed),
        })  # fmt: skip
        made = make_tuner(
            tuner,
            hypermodel,
            objective=goal,
            max_trials=int(max_trials),
            epochs=int(epochs),
            executions_per_trial=int(executions_per_trial),
            directory=folder,
            seed=int(seed),
            verbose=verbose not in (0, False),
        )
        is_chief = "chief" in os.environ.get("KERASTUNER_TUNER_ID", "")  # which runs no trials
        if goal.name == GAIN and isinstance(hypermodel, MultitaskHyperModel) and not is_chief:
            _compare(hypermodel, arguments, epochs, Path(folder, "single_tasks.json"))
        try:
            with _without_needless_warnings(), _little_garbage():
                made.search(**arguments, epochs=epochs, callbacks=list(callbacks), verbose=0)
        except keras_tuner.errors.FatalError as error:
            raise error.__cause__ or error from None
        finally:
            if isinstance(hypermodel, BuilderHyperModel):
                hypermodel.forget_features()
        return _result(Path(made.project_dir), hypermodel, goal, int(epochs), int(seed), batch_size)


@contextlib.contextmanager
def _little_garbage() -> Iterator[None]:
    """Leaves all objects that exist out of garbage collection, which each trial starts often."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _without_needless_warnings() -> Iterator[None]:
    """Hides what a user cannot act on: functions traced for each model, fits of the tuner."""

    def other(record: logging.LogRecord) -> bool:
        return "triggered tf.function retracing" not in record.getMessage()

    logger = logging.getLogger("tensorflow")
    logger.addFilter(other)
    try:
        with warnings.catch_warnings():
            # Of the Gaussian process of BayesianOptimization, after few trials.
            warnings.filterwarnings("ignore", "The optimal value found for dimension")
            yield
    finally:
        logger.removeFilter(other)


def _arguments(
    hypermodel: Any, model: Any, data: Any, validation_data: Any, batch_size: int, seed: int
) -> dict[str, Any]:
    """Returns the arguments of `fit` for the data."""
    if isinstance(hypermodel, FederatedHyperModel):
        if validation_data is None:
            raise ValueError(
                "A search over a federation needs `validation_data`: central data that no client "
                "trains on. Received: validation_data=None."
            )
        return {"clients": data, "validation_data": validation_data}
    check_positive("batch_size", batch_size, integer=True)
    data = readable(data, "data")
    if is_batches(data):
        if validation_data is None:
            raise ValueError(
                "A search with a data set needs `validation_data`. Received: "
                "validation_data=None. Pass another data set, or data as arrays."
            )
        return {"x": data, "validation_data": validation_data}
    if validation_data is None:
        data, validation_data = _hold_out(model, data, seed)
    named = dict(zip(("x", "y", "sample_weight"), data, strict=False))
    held_out = readable(validation_data, "validation_data")
    return {**named, "batch_size": batch_size, "validation_data": held_out}


def _hold_out(model: Any, data: tuple[Any, ...], seed: int) -> tuple[Any, Any]:
    """Returns two parts of arrays, with the same share of each class of a single task."""
    count = len(keras.tree.flatten(data[0])[0])
    if count < 2 * _HELD_OUT:
        raise ValueError(
            f"A fifth of the examples is held out if `validation_data` is None, which needs "
            f"{2 * _HELD_OUT} or more. Received: {count} examples."
        )
    random = np.random.default_rng(seed)
    labels, known = data[1], list(tasks(model).values())
    alone = len(known) == 1 and isinstance(known[0], Classification) and np.ndim(labels) == 1
    groups = np.unique(np.asarray(labels), return_inverse=True)[1] if alone else np.zeros(count)
    order = np.lexsort((random.random(count), groups))
    chosen = np.zeros(count, bool)
    chosen[order[random.integers(_HELD_OUT) :: _HELD_OUT]] = True
    train, held_out = np.flatnonzero(~chosen), np.flatnonzero(chosen)

    def rows(numbers: np.ndarray) -> Any:
        return keras.tree.map_structure(lambda leaf: np.asarray(leaf)[numbers], data)

    return rows(train), rows(held_out)


def _check_space(space: keras_tuner.HyperParameters) -> None:
    kinds = keras_tuner.engine.hyperparameters
    several = [
        one.name
        for one in space.space
        if not isinstance(one, kinds.Fixed)
        and not (isinstance(one, kinds.Choice) and len(set(one.values)) < 2)
        and not (isinstance(one, (kinds.Int, kinds.Float)) and one.min_value == one.max_value)
    ]
    if not several:
        raise ValueError(
            "A search needs a hyperparameter with two or more values. Received: a space with one "
            f'point, {space.values}. Leave an argument of the hypermodel at "search", or pass a '
            "function of `hp` with several values."
        )


@contextlib.contextmanager
def _folder(directory: str | os.PathLike[str] | None) -> Iterator[str]:
    if directory is not None:
        yield os.fspath(directory)
        return
    with tempfile.TemporaryDirectory(prefix="keras_lp_tuning_") as folder:
        yield folder


def _check_folder(folder: str, settings: dict[str, Any]) -> None:
    """Raises `ValueError` if a folder has a search with other settings."""
    path = Path(folder, "settings.json")
    if not path.exists():
        with whole_file(path) as file:
            file.write(json.dumps(settings, indent=1).encode())
        return
    found = json.loads(path.read_text())
    other = [name for name in settings if found.get(name) != settings[name]]
    if other:
        raise ValueError(
            "A search continues in `directory` with the same settings. Received: "
            f"{ {name: settings[name] for name in other} }, and {path} has "
            f"{ {name: found.get(name) for name in other} }. Pass another `directory`."
        )


def _compare(
    hypermodel: MultitaskHyperModel, arguments: dict[str, Any], epochs: int, path: Path
) -> None:
    """Trains single-task models for the gain, or reads their results from a file."""
    if hypermodel.comparison is None and path.exists():
        found = json.loads(path.read_text())
        single = {name: np.array(values) for name, values in found["single"].items()}
        hypermodel.use(Comparison(found["metrics"], single, {}, {}))
    if hypermodel.comparison is None:
        names = ("x", "y", "sample_weight")
        data = tuple(arguments[name] for name in names if arguments.get(name) is not None)
        hypermodel.compare(
            data[0] if len(data) == 1 else data,
            validation_data=arguments["validation_data"],
            epochs=epochs,
            batch_size=arguments.get("batch_size", 32),
        )
        found = cast(Comparison, hypermodel.comparison)
        single = {name: values.tolist() for name, values in found.single.items()}
        with whole_file(path) as file:
            file.write(json.dumps({"metrics": found.metrics, "single": single}).encode())


def _result(
    project: Path, hypermodel: Any, goal: Any, epochs: int, seed: int, batch_size: int
) -> TuningResult:
    """Reads the trials from the files of the search, which several processes may have written."""
    files = sorted(project.glob("trial_*/trial.json"), key=lambda path: int(path.parent.name[6:]))
    trials = [Trial.load(os.fspath(file)) for file in files]
    rows = tuple(_row(trial) for trial in trials if trial.status in ("COMPLETED", "FAILED"))
    if not rows:
        raise RuntimeError("This process ran no trial, and no other trial has ended yet.")
    if all(row.score is None for row in rows):
        errors = "\n".join(row.error or "" for row in rows[-1:])
        raise RuntimeError(f"All {len(rows)} trials failed. The last one:\n{errors}")
    done = [trial for trial in trials if trial.status == "COMPLETED"]
    sign = -1 if goal.direction == "max" else 1
    best = min(done, key=lambda trial: sign * trial.score)
    row = next(row for row in rows if row.name == best.trial_id)

    seed_trial(seed, best.trial_id)
    model = hypermodel.build(best.hyperparameters)
    model.optimizer.build(model.trainable_variables)  # its state is in the file
    model.load_weights(project / f"trial_{best.trial_id}" / CHECKPOINT)
    planned = best.hyperparameters.values.get("tuner/epochs", epochs)

    def refit(data: Any) -> keras.Model:
        seed_trial(seed, best.trial_id)
        model = hypermodel.build(best.hyperparameters)
        named: dict[str, Any] = {"clients": data}
        if not isinstance(hypermodel, FederatedHyperModel):
            data = readable(data, "data")
            named = {"x": data}
            if not is_batches(data):
                named = dict(zip(("x", "y", "sample_weight"), data, strict=False))
                named["batch_size"] = batch_size
        stop = _StopAfter(row.epochs)
        try:
            hypermodel.fit(
                best.hyperparameters, model, **named, epochs=planned, callbacks=[stop], verbose=0
            )
        finally:
            if isinstance(hypermodel, BuilderHyperModel):
                hypermodel.forget_features()
        return model

    logarithmic = frozenset(
        one.name for one in best.hyperparameters.space if getattr(one, "sampling", None) == "log"
    )
    return TuningResult(
        model, row.hyperparameters, goal.name, goal.direction, rows, logarithmic, refit
    )


def _row(trial: Trial) -> TrialResult:
    values = trial.hyperparameters.values
    shown = {name: value for name, value in values.items() if not name.startswith("tuner/")}
    if trial.status != "COMPLETED":
        return TrialResult(trial.trial_id, shown, None, 0, trial.message)
    epochs = values.get("tuner/initial_epoch", 0) + trial.best_step + 1
    return TrialResult(trial.trial_id, shown, trial.score, epochs)


class _StopAfter(keras.callbacks.Callback):
    """Stops after a number of epochs, whatever number the schedule is for."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self._epochs = epochs

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch + 1 >= self._epochs:
            self.model.stop_training = True
