"""Tasks: what one head predicts, with its loss, metrics and missing labels.

A task is a small immutable object; the head layer of a model carries it in its config.
"""

from __future__ import annotations

import abc
import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeGuard

import keras
import numpy as np
from keras import ops

from keras_lp.utils.names import near

Classes = int | Sequence[str]
ClassWeight = Mapping[Any, float] | Literal["balanced"]

REDUCTION = "mean_with_sample_weight"  # the mean over the labels that are present


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Base class of `Classification`, `MultiLabel` and `Regression`."""

    activation: ClassVar[str] = "linear"  # what an export applies to the head's output
    missing: ClassVar[float] = -1  # the value of a missing label
    named_metrics: ClassVar[Mapping[str, Callable[[int], keras.metrics.Metric]]] = {}

    weight: float = dataclasses.field(default=1.0, kw_only=True)
    metrics: Sequence[keras.metrics.Metric | str] = dataclasses.field(default=(), kw_only=True)
    hidden_units: Sequence[int] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not is_number(self.weight) or not 0 <= self.weight < float("inf"):
            raise ValueError(
                f"The `weight` of {kind} must be a number of 0 or more. Received: "
                f"weight={self.weight!r}."
            )
        metrics, known = self.metrics, (keras.metrics.Metric, str)
        listed = isinstance(metrics, (list, tuple))
        if not listed or not all(isinstance(metric, known) for metric in metrics):
            raise TypeError(
                f"The `metrics` of {kind} must be a list of keras.metrics objects, or of the names "
                f"{list(self.named_metrics)}. Received: metrics={metrics!r}. The task's own metric "
                "is always included."
            )
        for name in metrics:
            if isinstance(name, str) and name not in self.named_metrics:
                raise ValueError(
                    f"Metric names of {kind} are {list(self.named_metrics)}. Received: "
                    f"{name!r}.{near(name, self.named_metrics)} Pass other metrics as "
                    "keras.metrics objects."
                )
        object.__setattr__(self, "metrics", tuple(metrics))
        if self.hidden_units is not None:
            check_hidden_units(self.hidden_units)
            object.__setattr__(self, "hidden_units", tuple(self.hidden_units))

    @property
    @abc.abstractmethod
    def units(self) -> int:
        """Number of outputs of the head."""

    @property
    def label_count(self) -> int:
        """How many times the mean loss counts in the sum over tasks."""
        return 1

    @abc.abstractmethod
    def make_loss(self) -> keras.losses.Loss:
        """Returns the loss for the output of `for_loss`, averaged over the labels present."""

    @abc.abstractmethod
    def make_metrics(self) -> list[keras.metrics.Metric]:
        """Returns new metrics, to be compiled as `weighted_metrics`."""

    @abc.abstractmethod
    def mask_missing(self, y: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        """Replaces missing labels by a valid value of weight 0.

        Args:
            y: labels, or None if the whole batch lacks this task.
            y_pred: the head's output, `(batch, ..., units)`.
            sample_weight: weights, `(batch,)` or one per label. Defaults to 1.

        Returns:
            `(y, y_pred, weight)`, shaped for the loss and the metrics of this task.
        """

    def for_loss(
        self, y: Any, y_pred: Any, weight: Any, class_weight: Any = None
    ) -> tuple[Any, Any, Any]:
        """Returns the output of `mask_missing` in the form for the loss, with class weights.

        Args:
            y: labels.
            y_pred: outputs.
            weight: their weights.
            class_weight: weights of the classes, `(classes,)`. Defaults to None: the task's own.
        """
        return y, y_pred, weight

    def for_metrics(self, y: Any, y_pred: Any, weight: Any) -> tuple[Any, Any, Any]:
        """Returns the output of `mask_missing` in the form for the metrics."""
        return y, y_pred, weight

    def loss_on(self, loss: keras.losses.Loss, y: Any, y_pred: Any) -> keras.losses.Loss:
        """Returns the loss in the form that fits labels from `for_loss`."""
        return loss

    def to_numbers(self, y: np.ndarray, name: str = "y") -> np.ndarray:
        """Converts labels that are names to numbers; raises an error for an unknown name."""
        return y

    def check_labels(self, y: np.ndarray, name: str = "y", steps: int = 0) -> None:
        """Raises an error if an array contains labels that this task cannot learn from.

        Args:
            y: labels of any number of examples.
            name: name of the labels in the error.
            steps: number of axes of an example's class numbers, 1 for a label per step of
                a sequence. Defaults to 0.

        Raises:
            ValueError: if a label is outside the classes, or not finite.
            TypeError: if labels are not numbers.
        """
        if not np.issubdtype(y.dtype, np.number) and y.dtype != bool:
            raise TypeError(
                f"Labels of {type(self).__name__} must be numbers. Received: {name} of dtype "
                f"{y.dtype}."
            )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        config = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        config["metrics"] = [
            m if isinstance(m, str) else keras.saving.serialize_keras_object(m)
            for m in self.metrics
        ]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Task:
        """Creates the task from `get_config()`."""
        metrics = [
            m if isinstance(m, str) else keras.saving.deserialize_keras_object(m)
            for m in config.get("metrics", ())
        ]
        return cls(**{**config, "metrics": metrics})

    def _new_metrics(self) -> list[keras.metrics.Metric]:
        made = []
        for metric in self.metrics:
            if isinstance(metric, str):
                made.append(self.named_metrics[metric](self.units))
                continue
            first, own = (type(metric).from_config(metric.get_config()) for _ in range(2))
            self._check_metric(first)
            made.append(own)
        return made

    def _check_metric(self, metric: keras.metrics.Metric) -> None:
        """Raises `ValueError` unless a metric can be computed from labels and outputs."""
        y, y_pred = self._some_labels(), np.array([[-3.0], [3.0]], "float32")
        y_pred = np.repeat(y_pred, self.units, axis=-1)
        y, y_pred, weight = self.for_metrics(*self.mask_missing(y, ops.convert_to_tensor(y_pred)))
        try:
            metric.update_state(y, y_pred, weight)
            metric.result()
        except Exception as error:
            by_name = f" Metric names are {list(self.named_metrics)}." * bool(self.named_metrics)
            raise ValueError(
                f"A metric of {type(self).__name__} must take labels of shape {tuple(y.shape)} and "
                f"outputs before any activation of shape {tuple(y_pred.shape)}, here for 2 "
                f"examples. Received: {metric.name!r} of type {type(metric).__name__}, which fails "
                f"with: {str(error).splitlines()[0]}.{by_name}"
            ) from error

    def _some_labels(self) -> np.ndarray:
        return np.zeros((2, self.units), "float32")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


TaskLike = Task | int | Sequence[str]


@dataclasses.dataclass(frozen=True)
class ClassTask(Task):
    """Base class of the tasks whose outputs are classes."""

    classes: Classes
    class_weight: ClassWeight | Sequence[float] | None = dataclasses.field(
        default=None, kw_only=True
    )
    label_smoothing: float = dataclasses.field(default=0.0, kw_only=True)

    _least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self).__name__
        classes = self.classes
        if isinstance(classes, numbers.Integral) and not isinstance(classes, bool):
            number = int(classes)
            object.__setattr__(self, "classes", number)
        elif isinstance(classes, Sequence) and not isinstance(classes, (str, bytes)):
            if not all(isinstance(name, str) for name in classes):
                raise TypeError(
                    f"The class names of {kind} must be strings. Received: classes={classes!r}."
                )
            unwritable = [name for name in classes if not _is_unicode(name)]
            if unwritable:
                raise ValueError(
                    f"The class names of {kind} must be text that UTF-8 can hold. Received: "
                    f"{unwritable[0]!r} with half a surrogate pair."
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
        smoothing = self.label_smoothing
        if not is_number(smoothing) or not 0 <= smoothing < 1:
            raise ValueError(
                f"`label_smoothing` of {kind} must be a number from 0 to below 1. Received: "
                f"label_smoothing={smoothing!r}."
            )
        object.__setattr__(self, "class_weight", self._weights_of_classes())

    @property
    def units(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The given names, else "0", "1", ..."""
        if isinstance(self.classes, int):
            return tuple(str(i) for i in range(self.classes))
        return tuple(self.classes)

    def _by_class(
        self, given: Mapping[Any, Any], default: float, fits: Callable[[Any], bool], rule: str
    ) -> tuple[float, ...]:
        """Returns one number per class from a dict by class number or name.

        Args:
            given: the dict.
            default: value of classes that are not in the dict.
            fits: whether a value is valid.
            rule: the start of the error message for an invalid value.
        """
        names = {name: i for i, name in enumerate(self.class_names)}
        values = [default] * self.units
        for key, value in given.items():
            index = names.get(key, key)
            whole = isinstance(index, numbers.Integral)
            if not whole or not 0 <= index < self.units or not is_number(value) or not fits(value):
                raise ValueError(
                    f"{rule} Received: {key!r}: {value!r}; the classes are "
                    f"{list(self.class_names[:20])}."
                )
            values[index] = float(value)
        return tuple(values)

    @abc.abstractmethod
    def balanced_weights(self, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
        """Returns the class weights for `class_weight="balanced"`.

        Args:
            positives: number of labels of each class, `(classes,)`.
            negatives: number of labels that are not of each class, `(classes,)`.
        """

    @abc.abstractmethod
    def weights_of_labels(self, y: Any, class_weight: Any, rank: int) -> Any:
        """Returns the weights of labels.

        Args:
            y: labels, a tensor.
            class_weight: weights of the classes, `(classes,)`.
            rank: rank of the outputs.
        """

    def _weights(self, class_weight: Any) -> Any:
        """Returns the class weights as a tensor, None if there are none."""
        given = self.class_weight if class_weight is None else class_weight
        if given is None or isinstance(given, str):
            return None
        return ops.convert_to_tensor(given, "float32")

    def _weights_of_classes(self) -> tuple[float, ...] | str | None:
        """Returns the weight of each class; classes that are not in the dict have weight 1."""
        given = self.class_weight
        if given is None or (isinstance(given, str) and given == "balanced"):
            return given
        if not isinstance(given, (Mapping, Sequence, np.ndarray)) or isinstance(given, str):
            raise ValueError(
                f"`class_weight` of {type(self).__name__} must be a dict of weights by class, or "
                f'"balanced". Received: class_weight={given!r}.'
            )
        return self._by_class(
            given if isinstance(given, Mapping) else dict(enumerate(given)),
            1.0,
            lambda weight: weight >= 0,
            f"`class_weight` of {type(self).__name__} must be a dict of weights of 0 or more by "
            "class number or name.",
        )


def check_hidden_units(hidden_units: Any) -> None:
    """Raises an error unless these are layer sizes."""
    if not isinstance(hidden_units, Sequence) or isinstance(hidden_units, str):
        raise TypeError(
            "`hidden_units` must be a list of layer sizes, such as [128]. Received: "
            f"hidden_units={hidden_units!r}."
        )
    for units in hidden_units:
        whole = isinstance(units, numbers.Integral) and not isinstance(units, bool)
        if not whole or units < 1:
            raise ValueError(
                f"`hidden_units` must be an integer of 1 or more. Received: hidden_units={units!r}."
            )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a real number and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
