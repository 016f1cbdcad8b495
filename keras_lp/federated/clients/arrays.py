"""Reads data as arrays: `(x, y)`, `(x, y, sample_weight)` or an unbatched data set."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.utils.interop import plain

# (x, y), or (x, y, sample_weight)
Arrays = tuple[Any, ...]


def as_arrays(data: Any, what: str, model: keras.Model | None = None) -> Arrays:
    """Returns data as arrays. Dicts are sorted by name, as TFF requires.

    Examples of different lengths become arrays of dtype object with one array per example.

    Args:
        data: a tuple of arrays or pandas columns, an unbatched `tf.data.Dataset`, or a Grain
            loader of examples.
        what: the owner of the data, for errors.
        model: the model, see `check_unbatched`.

    Raises:
        ValueError: the data set is batched or endless, or does not yield pairs.
        TypeError: `data` is neither a tuple of two or three nor a data set.
    """
    data = plain(data, batched=False)
    if isinstance(data, tf.data.Dataset):
        check_unbatched(data, what, model)
        return _read(data)
    if isinstance(data, (tuple, list)) and len(data) in (2, 3):
        return tuple(_sorted(part) for part in data if part is not None)
    raise TypeError(
        f"The data of {what} must be a pair (x, y) of arrays, optionally with a sample_weight, "
        "or an unbatched tf.data.Dataset of such pairs. Received: "
        f"{type(data).__name__}."
    )


def check_unbatched(data: tf.data.Dataset, what: str, model: keras.Model | None = None) -> None:
    """Raises `ValueError` unless a data set yields single examples `(x, y)` and ends.

    Args:
        data: the data set.
        what: the owner of the data, for errors.
        model: the model; the ranks of its inputs distinguish batches from examples. Defaults to
            None: a data set is batched if the first dimension of all its parts is None.
    """
    spec = data.element_spec
    if not (isinstance(spec, tuple) and len(spec) in (2, 3)):
        raise ValueError(
            f"The data set of {what} must yield pairs (x, y). Received: element_spec={spec}. "
            "Turn its elements into pairs with `dataset.map(...)`."
        )
    if _gives_batches(spec, model):
        raise ValueError(
            f"The data set of {what} must yield single examples. Received: a batched data set, "
            f"element_spec={spec}. Use `dataset.unbatch()`."
        )
    if data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            f"The data set of {what} must be finite. Received: an endless data set. Remove "
            "`repeat()`; `local_epochs` sets the number of passes over the data of a client."
        )


def is_ragged(array: np.ndarray) -> bool:
    """Whether an array consists of one array per example, with different shapes."""
    return array.dtype == object and array.size > 0 and isinstance(array.flat[0], np.ndarray)


def count_examples(data: Arrays, where: str = "") -> int:
    """Returns the number of examples; raises `ValueError` if the arrays differ in length."""
    sizes = {len(array) for array in tf.nest.flatten(data)}
    if len(sizes) > 1:
        raise ValueError(
            "Inputs and labels must have the same length. Received: arrays of the lengths "
            f"{sorted(sizes)}{where}. Pass one label per example."
        )
    return sizes.pop()


def class_of(y: np.ndarray) -> np.ndarray | None:
    """Returns the class of each label: numbers and names unchanged, or the most probable class.

    Returns None for other labels, such as floats that are not distributions.
    """
    if y.ndim > 1 and y.shape[-1] == 1:
        y = y[..., 0]
    if y.ndim == 2 and (y.dtype.kind in "fiub"):
        rows = y.astype("float64")
        missing = ~(rows >= 0).all(-1)
        if (missing | (np.abs(rows.sum(-1) - 1) < 1e-3)).all():
            return np.where(missing, -1, rows.argmax(-1))
    return y if y.dtype.kind in "iubOSU" else None


def _gives_batches(spec: Any, model: keras.Model | None) -> bool:
    if model is not None:
        inputs = tf.nest.flatten(spec[0])
        if len(inputs) == len(model.inputs):
            pairs = zip(inputs, model.inputs, strict=True)
            return all(leaf.shape.rank == len(tensor.shape) for leaf, tensor in pairs)
    return all(leaf.shape.rank and leaf.shape[0] is None for leaf in tf.nest.flatten(spec))


def _sorted(part: Any) -> Any:
    if isinstance(part, Mapping):
        return collections.OrderedDict((name, _array(part[name])) for name in sorted(part))
    listed = isinstance(part, (tuple, list)) and len(part) > 0
    if listed and all(len(getattr(one, "shape", ())) > 0 for one in part):
        return tuple(_array(one) for one in part)
    return _array(part)


def _array(values: Any) -> np.ndarray:
    """Returns an array, with dtype object if examples have different lengths."""
    if isinstance(values, tf.RaggedTensor):
        values = [row.to_tensor() if isinstance(row, tf.RaggedTensor) else row for row in values]
        return _stacked(*map(np.asarray, values))
    if isinstance(values, (tuple, list)) and values and not np.isscalar(values[0]):
        return _stacked(*map(np.asarray, values))
    return np.asarray(values)


def _stacked(*examples: np.ndarray) -> np.ndarray:
    if len({example.shape for example in examples}) <= 1:
        return np.stack(examples)
    stacked = np.empty(len(examples), object)
    stacked[:] = examples
    return stacked


def _read(data: tf.data.Dataset) -> Arrays:
    examples = list(data.as_numpy_iterator())
    if not examples:
        empty = tf.nest.map_structure(lambda leaf: np.zeros((0, *leaf.shape)), data.element_spec)
        return tuple(_sorted(part) for part in empty)
    flat = zip(*map(tf.nest.flatten, examples), strict=True)
    stacked = [_stacked(*map(np.asarray, leaves)) for leaves in flat]
    return tuple(_sorted(part) for part in tf.nest.pack_sequence_as(examples[0], stacked))
