"""Data of pandas and Grain in the forms of NumPy and `tf.data`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

HUGGING_FACE = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
_LOADERS = ("MapDataset", "IterDataset", "DataLoader", "DatasetIterator")
_COLUMNS = ("Series", "Index")


def plain(data: Any, *, batched: bool = True) -> Any:
    """Returns data in the forms of NumPy and `tf.data`.

    Args:
        data: `(x, labels)` or `(x, labels, sample_weight)`, in which pandas columns become arrays;
            a Grain loader, which becomes a `tf.data.Dataset`; anything else is returned unchanged.
        batched: whether a Grain loader yields batches. Defaults to True.

    Raises:
        TypeError: for a `Dataset` of Hugging Face, which does not tell inputs from labels.
    """
    if is_instance(data, "grain", _LOADERS):
        return _from_grain(data, batched)
    if is_instance(data, "datasets", HUGGING_FACE):
        raise TypeError(
            "A data set of Hugging Face must be loaded first, so that inputs and labels are known. "
            f"Received: {type(data).__name__}. Pass `lp.load_dataset(dataset)`, which yields "
            "(input, labels)."
        )
    if isinstance(data, (tuple, list)) and len(data) in (2, 3):
        return (plain_inputs(data[0]), *map(plain_labels, data[1:]))
    return data


def plain_parts(x: Any, y: Any = None, sample_weight: Any = None) -> tuple[Any, Any, Any]:
    """Returns the arguments of `fit` in the forms of NumPy and `tf.data`."""
    x = plain_inputs(x if isinstance(x, (tuple, list)) else plain(x))
    return x, plain_labels(y), plain_labels(sample_weight)


def plain_inputs(x: Any) -> Any:
    """Returns inputs with pandas columns as arrays; a `DataFrame` is one array of its columns."""
    if _is_frame(x):
        return _matrix(x)
    if isinstance(x, Mapping):
        return {name: plain_inputs(part) for name, part in x.items()}
    return _column(x) if is_instance(x, "pandas", _COLUMNS) else x


def plain_labels(y: Any) -> Any:
    """Returns labels or weights with pandas columns as arrays; a `DataFrame` is a dict by task."""
    if _is_frame(y) or isinstance(y, Mapping):
        return {name: plain_labels(y[name]) for name in y}
    return _column(y) if is_instance(y, "pandas", _COLUMNS) else y


def without_column(x: Any, name: str) -> tuple[Any, Any]:
    """Returns a `DataFrame` without a column, and the column.

    Raises:
        ValueError: if there is no such column.
    """
    if not _is_frame(x) or name not in x:
        received = f"a DataFrame with {list(x)}" if _is_frame(x) else type(x).__name__
        raise ValueError(
            "A name in `by` must be a column of the inputs, a pandas DataFrame. Received: "
            f"by={name!r} for {received}. Pass an array with the key of each example."
        )
    return x.drop(columns=name), x[name]


def is_instance(data: Any, package: str, names: Sequence[str]) -> bool:
    """Whether an object is of one of some classes of a package, which is not imported for it."""
    module = sys.modules.get(package)
    kinds = tuple(getattr(module, name) for name in names if hasattr(module, name))
    return isinstance(data, kinds)


def _is_frame(data: Any) -> bool:
    return is_instance(data, "pandas", ["DataFrame"])


def _column(values: Any) -> np.ndarray:
    """Returns a `Series` or `Index` as an array; absent texts are empty, absent numbers NaN."""
    array = values.to_numpy()
    if array.dtype.kind in "biuf":
        return array
    absent = np.asarray(values.isna())
    if not absent.any() and isinstance(array[0], (list, tuple, np.ndarray)):
        return np.stack([np.asarray(cell) for cell in array])
    if absent.all() or isinstance(array[~absent][0], (str, bytes)):
        return np.where(absent, "", array.astype(object))
    kind = np.asarray(array[~absent].tolist()).dtype
    if kind.kind not in "biuf":
        return array
    return values.to_numpy(dtype="float64", na_value=np.nan) if absent.any() else array.astype(kind)


def _matrix(frame: Any) -> np.ndarray:
    if not frame.columns.is_unique:
        raise ValueError(
            "The columns of a DataFrame must have different names. Received: "
            f"{list(frame.columns)[:10]}."
        )
    columns = {name: _column(frame[name]) for name in frame}
    texts = [name for name, values in columns.items() if values.dtype.kind not in "biuf"]
    if texts and len(columns) > 1:
        raise TypeError(
            "The columns of one input must be numbers. Received: a DataFrame with the columns "
            f"{texts} that are not. Leave them out, encode them, or pass a dict of columns by "
            "input."
        )
    return np.stack(list(columns.values()), axis=1)


def _from_grain(data: Any, batched: bool) -> tf.data.Dataset:
    """Returns a `tf.data.Dataset` of a `MapDataset`, an `IterDataset` or a `DataLoader`."""
    if iter(data) is data:
        raise TypeError(
            "A loader must be readable more than once. Received: an iterator of type "
            f"{type(data).__name__}. Pass the data set that it reads."
        )
    first = next(iter(data), None)
    if first is None:
        raise ValueError(
            f"A data set must have an element. Received: {type(data).__name__} without any."
        )

    def spec(leaf: Any) -> tf.TensorSpec:
        array = np.asarray(leaf)
        shape = (None, *array.shape[1:]) if batched else array.shape
        return tf.TensorSpec(shape, tf.as_dtype(array.dtype))

    def as_tuple(element: Any) -> Any:
        return tuple(element) if isinstance(element, list) else element

    signature = tf.nest.map_structure(spec, as_tuple(first))
    dataset = tf.data.Dataset.from_generator(
        lambda: map(as_tuple, data), output_signature=signature
    )
    count = len(data) if hasattr(data, "__len__") else None
    if count is None and not batched:  # those who take examples need their number
        count = sum(1 for _ in data)
    if count is None:
        return dataset.prefetch(tf.data.AUTOTUNE)
    if count >= _ENDLESS:
        return dataset.repeat()
    return dataset.apply(tf.data.experimental.assert_cardinality(count)).prefetch(tf.data.AUTOTUNE)


_ENDLESS = 2**40  # a MapDataset that repeats has a length near 2**63, its batches less
