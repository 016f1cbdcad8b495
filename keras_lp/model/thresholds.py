"""`choose_thresholds`: the decision threshold of each label, chosen on validation data.

One pass over the sorted probabilities finds the largest F1 over all thresholds of a label exactly
(Lipton et al., 2014, Thresholding Classifiers to Maximize F1 Score, arXiv:1402.1892).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import keras
import numpy as np

from keras_lp.model.compiled import metrics_of, trace_again
from keras_lp.model.outputs import collect
from keras_lp.tasks.heads import Head, heads, tasks
from keras_lp.tasks.metrics import MacroF1
from keras_lp.tasks.multi_label import MultiLabel

_DEFAULT = 0.5


def choose_thresholds(
    model: keras.Model, validation_data: Any
) -> np.ndarray | dict[str, np.ndarray]:
    """Chooses, for each label, the threshold with the largest F1 on validation data.

    A label is predicted if its probability is above its threshold. The thresholds are stored in
    the tasks of the model: from now on `evaluate` and `fit` compute `f1` with them,
    `lp.decode_predictions(..., top=None)` returns the labels above them, and they are part of
    `.keras` files, of clones and of the metadata of `lp.export_tflite`. Weights, optimizer and loss
    do not change.

    A threshold is midway between two neighbouring probabilities of the label in the data. Among
    thresholds with the same F1, the one nearest to 0.5 is chosen. A label without a positive
    example gets 0.5.

    The thresholds fit the data on which they are chosen. If a label has few positives they
    overfit: F1 on the same data is too high, and for a label that the model cannot discriminate
    the best threshold predicts it for every example (Lipton et al.). Choose on data that the model
    was not trained on, and evaluate on other data. Train first: thresholds do not follow later
    changes of the weights. In a federation, choose between two calls of `fit`.

    Args:
        model: a model that keras_lp built, with one or more `lp.MultiLabel` tasks. It need not be
            compiled.
        validation_data: `(x, y)` or `(x, y, sample_weight)` arrays, or a finite batched
            `tf.data.Dataset` or `PyDataset` of such tuples. Labels are as in `fit`; entries of -1
            do not count, others count by their weight.

    Returns:
        The thresholds, `(labels,)` probabilities between 0 and 1. For a model whose outputs are a
        dict (`lp.multitask_model`), a dict of these by task. A task without labels in the data
        keeps its thresholds and is not in the dict.

    Raises:
        ValueError: if the model has no `MultiLabel` task, the data have none of its labels, `fit`
            would reject the labels or inputs, outputs are NaN, or a weight is below 0.
        TypeError: if the data have another type, or labels are not numbers.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> x = np.array([[-4], [-3], [-2], [0], [1]], "float32")
    >>> y = np.array([[0, 0], [0, -1], [1, 0], [1, 0], [1, 0]])
    >>> backbone = keras.Sequential([keras.Input((1,)), keras.layers.Identity()])
    >>> model = lp.transfer_model(backbone, lp.MultiLabel(["rain", "snow"]))
    >>> model.layers[-1].set_raw_weights(np.ones((1, 2)), np.zeros(2))
    >>> lp.choose_thresholds(model, (x, y)).round(3)  # between sigmoid(-3) and sigmoid(-2)
    array([0.083, 0.5  ])
    >>> model.evaluate(x, y, verbose=0, return_dict=True)["f1"]
    1.0

    Reference: Lipton et al., 2014, Thresholding Classifiers to Maximize F1 Score
    (arXiv:1402.1892).
    """
    known = {name: head for name, head in heads(model).items() if _is_multi_label(head)}
    if not known:
        raise ValueError(
            "choose_thresholds needs a model with an lp.MultiLabel task. Received: model "
            f"{model.name!r} with the tasks {tasks(model)}. The most probable class of a "
            "Classification needs no threshold."
        )
    found = {
        name: _best_thresholds(*columns)
        for name, columns in collect(model, known, validation_data, _piece).items()
        if np.any(columns[1:])
    }
    if not found:
        raise ValueError(
            f"Thresholds of the tasks {list(known)} are chosen on their labels. Received: "
            "validation_data without a label of theirs with a weight above 0."
        )
    set_thresholds(model, found)
    return found if isinstance(model.output, Mapping) else next(iter(found.values()))


def set_thresholds(model: keras.Model, thresholds: Mapping[str, Any]) -> None:
    """Sets thresholds by task name, in the heads and in the metrics of a compiled model."""
    known = heads(model)
    for name, values in thresholds.items():
        task = cast(MultiLabel, known[name].task)
        known[name].task = dataclasses.replace(task, thresholds=values)
    if not getattr(model, "compiled", False):
        return
    changed = False
    for name in thresholds:
        for metric in metrics_of(model, name):
            if isinstance(metric, MacroF1) and metric.name == "f1":
                metric.thresholds = cast(MultiLabel, known[name].task).label_thresholds
                changed = True
    if changed:
        trace_again(model)


def best_threshold(
    probabilities: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> float:
    """Returns the threshold of one label with the largest F1.

    Args:
        probabilities: probabilities of the label, `(n,)`.
        positives: weight of each example as one with the label, `(n,)`, 0 or more.
        negatives: weight of each example as one without the label, `(n,)`, 0 or more.
    """
    counts = positives + negatives > 0
    total = positives.sum()
    if not total > 0:
        return _DEFAULT
    values, places = np.unique(probabilities[counts], return_inverse=True)
    # Cumulative from the most probable on: predictions of a threshold just below each value.
    found, wrong = (
        np.cumsum(np.bincount(places, part[counts], len(values))[::-1])[::-1]
        for part in (positives, negatives)
    )
    f1 = 2 * found / (total + found + wrong)
    thresholds = (np.concatenate([[0], values[:-1]]) + values) / 2
    f1[thresholds == 0] = 0  # a probability of 0 is not above any threshold
    best = thresholds[f1 >= f1.max() * (1 - 1e-12)] if f1.max() > 0 else np.array([_DEFAULT])
    return float(best[np.argmin(np.abs(best - _DEFAULT))])


def _best_thresholds(
    logits: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> np.ndarray:
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-logits))
    # float32 like the outputs, also on a phone: a threshold between two values that round to the
    # same float32 would separate them only here.
    probabilities = exact.astype("float32").astype("float64")
    columns = zip(probabilities.T, positives.T, negatives.T, strict=True)
    return np.array([best_threshold(*column) for column in columns])


def _piece(head: Head, y: Any, logits: Any, weight: Any) -> tuple[np.ndarray, ...]:
    """Returns logits and the weights of positives and negatives, `(n, labels)` each."""
    y, logits, weight = (part.reshape(-1, head.task.units) for part in (y, logits, weight))
    return logits, weight * y, weight * (1 - y)


def _is_multi_label(head: Head) -> bool:
    return isinstance(head.task, MultiLabel)
