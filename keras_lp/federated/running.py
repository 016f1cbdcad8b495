"""Validation and printed lines of `fit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.model import checks
from keras_lp.model.absent import unknown
from keras_lp.model.linear_heads import can_be_solved
from keras_lp.utils.arguments import check_positive


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


def print_round(number: int, rounds: int | None, logs: Mapping[str, Any]) -> None:
    """Prints the line of a round, of so many where that is known."""
    shown = [
        f"{name}: {_figure(value)}"
        for name, value in logs.items()
        if name != "seconds" and (name != "dropped" or value)
    ]
    place = f"{number}" if rounds is None else f"{number}/{rounds}"
    print(f"Round {place} - {logs['seconds']:.1f}s - {' - '.join(shown)}", flush=True)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, (int, np.integer)) else f"{value}"
