"""The regression task: targets are standardised, outputs are in the units of the labels."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from keras_lp.tasks.missing import mask_entries
from keras_lp.tasks.task import REDUCTION, Task
from keras_lp.utils.keras_internals import train_validation_split


@keras.saving.register_keras_serializable("keras_lp")
@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """One or more numbers. The head outputs them in the units of the labels.

    Labels are `(batch,)` or `(batch, units)` floats; single entries may be missing (NaN). The
    metric is `mae`, the mean absolute error in the units of the labels. The loss is the squared
    error in units of the labels' standard deviation; the best constant prediction has a loss of
    1. It is therefore comparable with the losses of other tasks, and the head does not need to
    learn the scale. The loss is the mean over the units, also with other tasks: a sum of many
    squared errors would dominate them.

    The first `fit` computes mean and standard deviation of each unit from the training labels
    (arrays, a data set or a `PyDataset`; a data set is read once for this). They are weights of
    the head and do not change afterwards. Without such a `fit` (`train_on_batch`, a generator,
    clients of a federation), pass `mean` and `std`; otherwise the labels are not standardised.

    Args:
        units: how many numbers the head predicts. Defaults to 1.
        mean: mean of the labels if it is known, a number or one per unit. Defaults to None.
        std: standard deviation of the labels, above 0; passed together with `mean`. Defaults to
            None.
        weight: as in `lp.Classification`.
        metrics: additional Keras metrics; they get single entries, labels and outputs of
            shape `(batch, units, 1)`. Defaults to none.
        hidden_units: as in `lp.Classification`.

    Raises:
        ValueError: if `units` is below 1, only one of `mean` and `std` is passed, `std` is not
            above 0, or their length differs from `units`.
        TypeError: if metrics are not Keras objects.

    Example:

    >>> import keras_lp as lp
    >>> lp.Regression(units=2, mean=[170.0, 70.0], std=[8.0, 12.0]).units
    2
    """

    missing: ClassVar[float] = float("nan")

    # A property in the base class, a field here.
    units: int = 1
    mean: float | Sequence[float] | None = dataclasses.field(default=None, kw_only=True)
    std: float | Sequence[float] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.units, numbers.Integral) and not isinstance(self.units, bool)
        if not whole or self.units < 1:
            raise ValueError(
                f"Regression needs `units` of 1 or more. Received: units={self.units!r}."
            )
        if self.mean is None and self.std is None:
            return
        try:
            mean, std = (
                np.broadcast_to(np.asarray(values, "float64"), (self.units,))
                for values in (self.mean, self.std)
            )
            fits = bool(np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all())
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                "Regression takes `mean` and `std` (above 0) together, numbers or one per unit for "
                f"its {self.units} units. Received: mean={self.mean!r}, std={self.std!r}."
            )
        object.__setattr__(self, "mean", tuple(mean.tolist()))
        object.__setattr__(self, "std", tuple(std.tolist()))

    def make_loss(self) -> keras.losses.Loss:
        return keras.losses.MeanSquaredError(reduction=REDUCTION)

    def make_metrics(self) -> list[keras.metrics.Metric]:
        return [keras.metrics.MeanAbsoluteError(name="mae"), *self._new_metrics()]

    def mask_missing(self, y: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        return mask_entries(self, y, y_pred, sample_weight)

    def check_labels(self, y: np.ndarray, name: str = "y", steps: int = 0) -> None:
        super().check_labels(y, name)
        if np.isinf(y).any():
            raise ValueError(
                f"Labels of Regression must be finite, or NaN if the label is missing. "
                f"Received: {name} with {np.isinf(y).sum()} infinite values."
            )


def standardize(heads: Mapping[str, Any], batches: Iterable[Any]) -> None:
    """Sets mean and standard deviation of regression heads from labels.

    Args:
        heads: the heads of a model by task. Heads of other tasks, and heads that already have a
            mean and standard deviation, are unchanged.
        batches: batches of labels: arrays, or dicts of arrays by task.
    """
    waiting = {name: head for name, head in heads.items() if is_waiting(head)}
    if not waiting:
        return
    sums = {name: np.zeros((3, head.task.units)) for name, head in waiting.items()}
    shifts: dict[str, np.ndarray] = {}
    for batch in batches:
        labels = batch if isinstance(batch, Mapping) else dict.fromkeys(waiting, batch)
        for name, head in waiting.items():
            if labels.get(name) is None:
                continue
            y = np.asarray(labels[name], "float64").reshape(-1, head.task.units)
            # Shifted by a value near the mean to avoid cancellation of large squares.
            shift = shifts.setdefault(name, _first_present(y))
            y = y - shift
            sums[name] += [(~np.isnan(y)).sum(0), np.nansum(y, 0), np.nansum(y**2, 0)]
    for name, head in waiting.items():
        count, total, squares = sums[name]
        count = np.maximum(count, 1)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        head.mean.assign(mean + shifts.get(name, 0))
        head.std.assign(np.where(std > 0, std, 1))


def label_batches(arguments: Mapping[str, Any]) -> Iterable[Any]:
    """Yields the labels that `fit` trains on with these arguments.

    Yields nothing for data that can be read only once.
    """
    x, y, split = (arguments[name] for name in ("x", "y", "validation_split"))
    if y is not None:
        if split and arguments["validation_data"] is None:
            (y,), _ = train_validation_split((y,), split)
        yield y
    elif isinstance(x, tf.data.Dataset):
        steps = arguments["steps_per_epoch"]
        for batch in x if steps is None else x.take(steps):
            yield batch[1]
    elif isinstance(x, keras.utils.PyDataset) and x.num_batches is not None:
        for i in range(x.num_batches):
            yield x[i][1]


def is_waiting(head: Any) -> bool:
    """Whether a head is to be standardised and has not been yet."""
    task = head.task
    if not isinstance(task, Regression) or task.mean is not None:
        return False
    return bool(not np.any(head.mean) and np.all(np.equal(head.std, 1)))


def _first_present(y: np.ndarray) -> np.ndarray:
    """Returns the first label that is present of each unit, 0 if there is none."""
    rows = np.argmax(~np.isnan(y), axis=0)
    return np.nan_to_num(y[rows, np.arange(y.shape[1])]) if len(y) else np.zeros(y.shape[1])
