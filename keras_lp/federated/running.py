"""Validation and printed lines of `fit`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.model import checks
from keras_lp.model.absent import unknown
from keras_lp.model.linear_heads import can_be_solved
from keras_lp.utils.arguments import check_positive
from keras_lp.utils.interop import plain

_COLUMNS = 100  # of the line of a round
_LAST = ("dropped", "clients", "update_norm", "bytes_up", "bytes_down")  # where there is room


def validation(
    model: keras.Model, data: Any, freq: int | Sequence[int]
) -> Callable[[int], tuple[dict[str, float], set[str]]]:
    """Checks the validation data and returns a function that evaluates the model on them.

    Args:
        model: the model.
        data: arrays, a batched `tf.data.Dataset`, or None.
        freq: number of rounds between evaluations, or a list of rounds, starting from 1.

    Returns:
        A function from the round number to `(logs, unknown)`: the results, and the names of
        results without labels.
    """
    if not isinstance(freq, Sequence):
        check_positive("validation_freq", freq, integer=True)
    if data is None:
        return lambda _: ({}, set())
    data = plain(data)
    if isinstance(data, tf.data.Dataset):
        arguments = {"x": checks.checked_dataset(model, data)}
    else:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        checks.check_examples(model, x, y, " of validation_data")
        checks.check_weights(sample_weight, " of validation_data")
        arguments = {"x": x, "y": y, "sample_weight": sample_weight}

    def validate(round_number: int) -> tuple[dict[str, float], set[str]]:
        due = round_number in freq if isinstance(freq, Sequence) else round_number % freq == 0
        if not due:
            return {}, set()
        results = model.evaluate(**arguments, verbose=0, return_dict=True)
        logs = {f"val_{name}": value for name, value in results.items()}
        return logs, unknown(model, results, "val_")

    return validate


def print_restarts(model: keras.Model) -> None:
    """Prints a hint that an adaptive optimizer loses its state in each round."""
    if isinstance(model.optimizer, keras.optimizers.SGD):
        return
    line = f"{type(model.optimizer).__name__} restarts on each client in each round and may learn "
    if can_be_solved(model):
        line += 'slowly. Build the model with optimizer="sgd", or solve its heads with `fit_head`.'
    else:
        line += 'slowly. SGD is often better (optimizer="sgd", learning_rate=0.1).'
    print(line, flush=True)


def print_round(
    number: int, rounds: int | None, logs: Mapping[str, Any], tasks: Collection[str] = ()
) -> None:
    """Prints the line of a round, of 100 columns at most.

    What does not fit is left out, the least important first: the history has all.

    Args:
        number: the round, from 1.
        rounds: how many there are, None where that is not known.
        logs: of the round.
        tasks: the names of several tasks. Their figures are grouped by metric, those of validation
            where there are any: `"val_accuracy: topic 0.8210, intent 0.7032"`, or from the least
            to the largest where the names are too long; their losses are left out. Defaults to
            none.
    """
    place = f"{number}" if rounds is None else f"{number}/{rounds}"
    line = f"Round {place} - {logs['seconds']:.1f}s"
    for forms in _items(logs, tasks if len(tasks) > 1 else ()):
        fitting = [form for form in forms if len(line) + len(" - ") + len(form) <= _COLUMNS]
        line += f" - {fitting[0]}" if fitting else ""
    print(line, flush=True)


def _items(logs: Mapping[str, Any], tasks: Collection[str]) -> Iterator[list[str]]:
    """Yields what a line may show, the most important first, each in its longest form first."""
    figures = {name: value for name, value in logs.items() if np.ndim(value) == 0}
    last = {name: figures.pop(name) for name in _LAST if name in figures}
    del figures["seconds"]
    if last.get("dropped"):
        yield [f"dropped: {last['dropped']}"]
    last.pop("dropped", None)
    grouped: dict[str, dict[str, Any]] = {}
    for name in list(figures):
        prefix = "val_" if name.startswith("val_") else ""
        owners = [t for t in tasks if name.startswith(f"{prefix}{t}_")]
        if owners:
            task = max(owners, key=len)
            metric = name.removeprefix(f"{prefix}{task}_")
            grouped.setdefault(f"{prefix}{metric}", {})[task] = figures.pop(name)
    metrics = dict.fromkeys(name.removeprefix("val_") for name in ("loss", *figures))
    pairs = [name for metric in metrics for name in (metric, f"val_{metric}") if name in figures]
    validated = any(name.startswith("val_") for name in grouped)
    if validated:
        pairs.sort(key=lambda name: name != "val_loss")
    single = [[f"{name}: {_figure(figures[name])}"] for name in pairs]
    yield from single[:1]
    for metric, by_task in grouped.items():
        if metric.startswith("val_") == validated and metric not in ("loss", "val_loss"):
            yield _forms(metric, by_task)
    yield from single[1:]
    yield from ([f"{name}: {_figure(value)}"] for name, value in last.items())


def _forms(metric: str, by_task: Mapping[str, float]) -> list[str]:
    """The figures of tasks in words, by task and as a range."""
    if len(by_task) == 1:
        ((task, value),) = by_task.items()
        prefix = "val_" if metric.startswith("val_") else ""
        return [f"{prefix}{task}_{metric.removeprefix(prefix)}: {_figure(value)}"]
    each = ", ".join(f"{task} {_figure(value)}" for task, value in by_task.items())
    known = [value for value in by_task.values() if not np.isnan(value)] or [np.nan]
    between = f"{_figure(min(known))} to {_figure(max(known))}"
    return [f"{metric}: {each}", f"{metric}: {between} ({len(by_task)} tasks)"]


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, (int, np.integer)) else f"{value}"
