"""Missing labels: replaced by a valid value of weight 0, before a loss or a metric sees them."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops


def is_present(task: Any, y: Any) -> Any:
    """Returns a boolean tensor, False where a label is missing."""
    if math.isnan(task.missing):
        return ops.logical_not(ops.isnan(y))
    return ops.not_equal(y, ops.cast(task.missing, y.dtype))


def mask_labels(task: Any, y: Any, y_pred: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """Masks whole labels, `(batch, ...)` class numbers of `(batch, ..., units)` outputs."""
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


def _labels(task: Any, y: Any, expected: Any, shape: Any) -> Any:
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
        one_hot = hasattr(task, "class_names") and len(given) == len(wanted) + 1
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
