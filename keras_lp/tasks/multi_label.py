"""The multi-label task: any number of labels per example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import keras
import numpy as np
from keras import ops

from keras_lp.tasks.metrics import LabelAUC, MacroF1, MeanAveragePrecision, cutoffs
from keras_lp.tasks.missing import mask_entries
from keras_lp.tasks.task import REDUCTION, ClassTask, is_number


@keras.saving.register_keras_serializable("keras_lp")
@dataclasses.dataclass(frozen=True)
class MultiLabel(ClassTask):
    """Any number of labels per example. The head outputs logits; exported files add the sigmoid.

    Labels are `(batch, classes)` of 0 and 1; single entries may be missing (-1). The loss is the
    mean binary crossentropy over the entries. With other tasks, the mean counts once per label,
    `classes` times in total. The metrics are `f1`, the F1 score above the thresholds, and `map`,
    the average precision, both averaged over the labels that have a positive example.

    Args:
        classes: number of labels, or their names in order.
        weight: as in `lp.Classification`.
        class_weight: dict of weights of the positive entries by label number or name; negative
            entries have weight 1. `"balanced"` computes negative entries / positive entries of
            the label from the labels of the first `fit`. Defaults to None.
        label_smoothing: s moves the targets from 0 and 1 to s / 2 and 1 - s / 2. Defaults to 0.
        thresholds: probability between 0 and 1 above which a label is predicted: a number for all
            labels, a list with one number per label, or a dict by label number or name (labels
            that are not in the dict have 0.5). The loss does not use them; `f1`,
            `lp.decode_predictions` and exported files do, and `lp.choose_thresholds` sets them.
            Defaults to None, 0.5 for all.
        metrics: additional metrics: Keras metrics, which get single entries, labels and logits of
            shape `(batch, classes, 1)`; or `"auc"`, the area under the ROC curve, averaged over
            the labels. Defaults to none.
        hidden_units: as in `lp.Classification`.

    Raises:
        ValueError: if there is no label, a name occurs twice, or a weight, the smoothing or a
            threshold is out of range.
        TypeError: if `classes` is neither a number nor names, or metrics are not Keras objects.

    Example:

    >>> import keras_lp as lp
    >>> task = lp.MultiLabel(["sun", "rain", "snow"], thresholds={"snow": 0.2})
    >>> task.units
    3
    >>> task.thresholds
    (0.5, 0.5, 0.2)
    """

    activation: ClassVar[str] = "sigmoid"
    named_metrics: ClassVar[Mapping[str, Callable[[int], keras.metrics.Metric]]] = {"auc": LabelAUC}

    thresholds: float | Mapping[Any, float] | Sequence[float] | None = dataclasses.field(
        default=None, kw_only=True
    )
    metrics: Sequence[keras.metrics.Metric | Literal["auc"]] = dataclasses.field(
        default=(), kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "thresholds", self._thresholds_of_labels())

    @property
    def label_count(self) -> int:
        return self.units

    def make_loss(self) -> keras.losses.Loss:
        return keras.losses.BinaryCrossentropy(
            from_logits=True, label_smoothing=self.label_smoothing, reduction=REDUCTION
        )

    def make_metrics(self) -> list[keras.metrics.Metric]:
        own = [MacroF1(self.units, self.label_thresholds), MeanAveragePrecision(self.units)]
        return [*own, *self._new_metrics()]

    def is_predicted(self, logits: Any) -> np.ndarray:
        """Returns which entries of `(..., classes)` logits are above their threshold."""
        return np.asarray(logits) > cutoffs(self.probability_thresholds)

    def mask_missing(self, y: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        return mask_entries(self, y, y_pred, sample_weight)

    def balanced_weights(self, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
        """Returns negative / positive entries of each label, 1 if it lacks either."""
        both = (positives > 0) & (negatives > 0)
        return np.where(both, negatives / np.where(both, positives, 1), 1)

    def weights_of_labels(self, y: Any, class_weight: Any, rank: int) -> Any:
        weights = ops.convert_to_tensor(class_weight, "float32")
        return ops.maximum(ops.cast(y, "float32"), 0) * (weights - 1) + 1

    def for_loss(
        self, y: Any, y_pred: Any, weight: Any, class_weight: Any = None
    ) -> tuple[Any, Any, Any]:
        weights = self._weights(class_weight)
        if weights is not None:
            weight = weight * self.weights_of_labels(y[..., 0], weights, len(y_pred.shape))
        return y, y_pred, weight

    def check_labels(self, y: np.ndarray, name: str = "y", steps: int = 0) -> None:
        super().check_labels(y, name)
        if y.ndim < 2 or y.shape[-1] != self.units:
            raise ValueError(
                f"Labels of MultiLabel have one entry per class, shape (examples, {self.units}). "
                f"Received: {name} of shape {y.shape}."
            )
        wrong = ~((y == -1) | ((y >= 0) & (y <= 1)))
        if wrong.any():
            raise ValueError(
                "Labels of MultiLabel must be 0 or 1, or -1 if the label is missing. "
                f"Received: {name} with the value {y[wrong].flat[0]!s}."
            )

    @property
    def label_thresholds(self) -> tuple[float, ...] | None:
        """The threshold of each label, None where none are set."""
        return cast("tuple[float, ...] | None", self.thresholds)  # see `__post_init__`

    @property
    def probability_thresholds(self) -> np.ndarray:
        """The thresholds as an array, `(classes,)`; 0.5 if none are set."""
        given = (0.5,) * self.units if self.thresholds is None else self.thresholds
        return np.array(given, "float64")

    def _thresholds_of_labels(self) -> tuple[float, ...] | None:
        """Returns the threshold of each label; those not in a dict are 0.5."""
        given = self.thresholds
        if given is None:
            return None
        if is_number(given):
            given = [given] * self.units
        if not isinstance(given, Mapping):
            values = list(given) if isinstance(given, Iterable) else []
            if len(values) != self.units:
                raise ValueError(
                    "`thresholds` of MultiLabel must be a number for all labels, a list with one "
                    "number per label, or a dict by label number or name. Received: "
                    f"thresholds={given!r} for {self.units} labels."
                )
            given = dict(enumerate(values))
        return self._by_class(
            given,
            0.5,
            lambda value: 0 < value < 1,
            "`thresholds` of MultiLabel must be probabilities above 0 and below 1, by label number "
            "or name.",
        )
