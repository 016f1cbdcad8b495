"""Class weights from labels: `class_weight="balanced"`, and the `class_weight` of `fit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from keras.src.trainers.data_adapters.array_slicing import train_validation_split

from keras_lp.tasks.heads import Head, heads
from keras_lp.tasks.missing import is_soft
from keras_lp.tasks.regression import label_batches
from keras_lp.tasks.task import ClassTask


def waiting_heads(known: Mapping[str, Head]) -> dict[str, Head]:
    """Returns the heads with `class_weight="balanced"` whose weights are not set yet."""
    return {
        name: head
        for name, head in known.items()
        if head.is_balanced and np.all(np.equal(head.class_weight, 1))
    }


def class_sums(head: Head, y: Any) -> Any:
    """Returns the number of labels that are of each class and that are not, `(2, classes)`.

    Args:
        head: the head of a `ClassTask`.
        y: labels in any form that its task takes, a tensor or an array.
    """
    task, rank = head.task, len(head.output.shape)
    y = ops.convert_to_tensor(y)
    shape = tuple(ops.shape(y))
    full = len(shape) == rank and y.shape[-1] == task.units
    outputs = ops.zeros(shape if full else (*shape[: rank - 1], task.units))
    y, outputs, weight = task.mask_missing(y, outputs)
    if len(weight.shape) < rank:  # for class numbers or distributions
        y = y if is_soft(y, outputs) else ops.one_hot(y, task.units)
        weight = weight[..., None]
    y, weight = (ops.reshape(part, (-1, part.shape[-1])) for part in (y, weight))
    y = ops.cast(ops.reshape(y, (-1, task.units)), "float32")
    return ops.stack([ops.sum(weight * y, axis=0), ops.sum(weight * (1 - y), axis=0)])


def balance_classes(known: Mapping[str, Head], batches: Iterable[Any]) -> None:
    """Sets the class weights of these heads from batches of labels."""
    waiting = waiting_heads(known)
    for name, sums in _sums(waiting, batches).items() if waiting else ():
        set_weights(waiting[name], sums)


def set_weights(head: Head, sums: np.ndarray) -> None:
    """Sets the class weights of a head from the sums of `class_sums` over all labels."""
    head.class_weight.assign(_classes(head).balanced_weights(*np.asarray(sums, "float64")))


def check(known: Mapping[str, Head], class_weight: Any) -> None:
    """Raises an error unless these are class weights for the only head of a model."""
    if len(known) > 1:
        raise ValueError(
            "With several tasks, each task needs its own class weights. Received: "
            f"class_weight={class_weight}. Build with lp.Classification(..., class_weight=...)."
        )
    (head,) = known.values()
    if not isinstance(head.task, ClassTask):
        raise ValueError(
            "Class weights need a task with classes. Received: "
            f"class_weight={class_weight} for {type(head.task).__name__}. Weight the examples with "
            "`sample_weight`."
        )
    dataclasses.replace(head.task, class_weight=class_weight)  # raises an error if they do not fit


def resolve(known: Mapping[str, Head], class_weight: Any, batches: Iterable[Any]) -> Any:
    """Returns the class weights of the only head; `"balanced"` computes them from batches."""
    ((name, head),) = known.items()
    given = dataclasses.replace(_classes(head), class_weight=class_weight).class_weight
    if not isinstance(given, str):
        return given
    return _classes(head).balanced_weights(*_sums(known, batches)[name])


def with_class_weight(
    model: keras.Model, arguments: dict[str, Any], class_weight: Any
) -> dict[str, Any]:
    """Returns the arguments of `fit` with class weights converted to sample weights.

    Raises:
        ValueError: if there are several tasks, the task has no classes, or the weights do not
            match its classes.
    """
    known = heads(model)
    check(known, class_weight)
    given = resolve(known, class_weight, label_batches(arguments))
    weigh = _weigher(next(iter(known.values())), given)
    x, y, weight = (arguments[key] for key in ("x", "y", "sample_weight"))
    if isinstance(x, tf.data.Dataset):
        return {**arguments, "x": x.map(weigh, num_parallel_calls=tf.data.AUTOTUNE)}
    if isinstance(x, keras.utils.PyDataset):
        return {**arguments, "x": _Weighted(x, weigh)}
    if y is None:  # a generator
        return {**arguments, "x": (weigh(*batch) for batch in x)}
    validation = arguments["validation_data"]
    if arguments["validation_split"] and validation is None:  # no class weights in validation
        split = arguments["validation_split"]
        (x, y, weight), validation = train_validation_split((x, y, weight), split)
    x, y, weight = weigh(x, y, weight)
    new = {"x": x, "y": y, "sample_weight": weight, "validation_data": validation}
    return {**arguments, **new, "validation_split": 0.0}


def _classes(head: Head) -> ClassTask:
    return cast(ClassTask, head.task)  # see `check`


class _Weighted(keras.utils.PyDataset):
    """A `PyDataset` with sample weights."""

    def __init__(self, data: keras.utils.PyDataset, weigh: Callable[..., Any]) -> None:
        super().__init__(
            workers=data.workers,
            use_multiprocessing=data.use_multiprocessing,
            max_queue_size=data.max_queue_size,
        )
        self._data, self._weigh = data, weigh

    @property
    def num_batches(self) -> int | None:
        return self._data.num_batches

    def __getitem__(self, index: int) -> Any:
        return self._weigh(*self._data[index])

    def on_epoch_begin(self) -> None:
        self._data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._data.on_epoch_end()


def _weigher(head: Head, class_weight: Any) -> Callable[..., Any]:
    """Returns a function `(x, y, sample_weight) -> (x, y, sample_weight)` that adds weights."""
    rank = len(head.output.shape)

    def weigh(x: Any, y: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        labels = ops.convert_to_tensor(y)
        if len(labels.shape) == rank and labels.shape[-1] == 1 and head.task.units > 1:
            labels = labels[..., 0]
        weight = _classes(head).weights_of_labels(labels, class_weight, rank)
        if sample_weight is not None:
            own = ops.cast(sample_weight, "float32")
            if len(own.shape) > len(weight.shape):  # (batch, 1) instead of (batch,)
                own = ops.squeeze(own, -1)
            weight = weight * ops.reshape(
                own, (*ops.shape(own), *[1] * (len(weight.shape) - len(own.shape)))
            )
        return x, y, np.asarray(weight) if tf.executing_eagerly() else weight

    return weigh


def _sums(known: Mapping[str, Head], batches: Iterable[Any]) -> dict[str, np.ndarray]:
    sums = {name: np.zeros((2, head.task.units)) for name, head in known.items()}
    batch = None
    for batch in batches:
        labels = batch if isinstance(batch, Mapping) else dict.fromkeys(known, batch)
        for name, head in known.items():
            if labels.get(name) is not None:
                sums[name] += np.asarray(class_sums(head, labels[name]))
    if batch is None:
        raise ValueError(
            'class_weight="balanced" needs labels that can be read before training. Received: '
            "data that can be read only once. Pass the weights as a dict."
        )
    return sums
