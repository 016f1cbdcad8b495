"""Tensors in files: the worker reads them there, so they stay out of TFF's messages.

A message costs several copies on either side; TFF and its worker run on one machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.utils.files import named_errors

# What a file can hold as it is in memory; anything else (strings) is serialized.
_RAW = (
    tf.bool, tf.uint8, tf.uint16, tf.int8, tf.int16, tf.int32, tf.int64,
    tf.float16, tf.float32, tf.float64,
)  # fmt: skip


def write_tensor(path: Path, value: Any) -> None:
    """Writes an array or a variable."""
    content = tf.io.serialize_tensor(tf.convert_to_tensor(value)).numpy()
    with named_errors(path), path.open("wb") as file:
        file.write(content)


def read_tensor(path: str | tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
    """Returns, in a graph, what `write_tensor` wrote."""
    tensor = tf.io.parse_tensor(tf.io.read_file(path), spec.dtype)
    return tf.ensure_shape(tensor, spec.shape)


def write_rows(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Writes the rows of arrays one after the other."""
    if tf.as_dtype(arrays[0].dtype) not in _RAW:
        write_tensor(path, np.concatenate(arrays))
        return
    # Not `tofile`, which does not notice where the last bytes find no room.
    with named_errors(path), path.open("wb") as file:
        for array in arrays:
            file.write(np.ascontiguousarray(array).reshape(-1).view("uint8").data)


def read_rows(path: str | tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
    """Returns, in a graph, what `write_rows` wrote."""
    if spec.dtype not in _RAW:
        return read_tensor(path, spec)
    return tf.reshape(tf.io.decode_raw(tf.io.read_file(path), spec.dtype), [-1, *spec.shape[1:]])
