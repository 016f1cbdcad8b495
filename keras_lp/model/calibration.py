"""`calibrate`: probabilities that are right on average.

Guo et al., 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from scipy import optimize, special

from keras_lp.model.outputs import collect
from keras_lp.model.thresholds import set_thresholds
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import Head, heads, tasks
from keras_lp.tasks.multi_label import MultiLabel
from keras_lp.utils.text_table import ShownAsText, text_table

BINS = 15
_LARGEST = 100.0  # factor of the logits, where all predictions are right


@dataclasses.dataclass(frozen=True)
class TaskCalibration:
    """How well the probabilities of a task were calibrated, and are now.

    Attributes:
        temperature: the number by which the logits were divided.
        loss_before: the cross-entropy before.
        loss: the cross-entropy now.
        error_before: the expected calibration error before.
        error: the expected calibration error now.
    """

    temperature: float
    loss_before: float
    loss: float
    error_before: float
    error: float


@dataclasses.dataclass(frozen=True, repr=False)
class Calibration(ShownAsText):
    """The output of `lp.calibrate`. Printing it shows a table.

    Attributes:
        tasks: `TaskCalibration` by the name of the task.
    """

    tasks: dict[str, TaskCalibration]

    def __str__(self) -> str:
        rows = [["task", "temperature", "cross-entropy", "calibrated", "error", "calibrated"]]
        for name, one in self.tasks.items():
            figures = one.loss_before, one.loss, one.error_before, one.error
            rows.append([name, f"{one.temperature:.3f}", *(f"{value:.4f}" for value in figures)])
        return f"{text_table(rows, left=1)}\nOn the data of the calibration."


def calibrate(model: keras.Model, validation_data: Any) -> Calibration:
    """Divides the logits of each task by a temperature, so that its probabilities are right.

    Networks are often too sure: of the predictions with a probability of 95 %, fewer than 95 % are
    right. The temperature with the lowest cross-entropy on validation data corrects this. It is
    written into the kernel and bias of the head, so `.keras` files, `lp.plain_model` and
    `lp.export_tflite` have it too. Predicted classes do not change. Thresholds of
    `lp.choose_thresholds` are moved, so that the labels above them stay the same.

    Use data that the model was not trained on. Training afterwards starts from the calibrated head,
    and undoes the calibration.

    Args:
        model: a model that keras_lp built, with a `Classification` or `MultiLabel` task. It need
            not be compiled.
        validation_data: `(x, y)` or `(x, y, sample_weight)` arrays, or a finite batched
            `tf.data.Dataset` or `PyDataset` of such tuples. Labels are as in `fit`; missing labels
            do not count, others count by their weight.

    Returns:
        `Calibration`: print it. `tasks` has the temperature, the cross-entropy and the expected
        calibration error (15 bins of the probability of the predicted class) of each task that has
        labels in the data.

    Raises:
        ValueError: if the model has no such task, the data have none of its labels, `fit` would
            reject the labels or inputs, outputs are NaN, or a weight is below 0.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> x = np.array([[3.0], [3.0], [3.0], [-3.0], [-3.0], [-3.0]])
    >>> y = np.array([1, 1, 0, 0, 0, 1])
    >>> backbone = keras.Sequential([keras.Input((1,)), keras.layers.Identity()])
    >>> model = lp.transfer_model(backbone, 2)
    >>> model.layers[-1].set_raw_weights(np.array([[-1.0, 1.0]]), np.zeros(2))
    >>> found = lp.calibrate(model, (x, y))
    >>> round(found.tasks["predictions"].temperature, 2)  # 6 / log(2)
    8.66
    >>> odds = np.exp(model.predict(x[:1], verbose=0))
    >>> (odds / odds.sum()).round(3)  # two of three are right
    array([[0.333, 0.667]], dtype=float32)

    Reference: Guo et al., 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599).
    """
    known = {
        name: head
        for name, head in heads(model).items()
        if isinstance(head.task, (Classification, MultiLabel))
    }
    if not known:
        raise ValueError(
            "calibrate needs a model with an lp.Classification or lp.MultiLabel task. Received: "
            f"model {model.name!r} with the tasks {tasks(model)}."
        )
    found = {}
    for name, (logits, target, right, weight) in collect(
        model, known, validation_data, _piece
    ).items():
        if not weight.sum() > 0:
            continue
        temperature = best_temperature(logits, target, weight)
        found[name] = TaskCalibration(
            temperature,
            *(cross_entropy(logits, target, weight, t) for t in (1.0, temperature)),
            *(calibration_error(logits / t, right, weight) for t in (1.0, temperature)),
        )
        _scale(model, known[name], temperature)
    if not found:
        raise ValueError(
            f"Temperatures of the tasks {list(known)} are chosen on their labels. Received: "
            "validation_data without a label of theirs with a weight above 0."
        )
    return Calibration(found)


def best_temperature(logits: np.ndarray, target: np.ndarray, weight: np.ndarray) -> float:
    """Returns the temperature with the lowest cross-entropy, at least 0.01 and at most 10,000.

    Args:
        logits: `(n, classes)`.
        target: the logit of the label, `(n,)`; for a distribution of labels, the mean logit.
        weight: `(n,)`.
    """
    # The cross-entropy is convex in the factor of the logits.
    best = optimize.minimize_scalar(
        lambda factor: cross_entropy(logits, target, weight, 1 / factor),
        bounds=(1 / _LARGEST**2, _LARGEST),
        method="bounded",
        options={"xatol": 1e-7},
    )
    return float(1 / best.x)


def cross_entropy(
    logits: np.ndarray, target: np.ndarray, weight: np.ndarray, temperature: float
) -> float:
    """Returns the mean cross-entropy of logits that are divided by a temperature."""
    losses = special.logsumexp(logits / temperature, axis=1) - target / temperature
    return float(losses @ weight / weight.sum())


def calibration_error(logits: np.ndarray, right: np.ndarray, weight: np.ndarray) -> float:
    """Returns the expected calibration error.

    Args:
        logits: `(n, classes)`.
        right: 1 where the most probable class is that of the label, else 0, `(n,)`.
        weight: `(n,)`.
    """
    confidence = special.softmax(logits, axis=1).max(1)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weight * (right - confidence), BINS)
    return float(np.abs(gaps).sum() / weight.sum())


def _piece(head: Head, y: Any, logits: Any, weight: Any) -> tuple[np.ndarray, ...]:
    """Returns logits `(n, classes)`, and target, right and weight `(n,)`."""
    if isinstance(head.task, MultiLabel):  # each label is a choice between the logits 0 and z
        z, y, weight = (part.reshape(-1) for part in (logits, y, weight))
        return np.stack([np.zeros_like(z), z], 1), y * z, ((z > 0) == (y > 0.5)) * 1.0, weight
    logits, weight = logits.reshape(-1, head.task.units), weight.reshape(-1)
    if y.size == logits.size:  # distributions over the classes
        y = y.reshape(logits.shape)
        label, target = y.argmax(1), (y * logits).sum(1)
    else:
        label = y.reshape(-1).astype(int)
        target = logits[np.arange(len(label)), label]
    return logits, target, (logits.argmax(1) == label) * 1.0, weight


def _scale(model: keras.Model, head: Head, temperature: float) -> None:
    """Divides the logits of a head by a temperature."""
    head.kernel.assign(head.kernel / temperature)
    head.bias.assign(head.bias / temperature)
    task = head.task
    if isinstance(task, MultiLabel) and task.thresholds is not None:
        moved = special.expit(special.logit(np.asarray(task.label_thresholds)) / temperature)
        set_thresholds(model, {head.name: moved})
