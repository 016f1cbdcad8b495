"""Data that can be read more than once: arrays and finite data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.model import checks
from keras_lp.tasks.heads import tasks
from keras_lp.tasks.task import Task
from keras_lp.utils.interop import plain


def is_arrays(x: Any) -> bool:
    """Whether inputs are arrays or tensors."""
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(
        isinstance(leaf, (np.ndarray, tf.Tensor)) and len(leaf.shape) > 0 for leaf in leaves
    )


def is_batches(x: Any) -> bool:
    """Whether inputs are a finite data set."""
    if isinstance(x, tf.data.Dataset):
        return int(x.cardinality()) != tf.data.INFINITE_CARDINALITY
    return isinstance(x, keras.utils.PyDataset) and x.num_batches is not None


def readable(data: Any, name: str) -> Any:
    """Returns `(x, y)` or `(x, y, sample_weight)` arrays, or the given batches.

    Args:
        data: arrays or array-likes, or a data set. Entries of None are left out.
        name: name of the argument in errors.

    Raises:
        ValueError: if arrays are empty or differ in length.
        TypeError: if `data` is anything else, such as an infinite data set.
    """
    data = plain(data)
    if is_batches(data):
        return data
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise TypeError(
            f"`{name}` must be (x, y) or (x, y, sample_weight) arrays, or a finite batched "
            f"tf.data.Dataset or PyDataset. Received: {name} of type {type(data).__name__}. Limit "
            "a data set that repeats with `.take(n)`; convert the output of a generator to arrays."
        )
    x, *labels = data
    parts = (
        keras.tree.map_structure(_as_array, x),
        *(_by_task(part) for part in labels if part is not None),
    )
    shapes = [tuple(leaf.shape) for leaf in keras.tree.flatten(parts)]
    counts = {shape[:1] for shape in shapes}
    if not is_arrays(parts[0]) or len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(
            f"The arrays of `{name}` must have the same number of examples, at least one. "
            f"Received: arrays of the shapes {shapes[:5]}."
        )
    return parts


def batches(data: Any, size: int) -> Iterator[tuple[Any, Any, Any]]:
    """Yields `(x, y, sample_weight)`; the last two are None if they are absent.

    Args:
        data: output of `readable`.
        size: batch size for arrays; data sets have their own.
    """
    if isinstance(data, tuple):
        for start in range(0, len(keras.tree.flatten(data)[0]), size):
            rows = slice(start, start + size)
            part = keras.tree.map_structure(lambda leaf, rows=rows: leaf[rows], data)
            yield keras.utils.unpack_x_y_sample_weight(part)
        return
    is_sequence = isinstance(data, keras.utils.PyDataset)
    for batch in (data[i] for i in range(data.num_batches)) if is_sequence else data:
        yield keras.utils.unpack_x_y_sample_weight(batch)


def check_labels(model: keras.Model, x: Any, y: Any, where: str = "") -> None:
    """Raises an error if the tasks of a model cannot learn from these arrays.

    Args:
        model: the model.
        x: inputs.
        y: labels, None if there are none.
        where: text that errors append to the argument's name.
    """
    if y is None:
        return
    if isinstance(model.output, Mapping):
        checks.check_label_names(tasks(model), y, where)
    checks.check_examples(model, x, y, where)


def checked(model: keras.Model, data: Any, where: str = "") -> Any:
    """Returns data with checked labels, in which class names are replaced by numbers.

    Args:
        model: the model.
        data: arrays `(x, y, ...)`, which are checked at once; a `tf.data.Dataset`, whose batches
            are checked as they are read; anything else is returned unchanged.
        where: text that errors append to the argument's name. Defaults to an empty string.
    """
    if isinstance(data, tf.data.Dataset):
        return checks.checked_dataset(model, data)
    if isinstance(data, (tuple, list)) and len(data) > 1:
        x, y, *rest = data
        check_labels(model, x, y, where)
        weights = (as_weights(model, y, part, where) for part in rest)
        return (x, as_numbers(model, y, where), *weights)
    return data


def as_weights(model: keras.Model, y: Any, weights: Any, where: str = "") -> Any:
    """Checks sample weights and returns them in the form that Keras takes.

    Args:
        model: the model.
        y: labels: arrays, or a dict of arrays by task.
        weights: an array, a dict of arrays by task, or None. A task of `y` that is not in the
            dict gets weights of 1.
        where: text that errors append to the argument's name.

    Raises:
        ValueError: if weights are below 0 or not finite, a task is unknown, or weights of several
            tasks are a list.
    """
    checks.check_weights(weights, where)
    if not isinstance(y, Mapping) or not tasks(model) or weights is None:
        return weights
    if isinstance(weights, (list, tuple)) and all(np.ndim(one) > 0 for one in weights):
        raise ValueError(
            f"Sample weights must be an array for all tasks, or a dict by task. Received: "
            f"sample_weight{where}, a list of {len(weights)} arrays."
        )
    if not isinstance(weights, Mapping):
        return weights
    checks.check_label_names(tasks(model), weights, where, "sample_weight")
    return {
        name: weights[name] if name in weights else np.ones(len(labels), "float32")
        for name, labels in y.items()
    }


def as_numbers(model: keras.Model, y: Any, where: str = "") -> Any:
    """Returns arrays of labels with class numbers instead of names; anything else unchanged.

    Args:
        model: the model.
        y: labels, or a dict of labels by task.
        where: text that errors append to the argument's name.
    """
    known = tasks(model)
    if isinstance(y, Mapping):
        return {
            name: _to_numbers(known.get(name), labels, f"y[{name!r}]{where}")
            for name, labels in y.items()
        }
    return _to_numbers(next(iter(known.values()), None), y, f"y{where}")


def with_numbers(model: keras.Model, data: Any) -> Any:
    """Returns `(x, y, ...)` arrays, or a data set of them, with class numbers instead of names."""
    if isinstance(data, tf.data.Dataset):
        return data.map(
            lambda x, y, *rest: (x, checks.label_numbers(tasks(model), y), *rest),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
    if isinstance(data, (tuple, list)) and len(data) > 1:
        return (data[0], as_numbers(model, data[1]), *data[2:])
    return data


def _to_numbers(task: Task | None, y: Any, name: str) -> Any:
    if isinstance(y, (list, tuple)) and y and isinstance(y[0], str):
        y = np.asarray(y)
    return task.to_numbers(y, name) if task is not None and isinstance(y, np.ndarray) else y


def _by_task(part: Any) -> Any:
    """Returns labels or weights as an array or a dict of arrays; lists become arrays."""
    if isinstance(part, Mapping):
        return {name: _as_array(own) for name, own in part.items() if own is not None}
    return _as_array(part)


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, tf.Tensor) else np.asarray(leaf)
