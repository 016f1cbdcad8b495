"""Data that a function takes in any of the forms of `fit`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.caching import is_arrays, is_batches

SIZE = 256  # of the batches that arrays become


def checked_data(data: Any, name: str) -> Any:
    """Returns data that can be read more than once; arrays for what becomes an array.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` arrays, a finite `tf.data.Dataset` or a
            `PyDataset`.
        name: how errors call it.

    Raises:
        ValueError: arrays of different lengths, or of none.
        TypeError: anything else.
    """
    if isinstance(data, (tuple, list)) and len(data) in (2, 3):
        parts = [keras.tree.map_structure(_as_array, part) for part in data if part is not None]
        shapes = [np.shape(leaf) for leaf in keras.tree.flatten(parts)]
        counts = {shape[:1] for shape in shapes}
        if not is_arrays(parts[0]) or len(counts) != 1 or counts & {(), (0,)}:
            raise ValueError(
                f"The arrays of `{name}` must have as many examples each, at least one. Received: "
                f"arrays of the shapes {shapes[:5]}."
            )
        return tuple(parts)
    if is_batches(data):
        return data
    raise TypeError(
        f"`{name}` must be (x, y) or (x, y, sample_weight) arrays, or a finite batched "
        f"tf.data.Dataset or PyDataset. Received: {name} of type {type(data).__name__}. Limit a "
        "data set that repeats with `.take(n)`; make arrays of what a generator gives."
    )


def as_batches(data: Any, name: str) -> Iterator[tuple[Any, Any, Any]]:
    """Yields batches `(x, y, sample_weight)` of data in one of the forms of `checked_data`."""
    data = checked_data(data, name)
    if isinstance(data, tuple):
        count = len(keras.tree.flatten(data[0])[0])
        batches = (
            keras.tree.map_structure(lambda part, i=i: part[i : i + SIZE], data)
            for i in range(0, count, SIZE)
        )
    elif isinstance(data, tf.data.Dataset):
        batches = iter(data)
    else:
        batches = (data[i] for i in range(data.num_batches))
    for batch in batches:
        yield (*batch, None)[:3]


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, tf.Tensor) else np.asarray(leaf)
