"""Tasks: what one head predicts, with its loss, its metrics and its missing labels.

A task is a small immutable object; the head layer of a model carries it in its config.
"""

from __future__ import annotations

import abc
import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

Classes = int | Sequence[str]

# The metric that is a task's loss over all labels of an epoch. `keras_lp.Model` reports it as the
# loss of the task: Keras itself averages batches by their size, not by their labels.
TASK_LOSS = "task_loss"
_REDUCTION = "mean_with_sample_weight"


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Base class of `Classification`, `MultiLabel` and `Regression`."""

    activation: ClassVar[str] = "linear"  # what an export adds to the head's output
    missing: ClassVar[float] = -1  # the value of a label that is not known

    @property
    @abc.abstractmethod
    def units(self) -> int:
        """Number of outputs of the head."""

    @abc.abstractmethod
    def loss(self) -> keras.losses.Loss:
        """Returns the loss on the head's raw output, averaged over the labels present."""

    @abc.abstractmethod
    def metrics(self) -> list[keras.metrics.Metric]:
        """Returns new metrics, to be compiled as `weighted_metrics`."""

    @abc.abstractmethod
    def mask_missing(self, y: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        """Replaces missing labels by a valid value of weight 0.

        Args:
            y: labels, or None where the whole batch lacks this task.
            y_pred: the head's output, `(batch, ..., units)`.
            sample_weight: weights, `(batch,)` or one a label. Defaults to 1.

        Returns:
            `(y, y_pred, weight)`, shaped for the loss and the metrics of this task.
        """

    def is_present(self, y: Any) -> Any:
        """Returns a boolean tensor, False where a label is missing."""
        return ops.not_equal(y, ops.cast(self.missing, y.dtype))

    def check_labels(self, y: np.ndarray, name: str = "y") -> None:
        """Raises if an array of labels holds something that this task cannot learn from.

        Args:
            y: labels of any number of examples.
            name: how the error calls the labels.

        Raises:
            ValueError: a label outside the classes, or not finite.
            TypeError: labels that are not numbers.
        """
        if not np.issubdtype(y.dtype, np.number) and y.dtype != bool:
            raise TypeError(
                f"Labels of {type(self).__name__} must be numbers. Received: {name} of dtype "
                f"{y.dtype}. Map each name to its index in `class_names` first."
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Task:
        """Makes the task again from `get_config()`."""
        return cls(**config)


TaskLike = Task | int | Sequence[str]


@dataclasses.dataclass(frozen=True)
class ClassTask(Task):
    """Base class of the tasks whose outputs are classes."""

    classes: Classes

    _least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        kind = type(self).__name__
        classes = self.classes
        if isinstance(classes, numbers.Integral) and not isinstance(classes, bool):
            object.__setattr__(self, "classes", int(classes))
            number = self.classes
        elif isinstance(classes, Sequence) and not isinstance(classes, (str, bytes)):
            if not all(isinstance(name, str) for name in classes):
                raise TypeError(
                    f"The class names of {kind} must be strings. Received: classes={classes!r}."
                )
            if len(set(classes)) != len(classes):
                raise ValueError(
                    f"The class names of {kind} must differ. Received: classes={list(classes)}."
                )
            object.__setattr__(self, "classes", tuple(classes))
            number = len(classes)
        else:
            raise TypeError(
                f"{kind} takes the number of classes or their names. Received: "
                f"classes={classes!r} of type {type(classes).__name__}. Pass for example "
                f'{kind}(10) or {kind}(["cat", "dog"]).'
            )
        if number < self._least:
            raise ValueError(
                f"{kind} needs at least {self._least} classes. Received: classes={classes!r}."
            )

    @property
    def units(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names given, else "0", "1", ..."""
        if isinstance(self.classes, int):
            return tuple(str(i) for i in range(self.classes))
        return self.classes

    def get_config(self) -> dict[str, Any]:
        return {"classes": self.classes if isinstance(self.classes, int) else list(self.classes)}


@keras.saving.register_keras_serializable("keras_lp")
@dataclasses.dataclass(frozen=True)
class Classification(ClassTask):
    """One class of several: the head gives logits, exports add the softmax.

    Labels are class numbers, `(batch,)` integers from 0 to `classes - 1`; -1 is a missing label.
    The loss is the crossentropy, the metric is `accuracy`.

    Args:
        classes: number of classes (2 or more), or their names in the order of the numbers.

    Raises:
        ValueError: fewer than two classes, or a name twice.
        TypeError: neither a number nor names.

    Example:

    >>> import keras_lp as lp
    >>> lp.Classification(["normal", "pneumonia"]).class_names
    ('normal', 'pneumonia')
    """

    activation: ClassVar[str] = "softmax"
    _least: ClassVar[int] = 2

    def loss(self) -> keras.losses.Loss:
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=_REDUCTION)

    def metrics(self) -> list[keras.metrics.Metric]:
        return [
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseCategoricalCrossentropy(name=TASK_LOSS, from_logits=True),
        ]

    def mask_missing(self, y: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        y = _labels(self, y, y_pred.shape[:-1], ops.shape(y_pred)[:-1])
        y = ops.cast(y, "int32")
        present = self.is_present(y)
        return ops.where(present, y, 0), y_pred, _weight(present, sample_weight)

    def check_labels(self, y: np.ndarray, name: str = "y") -> None:
        super().check_labels(y, name)
        wrong = ~np.isin(y, np.arange(-1, self.units))
        if wrong.any():
            raise ValueError(
                f"Labels must be class numbers from 0 to {self.units - 1}, or -1 where the label "
                f"is missing. Received: {name} with the label {y[wrong].flat[0]!s} "
                f"({wrong.sum()} of {y.size} labels are outside). Renumber the labels or build "
                "the model with more classes."
            )


@keras.saving.register_keras_serializable("keras_lp")
@dataclasses.dataclass(frozen=True)
class MultiLabel(ClassTask):
    """Any number of labels at once: the head gives logits, exports add the sigmoid.

    Labels are `(batch, classes)` of 0 and 1; an entry of -1 is missing, entry by entry. The loss
    is the binary crossentropy, the metric is the `accuracy` of single entries.

    Args:
        classes: number of labels, or their names in order.

    Raises:
        ValueError: no label, or a name twice.
        TypeError: neither a number nor names.

    Example:

    >>> import keras_lp as lp
    >>> lp.MultiLabel(["sun", "rain", "snow"]).units
    3
    """

    activation: ClassVar[str] = "sigmoid"

    def loss(self) -> keras.losses.Loss:
        return keras.losses.BinaryCrossentropy(from_logits=True, reduction=_REDUCTION)

    def metrics(self) -> list[keras.metrics.Metric]:
        return [
            keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0),
            keras.metrics.BinaryCrossentropy(name=TASK_LOSS, from_logits=True),
        ]

    def mask_missing(self, y: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        return _mask_entries(self, y, y_pred, sample_weight)

    def check_labels(self, y: np.ndarray, name: str = "y") -> None:
        super().check_labels(y, name)
        if y.ndim < 2 or y.shape[-1] != self.units:
            raise ValueError(
                f"Labels of MultiLabel have one entry a class, shape (examples, {self.units}). "
                f"Received: {name} of shape {y.shape}."
            )
        wrong = ~((y == -1) | ((y >= 0) & (y <= 1)))
        if wrong.any():
            raise ValueError(
                "Labels of MultiLabel must be 0 or 1, or -1 where the label is missing. "
                f"Received: {name} with the value {y[wrong].flat[0]!s}."
            )


@keras.saving.register_keras_serializable("keras_lp")
@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """Numbers: the head gives them as they are.

    Labels are `(batch,)` or `(batch, units)` floats; NaN is a missing label, entry by entry. The
    loss is the squared error, the metric is `mae`, the mean absolute error.

    Args:
        units: how many numbers the head predicts. Defaults to 1.

    Raises:
        ValueError: `units` below 1.

    Example:

    >>> import keras_lp as lp
    >>> lp.Regression(units=2).units
    2
    """

    missing: ClassVar[float] = float("nan")

    # The property of the base class is a field here.
    units: int = 1  # type: ignore[assignment]

    def __post_init__(self) -> None:
        whole = isinstance(self.units, numbers.Integral) and not isinstance(self.units, bool)
        if not whole or self.units < 1:
            raise ValueError(
                f"Regression needs `units` of 1 or more. Received: units={self.units!r}."
            )

    def loss(self) -> keras.losses.Loss:
        return keras.losses.MeanSquaredError(reduction=_REDUCTION)

    def metrics(self) -> list[keras.metrics.Metric]:
        return [
            keras.metrics.MeanAbsoluteError(name="mae"),
            keras.metrics.MeanSquaredError(name=TASK_LOSS),
        ]

    def mask_missing(self, y: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        return _mask_entries(self, y, y_pred, sample_weight)

    def is_present(self, y: Any) -> Any:
        return ops.logical_not(ops.isnan(y))

    def check_labels(self, y: np.ndarray, name: str = "y") -> None:
        super().check_labels(y, name)
        if np.isinf(y).any():
            raise ValueError(
                f"Labels of Regression must be finite, or NaN where the label is missing. "
                f"Received: {name} with {np.isinf(y).sum()} infinite values."
            )


def as_task(task: Any) -> Task:
    """Returns the task itself; an int or a list of names is short for `Classification`."""
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping) or task is None:
        raise TypeError(
            "A task must be lp.Classification, lp.MultiLabel, lp.Regression, a number of classes "
            f"or a list of class names. Received: task={task!r}. Several tasks in one model: "
            "lp.multitask_model."
        )
    return Classification(task)


def _mask_entries(task: Task, y: Any, y_pred: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """Masks single entries of `(batch, ..., units)` labels.

    Losses and metrics average the last axis before they weigh, so each entry gets an axis of its
    own: labels and outputs come back as `(batch, ..., units, 1)`.
    """
    y = _labels(task, y, y_pred.shape, ops.shape(y_pred))
    y = ops.cast(y, y_pred.dtype)
    present = task.is_present(y)
    y = ops.where(present, y, ops.zeros_like(y))
    return y[..., None], y_pred[..., None], _weight(present, sample_weight)


def _labels(task: Task, y: Any, expected: Any, shape: Any) -> Any:
    """Returns labels in the shape of the outputs; a last axis of 1 may be there or not."""
    if y is None:
        return ops.full(shape, task.missing)
    y = ops.convert_to_tensor(y)
    if keras.backend.standardize_dtype(y.dtype) == "string":
        raise TypeError(
            f"Labels of {type(task).__name__} must be numbers. Received: strings. Map each name "
            "to its index in `class_names` first."
        )
    given, wanted = list(y.shape), list(expected)
    fits = [given, [*given, 1], given[:-1] if given[-1:] == [1] else given]
    if not any(_compatible(one, wanted) for one in fits):
        one_hot = isinstance(task, Classification) and len(given) == len(wanted) + 1
        raise ValueError(
            f"Labels of {type(task).__name__} must have the shape {tuple(wanted)} here. Received: "
            f"labels of shape {tuple(given)}."
            + (
                " Classes are numbers: turn one-hot labels into them with "
                "`np.argmax(y, axis=-1)`, or use `lp.MultiLabel` where an example has several."
                if one_hot
                else ""
            )
        )
    return ops.reshape(y, shape)


def _compatible(given: list[int | None], wanted: list[int | None]) -> bool:
    return len(given) == len(wanted) and all(
        a is None or b is None or a == b for a, b in zip(given, wanted, strict=True)
    )


def _weight(present: Any, sample_weight: Any) -> Any:
    weight = ops.cast(present, "float32")
    if sample_weight is None:
        return weight
    sample_weight = ops.cast(sample_weight, "float32")
    if len(sample_weight.shape) > len(weight.shape):
        sample_weight = ops.squeeze(sample_weight, -1)
    while len(sample_weight.shape) < len(weight.shape):
        sample_weight = sample_weight[..., None]
    return weight * sample_weight
