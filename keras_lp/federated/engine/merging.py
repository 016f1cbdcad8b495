"""Merges the metric states of several clients."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.federated.clients.arrays import Arrays, count_examples
from keras_lp.tasks.heads import tasks

_ROWS = 8  # examples per trial
_TRIALS = 3


class Merging:
    """Merges the metric states of several clients to the state over all their examples.

    Most states are sums; some are a maximum or minimum.

    Args:
        ways: `"sum"`, `"max"` or `"min"` for each variable of the metrics.
        start: the initial values of the variables.

    Attributes:
        ways: as given.
    """

    def __init__(self, ways: Sequence[str], start: Sequence[np.ndarray]) -> None:
        self.ways, self._start = list(ways), list(start)

    def start(self) -> tuple[tf.Tensor, ...]:
        """Returns the initial states."""
        return tuple(tf.constant(value) for value in self._start)

    def part(self, states: Sequence[tf.Tensor], place: tf.Tensor) -> Any:
        """Returns the contribution of a client to the sum over clients.

        Args:
            states: the states of the client.
            place: `(clients,)`, True at the position of the client. All False adds nothing.
        """
        added, own = [], tf.reduce_any(place)
        for way, value, start in zip(self.ways, states, self._start, strict=True):
            if way == "sum":
                added.append(tf.where(own, value - start, tf.zeros_like(value)))
            else:
                row = tf.reshape(place, [-1, *[1] * len(start.shape)])
                added.append(tf.where(row, value[None], tf.zeros_like(value)[None]))
        return collections.OrderedDict(states=tuple(added), place=tf.cast(place, tf.int32))

    def nothing(self, count: int) -> Any:
        """Returns the sum over no clients, for a round with `count` clients."""
        return self.part(self.start(), tf.zeros([count], tf.bool))

    def whole(self, parts: Sequence[Any]) -> list[np.ndarray]:
        """Returns the states over all examples from several sums over clients."""
        here = np.concatenate([np.asarray(part["place"]) for part in parts]) > 0
        merged = []
        for i, (way, start) in enumerate(zip(self.ways, self._start, strict=True)):
            values = [np.asarray(part["states"][i]) for part in parts]
            if way == "sum":
                merged.append(start + np.sum(values, axis=0, dtype=start.dtype))
            else:
                rows = np.concatenate([start[None], np.concatenate(values)[here]])
                merged.append(rows.max(0) if way == "max" else rows.min(0))
        return merged


def find_merging(model: keras.Model, data: Arrays) -> Merging:
    """Finds out how to merge the metrics of a model by trials on generated predictions.

    Args:
        model: a compiled model whose metrics are built.
        data: the data of a client, for the form of the labels.

    Raises:
        ValueError: the state of a metric is not a sum, maximum or minimum.
    """
    model.reset_metrics()
    variables = model.metrics_variables
    start = [np.asarray(variable) for variable in variables]
    trials = [_trial(model, data, start, seed) for seed in range(_TRIALS)]
    ways = []
    for i, variable in enumerate(variables):
        states = [[state[i] for state in trial] for trial in trials]
        way = next((way for way, fits in _WAYS.items() if fits(start[i], states)), None)
        if way is None:
            raise ValueError(
                "The states of metrics must be sums over examples, maxima or minima, so that "
                "clients can be merged. Received: the metric "
                f"{_owner(model, variable)!r}, whose variable {variable.name!r} is none of them. "
                "Store its state as sums (like keras.metrics.Mean) and divide in `result`, or "
                "leave it out and evaluate with `model.evaluate`."
            )
        ways.append(way)
    return Merging(ways, start)


def _is_sum(start: np.ndarray, states: Any) -> bool:
    return all(_close(both - start, (a - start) + (b - start)) for a, b, both in states)


_WAYS = {
    "sum": lambda start, states: start.dtype != bool and _is_sum(start, states),
    "max": lambda _, states: all(_close(both, np.maximum(a, b)) for a, b, both in states),
    "min": lambda _, states: all(_close(both, np.minimum(a, b)) for a, b, both in states),
}


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def _trial(
    model: keras.Model, data: Arrays, start: Sequence[np.ndarray], seed: int
) -> list[list[np.ndarray]]:
    """Returns the states after a first part of examples, a second part, and both parts."""
    rng = np.random.default_rng(seed)
    rows = np.resize(np.arange(min(count_examples(data), _ROWS)), _ROWS)
    x, y = (tf.nest.map_structure(lambda array: array[rows], part) for part in data[:2])
    known = sorted(tasks(model).items())
    if known:
        labels = zip((task for _, task in known), tf.nest.flatten(y), strict=True)
        y = tf.nest.pack_sequence_as(y, [_present(*one) for one in labels])

    def vary(output: Any) -> tf.Tensor:
        # Between 0 and 1 if the outputs are, as for probabilities.
        value, (a, b) = np.asarray(output, "float32"), rng.random((2, *output.shape))
        return tf.constant(0.9 * value * a + 0.1 * b, output.dtype)

    y_pred = keras.tree.map_structure(vary, model(x, training=False))

    def states(chosen: Sequence[slice]) -> list[np.ndarray]:
        mapping = list(zip(model.metrics_variables, map(tf.constant, start), strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            for part in chosen:
                batch = tf.nest.map_structure(lambda leaf, part=part: leaf[part], (x, y, y_pred))
                model.compute_metrics(*batch)
            return [np.asarray(scope.get_current_value(v)) for v in model.metrics_variables]

    half = _ROWS // 2
    first, second = slice(half), slice(half, None)
    return [states([first]), states([second]), states([first, second])]


def _present(task: Any, y: np.ndarray) -> np.ndarray:
    """Replaces missing labels by 0."""
    missing = np.isnan(y) if np.isnan(task.missing) else ~(y >= 0)
    return np.where(missing, np.zeros_like(y), y)


def _owner(model: keras.Model, variable: Any) -> str:
    """Returns the name of the innermost metric that holds a variable."""
    found = [m for m in _all_metrics(model.metrics) if any(v is variable for v in m.variables)]
    return found[-1].name if found else variable.path


def _all_metrics(metrics: Sequence[Any]) -> list[Any]:
    inner = [getattr(metric, "metrics", None) or [] for metric in metrics]
    return [*metrics, *(one for part in inner for one in _all_metrics(part))]
