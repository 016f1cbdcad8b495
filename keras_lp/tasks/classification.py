"""The classification task: one of several classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_lp.tasks.metrics import BalancedAccuracy, ClassAUC, ClassF1
from keras_lp.tasks.missing import is_soft, mask_labels
from keras_lp.tasks.task import REDUCTION, ClassTask, Task
from keras_lp.utils.names import near

LossName = Literal["crossentropy", "focal"]
MetricName = Literal["f1", "balanced_accuracy", "auc"]


@keras.saving.register_keras_serializable("keras_lp")
@dataclasses.dataclass(frozen=True)
class Classification(ClassTask):
    """One of several classes. The head outputs logits; exported files add the softmax.

    Labels have one of these forms:

    - class numbers, `(batch,)` integers from 0 to `classes - 1`; -1 is a missing label
    - class names, `(batch,)` strings; an empty string is a missing label
    - one-hot or soft labels, `(batch, classes)` distributions that sum to 1; a row of NaN or -1
      is a missing label

    The loss is the crossentropy. The metric is `accuracy`; for soft labels it uses their most
    probable class.

    Args:
        classes: number of classes (2 or more), or their names in the order of the numbers.
        weight: factor of the task's loss in the sum over the tasks. For `MultiLabel`, the loss in
            that sum is the sum over its labels. Defaults to 1.
        class_weight: dict of weights by class number or name; classes that are not in the dict
            have weight 1. `"balanced"` computes n / (classes * examples of the class) from the
            labels of the first `fit`. The loss is the weighted mean; metrics are not weighted.
            Defaults to None.
        loss: `"crossentropy"`; `"focal"`, which down-weights examples that are already classified
            well, with a gamma of 2 (Lin et al., 2017, arXiv:1708.02002); or a Keras loss on
            logits (`from_logits=True`). Defaults to `"crossentropy"`.
        label_smoothing: share of each label that is spread over all classes, at least 0 and below
            1. Defaults to 0.
        metrics: additional metrics: Keras metrics, which get labels `(batch,)`, logits and
            weights; or names of metrics for imbalanced classes: `"f1"` and
            `"balanced_accuracy"`, averaged over the classes, and `"auc"`, the area under the ROC
            curve of each class against the rest. Defaults to none.
        hidden_units: sizes of dense layers (relu) of this head. Defaults to None: the value that
            the builder was given.

    Raises:
        ValueError: if there are fewer than two classes, a name occurs twice, or a weight or the
            smoothing is out of range.
        TypeError: if `classes` is neither a number nor names, or metrics are not Keras objects.

    Example:

    >>> import keras_lp as lp
    >>> task = lp.Classification(["normal", "pneumonia"], class_weight={"normal": 3.0})
    >>> task.class_names
    ('normal', 'pneumonia')
    >>> task.class_weight
    (3.0, 1.0)
    """

    activation: ClassVar[str] = "softmax"
    _least: ClassVar[int] = 2
    named_metrics: ClassVar[Mapping[str, Callable[[int], keras.metrics.Metric]]] = {
        "f1": ClassF1,
        "balanced_accuracy": BalancedAccuracy,
        "auc": ClassAUC,
    }

    loss: LossName | keras.losses.Loss = dataclasses.field(default="crossentropy", kw_only=True)
    metrics: Sequence[keras.metrics.Metric | MetricName] = dataclasses.field(
        default=(), kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        loss = self.loss
        if isinstance(loss, keras.losses.Loss):
            if self.label_smoothing:
                raise ValueError(
                    "A Keras loss has its own label smoothing. Received: "
                    f"label_smoothing={self.label_smoothing} with loss={loss!r}."
                )
            if loss.get_config().get("from_logits") is False:
                raise ValueError(
                    "The outputs are logits, so a Keras loss needs from_logits=True. Received: "
                    f"loss={type(loss).__name__} with from_logits=False."
                )
        elif loss not in get_args(LossName):
            raise ValueError(
                '`loss` of Classification must be "crossentropy", "focal" or a keras.losses '
                f"object. Received: loss={loss!r}."
            )

    def make_loss(self) -> keras.losses.Loss:
        if isinstance(self.loss, keras.losses.Loss):
            config = {**self.loss.get_config(), "reduction": REDUCTION}
            return type(self.loss).from_config(config)
        options = {"from_logits": True, "reduction": REDUCTION}
        if self.loss == "focal":
            return keras.losses.CategoricalFocalCrossentropy(
                alpha=1.0, label_smoothing=self.label_smoothing, **options
            )
        if self.label_smoothing:
            return keras.losses.CategoricalCrossentropy(
                label_smoothing=self.label_smoothing, **options
            )
        return keras.losses.SparseCategoricalCrossentropy(**options)

    def make_metrics(self) -> list[keras.metrics.Metric]:
        own = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        return [own, *self._new_metrics()]

    def mask_missing(self, y: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        return mask_labels(self, y, y_pred, sample_weight)

    def _some_labels(self) -> np.ndarray:
        return np.array([0, 1], "int32")

    def balanced_weights(self, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
        """Returns n / (classes * examples of the class), and 1 for a class without examples."""
        present = positives > 0
        mean = positives.sum() / max(present.sum(), 1)
        return np.where(present, mean / np.where(present, positives, 1), 1)

    def weights_of_labels(self, y: Any, class_weight: Any, rank: int) -> Any:
        weights = ops.convert_to_tensor(class_weight, "float32")
        if len(y.shape) == rank and y.shape[-1] == self.units:
            return ops.sum(ops.cast(y, "float32") * weights, axis=-1)
        return ops.take(weights, ops.maximum(ops.cast(y, "int32"), 0))

    def for_loss(
        self, y: Any, y_pred: Any, weight: Any, class_weight: Any = None
    ) -> tuple[Any, Any, Any]:
        weights = self._weights(class_weight)
        if weights is not None:
            weight = weight * self.weights_of_labels(y, weights, len(y_pred.shape))
        loss = self.loss
        numbers = isinstance(loss, keras.losses.SparseCategoricalCrossentropy) or (
            loss == "crossentropy" and not self.label_smoothing
        )
        if not numbers and not is_soft(y, y_pred):
            y = ops.one_hot(y, self.units)
        return y, y_pred, weight

    def for_metrics(self, y: Any, y_pred: Any, weight: Any) -> tuple[Any, Any, Any]:
        if is_soft(y, y_pred):
            y = tf.argmax(y, axis=-1, output_type=tf.int32)  # Keras's is no LiteRT builtin
        return y, y_pred, weight

    def loss_on(self, loss: keras.losses.Loss, y: Any, y_pred: Any) -> keras.losses.Loss:
        if is_soft(y, y_pred) and isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
            return keras.losses.CategoricalCrossentropy(
                from_logits=loss.from_logits, reduction=loss.reduction, dtype=loss.dtype
            )
        return loss

    def to_numbers(self, y: np.ndarray, name: str = "y") -> np.ndarray:
        if y.dtype.kind not in "OSU":
            return y
        known: dict[Any, int] = {
            **{one: i for i, one in enumerate(self.class_names)},
            "": -1,
            None: -1,
        }
        given = [one.decode() if isinstance(one, bytes) else one for one in y.ravel().tolist()]
        unknown = next((one for one in given if one not in known), None)
        if unknown is not None:
            hint = near(unknown, self.class_names) if isinstance(unknown, str) else ""
            raise ValueError(
                f"Labels that are names must be class names, {list(self.class_names[:20])}"
                f"{' and more' if self.units > 20 else ''}, or empty if the label is missing. "
                f"Received: {name} with {unknown!r}.{hint}"
            )
        return np.array([known[one] for one in given], "int32").reshape(y.shape)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if isinstance(self.loss, keras.losses.Loss):
            config["loss"] = keras.saving.serialize_keras_object(self.loss)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Task:
        loss = config.get("loss", "crossentropy")
        if not isinstance(loss, str):
            loss = keras.saving.deserialize_keras_object(loss)
        return super().from_config({**config, "loss": loss})

    def check_labels(self, y: np.ndarray, name: str = "y", steps: int = 0) -> None:
        y = self.to_numbers(y, name)
        super().check_labels(y, name)
        if y.ndim == 2 + steps and y.shape[-1] == self.units:
            self._check_distributions(y, name)
            return
        wrong = ~np.isin(y, np.arange(-1, self.units))
        if wrong.any():
            raise ValueError(
                f"Labels must be class numbers from 0 to {self.units - 1}, or -1 if the label "
                f"is missing. Received: {name} with the label {y[wrong].flat[0]!s} "
                f"({wrong.sum()} of {y.size} labels are outside). Renumber the labels or build "
                "the model with more classes."
            )

    def _check_distributions(self, y: np.ndarray, name: str) -> None:
        rows = y.reshape(-1, self.units).astype("float64")
        missing = np.isnan(rows).all(-1) | (rows == -1).all(-1)
        with np.errstate(invalid="ignore"):
            fits = (rows >= 0).all(-1) & (np.abs(rows.sum(-1) - 1) < 1e-3)
        wrong = ~(missing | fits)
        if wrong.any():
            raise ValueError(
                "Labels with one number per class must be 0 or more and sum to 1, or all be "
                f"NaN or -1 if the label is missing. Received: {name} with "
                f"{rows[wrong][0][:20].tolist()}. Use lp.MultiLabel if an example can have several "
                "classes."
            )


def as_task(task: Any) -> Task:
    """Returns a task as it is, and `Classification` of an int or a list of names."""
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping) or task is None:
        raise TypeError(
            "A task must be lp.Classification, lp.MultiLabel, lp.Regression, a number of classes "
            f"or a list of class names. Received: task={task!r}. For several tasks in one model, "
            "use lp.multitask_model."
        )
    return Classification(task)
