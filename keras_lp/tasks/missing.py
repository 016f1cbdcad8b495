"""Missing labels: replaced by a valid value of weight 0, before a loss or a metric sees them."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf
from keras import ops


def is_present(task: Any, y: Any) -> Any:
    """Returns a boolean tensor, False where a label is missing: NaN, and -1 of classes."""
    if math.isnan(task.missing):
        return ops.logical_not(ops.isnan(y))
    return ops.greater_equal(y, ops.zeros_like(y))


def is_soft(y: Any, y_pred: Any) -> bool:
    """Whether labels of a `Classification` are distributions over the classes, as outputs are."""
    shape = tuple(y.shape)
    return len(shape) == len(y_pred.shape) and shape[-1] == y_pred.shape[-1]


def mask_labels(task: Any, y: Any, y_pred: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """Masks whole labels of `(batch, ..., units)` outputs.

    Class numbers, or names, come back as `(batch, ...)` numbers; distributions as they are.
    """
    if y is not None:
        y = name_numbers(task, ops.convert_to_tensor(y))
        if y.shape.rank is None:
            y = _distributions(y, y_pred)
        if is_soft(y, y_pred):
            y = ops.cast(y, "float32")
            present = ops.all(is_present(task, y), axis=-1)
            y = ops.where(present[..., None], y, 1 / task.units)
            return y, y_pred, _weight(present, sample_weight)
    y = _labels(task, y, y_pred.shape[:-1], ops.shape(y_pred)[:-1])
    y = ops.cast(y, "int32")
    present = is_present(task, y)
    return ops.where(present, y, 0), y_pred, _weight(present, sample_weight)


def mask_entries(task: Any, y: Any, y_pred: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """Masks single entries of `(batch, ..., units)` labels.

    Losses and metrics average the last axis before they weigh, so each entry gets an axis of its
    own: labels and outputs come back as `(batch, ..., units, 1)`.
    """
    y = _labels(task, y, y_pred.shape, ops.shape(y_pred))
    y = ops.cast(y, y_pred.dtype)
    present = is_present(task, y)
    y = ops.where(present, y, ops.zeros_like(y))
    return y[..., None], y_pred[..., None], _weight(present, sample_weight)


def _distributions(y: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """Returns distributions for labels of either form.

    Keras traces a step for labels of any rank once a model was trained with both forms.
    """
    shape = tf.shape(y_pred)

    def of_numbers() -> tf.Tensor:
        numbers = tf.cast(tf.reshape(y, shape[:-1]), tf.int32)
        return tf.where(numbers[..., None] < 0, -1.0, tf.one_hot(numbers, y_pred.shape[-1]))

    soft = tf.equal(tf.rank(y), tf.rank(y_pred)) & tf.equal(tf.size(y), tf.size(y_pred))
    found = tf.cond(soft, lambda: tf.reshape(tf.cast(y, tf.float32), shape), of_numbers)
    return tf.ensure_shape(found, y_pred.shape)


def _labels(task: Any, y: Any, expected: Any, shape: Any) -> Any:
    """Returns labels in the shape of the outputs; a last axis of 1 may be there or not."""
    if y is None:
        return ops.full(shape, task.missing)
    y = ops.convert_to_tensor(y)
    if _is_string(y):
        raise TypeError(f"Labels of {type(task).__name__} must be numbers. Received: strings.")
    given, wanted = list(y.shape), list(expected)
    fits = [given, [*given, 1], given[:-1] if given[-1:] == [1] else given]
    if not any(_compatible(one, wanted) for one in fits):
        raise ValueError(
            f"Labels of {type(task).__name__} must have the shape {tuple(wanted)} here. Received: "
            f"labels of shape {tuple(given)}."
        )
    return ops.reshape(y, shape)


def _is_string(y: Any) -> bool:
    return keras.backend.standardize_dtype(y.dtype) == "string"


def name_numbers(task: Any, y: Any) -> Any:
    """Returns class numbers for names, -1 for an empty one; other labels as they are."""
    if not _is_string(y):
        return y
    equal = tf.equal(y[..., None], tf.constant(task.class_names))
    numbers = tf.argmax(equal, axis=-1, output_type=tf.int32)
    return tf.where(tf.reduce_any(equal, axis=-1), numbers, -1)


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
