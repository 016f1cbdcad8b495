"""Stores tensors in files that the worker reads, so that they are not part of TFF messages.

A message is copied several times on both sides, and TFF and its worker run on the same machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.utils.files import named_errors

# Types that are stored as raw bytes. Other types (strings) are serialized.
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
    """Reads a tensor of `write_tensor` in a graph."""
    tensor = tf.io.parse_tensor(tf.io.read_file(path), spec.dtype)
    return tf.ensure_shape(tensor, spec.shape)


def write_rows(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Writes the concatenated rows of arrays."""
    if tf.as_dtype(arrays[0].dtype) not in _RAW:
        write_tensor(path, np.concatenate(arrays))
        return
    # Not `tofile`, which does not report an error if the disk is full at the last bytes.
    with named_errors(path), path.open("wb") as file:
        for array in arrays:
            file.write(np.ascontiguousarray(array).reshape(-1).view("uint8").data)


def read_rows(path: str | tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
    """Reads the rows of `write_rows` in a graph."""
    if spec.dtype not in _RAW:
        return read_tensor(path, spec)
    return tf.reshape(tf.io.decode_raw(tf.io.read_file(path), spec.dtype), [-1, *spec.shape[1:]])
