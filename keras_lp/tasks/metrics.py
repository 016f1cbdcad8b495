"""Metrics for rare labels and classes: each label or class counts the same.

Their states are sums over examples, so the states of several clients can be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

_HALF_RANGE = 8.0  # half of the steps of LabelAUC lie between -8 and 8
_LARGEST = 1e30  # replaces infinite logits, such as those of masked classes


def cutoffs(thresholds: Any) -> np.ndarray:
    """Returns the logits of probabilities between 0 and 1, in float64."""
    thresholds = np.asarray(thresholds, "float64")
    return np.log(thresholds) - np.log1p(-thresholds)


class _LabelMetric(keras.metrics.Metric):
    """Base class: the state is a sum with this shape for each label."""

    def __init__(
        self,
        num_labels: int,
        name: str,
        shape: tuple[int, ...],
        dtype: Any = None,
        sums_dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self._direction = "up"
        self.num_labels = num_labels
        self.positives, self.negatives = (
            self.add_weight((num_labels, *shape), "zeros", sums_dtype, name=part)
            for part in ("positives", "negatives")
        )

    def _flat(self, y: Any, y_pred: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """Returns logits and the weights of positives and negatives, each `(n, labels)`."""
        y, y_pred = (
            ops.reshape(ops.cast(part, self.dtype), (-1, self.num_labels)) for part in (y, y_pred)
        )
        weight = ops.ones_like(y)
        if sample_weight is not None:
            weight = ops.cast(sample_weight, self.dtype)
            if len(weight.shape) < 2:
                weight = weight[..., None] * ops.ones_like(y)
            weight = ops.reshape(weight, (-1, self.num_labels))
        return y_pred, weight * y, weight * (1 - y)

    def _add(self, sums: Any, step: Any, values: Any) -> None:
        """Adds values `(n, labels, ...)` to sums by label and step, both integers."""
        width = sums.shape[1]
        places = ops.cast(step, "int32") + width * ops.arange(self.num_labels)
        rows = ops.reshape(values, (-1, *sums.shape[2:]))
        size = self.num_labels * width
        added = ops.segment_sum(rows, ops.reshape(places, (-1,)), num_segments=size)
        sums.assign_add(ops.reshape(added, sums.shape))

    def _mean(self, values: Any) -> Any:
        """Returns the mean over the labels that have a positive example, 0 if none has."""
        present = ops.cast(ops.sum(self.positives, axis=-1) > 0, values.dtype)
        return ops.sum(values * present) / ops.maximum(ops.sum(present), 1)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "num_labels": self.num_labels}


@keras.saving.register_keras_serializable("keras_lp")
class MacroF1(_LabelMetric):
    """The F1 score of each label above its threshold, averaged over the labels.

    A label without a positive example is left out of the mean.

    Args:
        num_labels: number of labels.
        thresholds: probabilities between 0 and 1, one per label; an entry is positive if it is
            above its threshold. Defaults to None, 0.5 for all. `lp.choose_thresholds` sets those
            of the metric named `"f1"`.
        name: name of the metric. Defaults to `"f1"`.
        dtype: dtype of the sums. Defaults to float32.

    Example:

    >>> import keras_lp as lp
    >>> metric = lp.MultiLabel(2).make_metrics()[0]
    >>> metric.update_state([[1, 0], [1, 1]], [[2.0, -1.0], [-1.0, 3.0]])
    >>> round(float(metric.result()), 4)
    0.8333
    """

    def __init__(
        self,
        num_labels: int,
        thresholds: Sequence[float] | None = None,
        name: str = "f1",
        dtype: Any = None,
    ) -> None:
        super().__init__(num_labels, name, (2,), dtype)
        self.thresholds = thresholds if thresholds is None else tuple(map(float, thresholds))

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Counts labels `(batch, ..., labels)` and logits with the same number of entries."""
        y_pred, positive, negative = self._flat(y_true, y_pred, sample_weight)
        chosen = ops.cast(y_pred > ops.convert_to_tensor(self._cutoffs(), self.dtype), self.dtype)
        for sums, weight in ((self.positives, positive), (self.negatives, negative)):
            sums.assign_add(
                ops.stack(
                    [ops.sum(weight * (1 - chosen), axis=0), ops.sum(weight * chosen, axis=0)],
                    axis=-1,
                )
            )

    def result(self) -> Any:
        """Returns the mean of 2 TP / (2 TP + FP + FN)."""
        found, wrong = self.positives[:, 1], self.negatives[:, 1]
        total = ops.sum(self.positives, axis=-1) + found + wrong
        return self._mean(2 * found / ops.where(total > 0, total, 1))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        thresholds = self.thresholds if self.thresholds is None else list(self.thresholds)
        return {**super().get_config(), "thresholds": thresholds}

    def _cutoffs(self) -> np.ndarray:
        """Returns the logits of the thresholds, rounded down so that no float32 lies between."""
        if self.thresholds is None:
            return np.zeros(self.num_labels, "float32")
        exact = cutoffs(self.thresholds)
        rounded = exact.astype("float32")
        return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)


@keras.saving.register_keras_serializable("keras_lp")
class MeanAveragePrecision(_LabelMetric):
    """The area under the precision-recall curve of each label, averaged over the labels.

    Average precision as scikit-learn defines it. Logits from -12 to 12 are counted in `bins`
    steps, and entries within a step count as equal. With well spread logits the result is within
    0.005 of the exact value. A label without a positive example is left out.

    Args:
        num_labels: number of labels.
        bins: number of steps. Defaults to 1024.
        name: name of the metric. Defaults to `"map"`.
        dtype: dtype of the sums. Defaults to float32.
    """

    def __init__(
        self, num_labels: int, bins: int = 1024, name: str = "map", dtype: Any = None
    ) -> None:
        super().__init__(num_labels, name, (bins,), dtype)
        self.bins = bins

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Counts labels `(batch, ..., labels)` and logits with the same number of entries."""
        y_pred, *weights = self._flat(y_true, y_pred, sample_weight)
        step = ops.clip(ops.floor((y_pred + 12) / 24 * self.bins), 0, self.bins - 1)
        for sums, weight in zip((self.positives, self.negatives), weights, strict=True):
            self._add(sums, step, weight)

    def result(self) -> Any:
        """Returns the mean of the sums of precision times increase in recall over the steps."""
        gained = ops.flip(self.positives, axis=-1)
        found = ops.cumsum(gained, axis=-1)
        chosen = found + ops.cumsum(ops.flip(self.negatives, axis=-1), axis=-1)
        precision = found / ops.where(chosen > 0, chosen, 1)
        total = found[:, -1]
        area = ops.sum(precision * gained, axis=-1)
        return self._mean(area / ops.where(total > 0, total, 1))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "bins": self.bins}


@keras.saving.register_keras_serializable("keras_lp")
class LabelAUC(_LabelMetric):
    """The area under the ROC curve of each label, averaged over the labels.

    Agrees with scikit-learn's `roc_auc_score(..., average="macro")` within 1e-6 if the logits
    spread over 1 or more, and within 1e-4 if they spread over 0.1. Logits are counted in `bins`
    steps, which are narrow for small logits. For the positive entries of a step, and separately
    for the negative ones, the metric stores number, mean and spread, and treats them as two points
    with this mean and spread. One or two entries are therefore exact. A label that lacks positive
    or negative entries is left out.

    Args:
        num_labels: number of labels.
        bins: number of steps. Defaults to None: 262,144 divided by the number of labels, from
            1,024 to 32,768.
        name: name of the metric. Defaults to `"auc"`.
        dtype: dtype of the logits; the sums are float64. Defaults to float32.
    """

    def __init__(
        self, num_labels: int, bins: int | None = None, name: str = "auc", dtype: Any = None
    ) -> None:
        self.bins = bins or min(max(2**18 // num_labels, 1024), 2**15)
        super().__init__(num_labels, name, (self.bins, 3), dtype, "float64")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Counts labels `(batch, ..., labels)` and logits with the same number of entries."""
        y_pred, *weights = self._flat(y_true, y_pred, sample_weight)
        y_pred = ops.clip(ops.cast(y_pred, "float64"), -_LARGEST, _LARGEST)
        place = (y_pred / (_HALF_RANGE + ops.abs(y_pred)) + 1) / 2 * self.bins
        step = ops.clip(ops.floor(place), 0, self.bins - 1)
        within = place - step - 0.5
        moments = ops.stack([ops.ones_like(within), within, within**2], axis=-1)
        for sums, weight in zip((self.positives, self.negatives), weights, strict=True):
            self._add(sums, step, ops.cast(weight, "float64")[..., None] * moments)

    def result(self) -> Any:
        """Returns the mean share of (positive, negative) pairs that are in order."""
        (positives, *high), (negatives, *low) = map(_two_points, (self.positives, self.negatives))
        # Points closer than 1e-5 of a step are one point: sums in another order differ as little.
        in_order = sum(
            (1 + ops.clip((above - below) * 1e5, -1, 1)) / 2 for above in high for below in low
        )
        below = ops.cumsum(negatives, axis=-1) - negatives + negatives * in_order / 4
        pairs = ops.sum(positives, axis=-1) * ops.sum(negatives, axis=-1)
        present = ops.cast(pairs > 0, "float64")
        area = ops.sum(positives * below, axis=-1) / ops.where(pairs > 0, pairs, 1)
        return ops.cast(ops.sum(area * present) / ops.maximum(ops.sum(present), 1), self.dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "bins": self.bins}


def _two_points(sums: Any) -> tuple[Any, Any, Any]:
    """Returns the weight of the sums, and two points with their mean and spread."""
    weight = sums[..., 0]
    known = ops.where(weight > 0, weight, 1)
    mean = sums[..., 1] / known
    spread = ops.sqrt(ops.maximum(sums[..., 2] / known - mean**2, 0))
    return weight, mean - spread, mean + spread


@keras.saving.register_keras_serializable("keras_lp")
class ClassAUC(LabelAUC):
    """The area under the ROC curve of each class against the rest, averaged over the classes.

    Agrees with scikit-learn's `roc_auc_score(..., multi_class="ovr")`; for two classes, the area
    of the second. See `LabelAUC` for the precision and the arguments.
    """

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Counts class numbers `(batch, ...)` and logits `(batch, ..., classes)`."""
        y_pred = ops.cast(y_pred, self.dtype)
        own = ops.one_hot(ops.cast(y_true, "int32"), self.num_labels)
        # The log odds of a class: its logit against those of all other classes.
        others = ops.where(ops.eye(self.num_labels) > 0, -float("inf"), y_pred[..., None, :])
        super().update_state(own, y_pred - ops.logsumexp(others, axis=-1), sample_weight)


class _ClassMetric(keras.metrics.Metric):
    """Base class: the state counts examples by class and by most probable class."""

    def __init__(self, num_classes: int, name: str, dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self._direction = "up"
        self.num_classes = num_classes
        self.counts = self.add_weight(
            (num_classes, num_classes), initializer="zeros", name="counts"
        )

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Counts class numbers `(batch, ...)` and logits `(batch, ..., classes)`."""
        y = ops.reshape(ops.cast(y_true, "int32"), (-1,))
        chosen = ops.reshape(ops.cast(ops.argmax(y_pred, axis=-1), "int32"), (-1,))
        weight = ops.ones_like(y, dtype=self.dtype)
        if sample_weight is not None:
            own = ops.cast(sample_weight, self.dtype)
            own = ops.reshape(own, (*ops.shape(own), *[1] * (len(y_true.shape) - len(own.shape))))
            weight = ops.reshape(own * ops.ones_like(y_true, dtype=self.dtype), (-1,))
        size = self.num_classes**2
        counts = ops.segment_sum(weight, y * self.num_classes + chosen, num_segments=size)
        self.counts.assign_add(ops.reshape(counts, (self.num_classes, self.num_classes)))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "num_classes": self.num_classes}


@keras.saving.register_keras_serializable("keras_lp")
class ClassF1(_ClassMetric):
    """The F1 score of each class, averaged over the classes that occur.

    Agrees with scikit-learn's `f1_score(..., average="macro")`.

    Args:
        num_classes: number of classes.
        name: name of the metric. Defaults to `"f1"`.
        dtype: dtype of the counts. Defaults to float32.
    """

    def __init__(self, num_classes: int, name: str = "f1", dtype: Any = None) -> None:
        super().__init__(num_classes, name, dtype)

    def result(self) -> Any:
        """Returns the mean of 2 TP / (2 TP + FP + FN)."""
        total = ops.sum(self.counts, axis=0) + ops.sum(self.counts, axis=1)
        present = ops.cast(total > 0, self.dtype)
        f1 = 2 * ops.diagonal(self.counts) / ops.where(total > 0, total, 1)
        return ops.sum(f1) / ops.maximum(ops.sum(present), 1)


@keras.saving.register_keras_serializable("keras_lp")
class BalancedAccuracy(_ClassMetric):
    """The recall of each class, averaged over the classes with examples.

    Agrees with scikit-learn's `balanced_accuracy_score`.

    Args:
        num_classes: number of classes.
        name: name of the metric. Defaults to `"balanced_accuracy"`.
        dtype: dtype of the counts. Defaults to float32.
    """

    def __init__(
        self, num_classes: int, name: str = "balanced_accuracy", dtype: Any = None
    ) -> None:
        super().__init__(num_classes, name, dtype)

    def result(self) -> Any:
        """Returns the mean recall."""
        total = ops.sum(self.counts, axis=1)
        present = ops.cast(total > 0, self.dtype)
        recall = ops.diagonal(self.counts) / ops.where(total > 0, total, 1)
        return ops.sum(recall) / ops.maximum(ops.sum(present), 1)
