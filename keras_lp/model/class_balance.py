"""Weights of classes from the labels: `class_weight="balanced"`, and that of `fit`."""

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
    """Returns the heads whose classes are to be balanced and are not yet."""
    return {
        name: head
        for name, head in known.items()
        if head.is_balanced and np.all(np.equal(head.class_weight, 1))
    }


def class_sums(head: Head, y: Any) -> Any:
    """Returns how many labels are of each class and how many are not, `(2, classes)`.

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
    if len(weight.shape) < rank:  # of class numbers or distributions
        y = y if is_soft(y, outputs) else ops.one_hot(y, task.units)
        weight = weight[..., None]
    y, weight = (ops.reshape(part, (-1, part.shape[-1])) for part in (y, weight))
    y = ops.cast(ops.reshape(y, (-1, task.units)), "float32")
    return ops.stack([ops.sum(weight * y, axis=0), ops.sum(weight * (1 - y), axis=0)])


def balance_classes(known: Mapping[str, Head], batches: Iterable[Any]) -> None:
    """Sets the weights of the classes of heads that wait for them, from batches of labels."""
    waiting = waiting_heads(known)
    for name, sums in _sums(waiting, batches).items() if waiting else ():
        set_weights(waiting[name], sums)


def set_weights(head: Head, sums: np.ndarray) -> None:
    """Sets the weights of the classes of a head from what `class_sums` gave for all labels."""
    head.class_weight.assign(_classes(head).balanced_weights(*np.asarray(sums, "float64")))


def check(known: Mapping[str, Head], class_weight: Any) -> None:
    """Raises unless these are weights of the classes of the one head of a model."""
    if len(known) > 1:
        raise ValueError(
            "Weights of classes belong to a task where there are several. Received: "
            f"class_weight={class_weight}. Build with lp.Classification(..., class_weight=...)."
        )
    (head,) = known.values()
    if not isinstance(head.task, ClassTask):
        raise ValueError(
            "Weights of classes need a task with classes. Received: "
            f"class_weight={class_weight} for {type(head.task).__name__}. Weigh the examples with "
            "`sample_weight`."
        )
    dataclasses.replace(head.task, class_weight=class_weight)  # raises if they do not fit


def resolve(known: Mapping[str, Head], class_weight: Any, batches: Iterable[Any]) -> Any:
    """Returns the weight of each class of the one head; `"balanced"` by batches of labels."""
    ((name, head),) = known.items()
    given = dataclasses.replace(_classes(head), class_weight=class_weight).class_weight
    if not isinstance(given, str):
        return given
    return _classes(head).balanced_weights(*_sums(known, batches)[name])


def with_class_weight(
    model: keras.Model, arguments: dict[str, Any], class_weight: Any
) -> dict[str, Any]:
    """Returns the arguments of `fit` with the weights of classes as those of examples.

    Raises:
        ValueError: several tasks, a task without classes, or weights that are not of its classes.
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
    if arguments["validation_split"] and validation is None:  # not weighed by class
        split = arguments["validation_split"]
        (x, y, weight), validation = train_validation_split((x, y, weight), split)
    x, y, weight = weigh(x, y, weight)
    new = {"x": x, "y": y, "sample_weight": weight, "validation_data": validation}
    return {**arguments, **new, "validation_split": 0.0}


def _classes(head: Head) -> ClassTask:
    return cast(ClassTask, head.task)  # see `check`


class _Weighted(keras.utils.PyDataset):
    """A `PyDataset` with weights of examples."""

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
    """Returns what gives a batch weights: `(x, y, sample_weight) -> (x, y, sample_weight)`."""
    rank = len(head.output.shape)

    def weigh(x: Any, y: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        labels = ops.convert_to_tensor(y)
        if len(labels.shape) == rank and labels.shape[-1] == 1 and head.task.units > 1:
            labels = labels[..., 0]
        weight = _classes(head).weights_of_labels(labels, class_weight, rank)
        if sample_weight is not None:
            own = ops.cast(sample_weight, "float32")
            if len(own.shape) > len(weight.shape):  # (batch, 1) for (batch,)
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
            "data that can be read only once. Give the weights as a dict."
        )
    return sums
