"""Missing labels: replaced by a valid value of weight 0 before a loss or metric gets them."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf
from keras import ops


def is_present(task: Any, y: Any) -> Any:
    """Returns a boolean tensor, False for missing labels: NaN, and -1 for class labels."""
    if math.isnan(task.missing):
        return ops.logical_not(ops.isnan(y))
    return ops.greater_equal(y, ops.zeros_like(y))


def is_soft(y: Any, y_pred: Any) -> bool:
    """Whether labels of a `Classification` are distributions, of the same rank as the outputs."""
    shape = tuple(y.shape)
    return len(shape) == len(y_pred.shape) and shape[-1] == y_pred.shape[-1]


def mask_labels(task: Any, y: Any, y_pred: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """Masks whole labels of `(batch, ..., units)` outputs.

    Returns class numbers or names as `(batch, ...)` numbers, and distributions unchanged.
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

    Losses and metrics average over the last axis before they apply weights, so each entry gets
    its own axis: labels and outputs are returned as `(batch, ..., units, 1)`.
    """
    y = _labels(task, y, y_pred.shape, ops.shape(y_pred))
    y = ops.cast(y, y_pred.dtype)
    present = is_present(task, y)
    y = ops.where(present, y, ops.zeros_like(y))
    return y[..., None], y_pred[..., None], _weight(present, sample_weight)


def _distributions(y: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """Returns labels of either form as distributions.

    Keras traces a step for labels of any rank if a model is trained with both forms.
    """
    shape = tf.shape(y_pred)

    def of_numbers() -> tf.Tensor:
        numbers = tf.cast(tf.reshape(y, shape[:-1]), tf.int32)
        return tf.where(numbers[..., None] < 0, -1.0, tf.one_hot(numbers, y_pred.shape[-1]))

    soft = tf.equal(tf.rank(y), tf.rank(y_pred)) & tf.equal(tf.size(y), tf.size(y_pred))
    found = tf.cond(soft, lambda: tf.reshape(tf.cast(y, tf.float32), shape), of_numbers)
    return tf.ensure_shape(found, y_pred.shape)


def _labels(task: Any, y: Any, expected: Any, shape: Any) -> Any:
    """Returns labels in the shape of the outputs, with or without a last axis of 1."""
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
    """Returns class numbers for class names, -1 for an empty one; other labels unchanged."""
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
