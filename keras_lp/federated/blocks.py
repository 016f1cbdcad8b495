"""Blocks: several clients' data as one element of TFF's, which costs the worker less.

TFF has a fixed cost a client value. The clients of a block are trained one after the other on
their own rows, from the same weights; nothing of one reaches another.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.federated.arrays import Arrays, count_examples

# The worker starts a TensorFlow session for each block that runs at once: about 15 ms. TensorFlow
# itself uses the cores within a step.
_BLOCKS = 2
_BYTES = 32 * 2**20  # of a block; a message can hold 2 GiB


@dataclasses.dataclass(frozen=True)
class Work:
    """What one client does in a round.

    Attributes:
        data: its arrays.
        shares: what it weighs in each group of weights.
        seed: two integers for its shuffles and Dropout.
    """

    data: Arrays
    shares: np.ndarray
    seed: np.ndarray


def block_spec(data: Arrays, groups: int) -> Any:
    """Returns the `tf.TensorSpec`s of a block of clients with such arrays."""

    def spec(array: Any) -> tf.TensorSpec:
        return tf.TensorSpec((None, *array.shape[1:]), array.dtype)

    return collections.OrderedDict(
        data=tf.nest.map_structure(spec, data),
        examples=tf.TensorSpec((None,), tf.int32),
        shares=tf.TensorSpec((None, groups), tf.float32),
        seeds=tf.TensorSpec((None, 2), tf.int32),
        positions=tf.TensorSpec((None,), tf.int32),
        learning_rate=tf.TensorSpec((), tf.float32),
    )


def to_blocks(work: Sequence[Work], learning_rate: float) -> list[tf.data.Dataset]:
    """Returns the blocks of a round, each a data set of one element."""
    blocks = []
    for first, last in _cuts(work):
        part = work[first:last]
        element = collections.OrderedDict(
            data=tf.nest.map_structure(
                lambda *arrays: arrays[0] if len(arrays) == 1 else np.concatenate(arrays),
                *(client.data for client in part),
            ),
            examples=np.array([count_examples(client.data) for client in part], "int32"),
            shares=np.stack([client.shares for client in part]),
            seeds=np.stack([client.seed for client in part]),
            positions=np.arange(first, last, dtype="int32"),
            learning_rate=np.float32(learning_rate),
        )
        blocks.append(tf.data.Dataset.from_tensors(element))
    return blocks


def _cuts(work: Sequence[Work]) -> list[tuple[int, int]]:
    """Ranges of neighbouring clients, of about as many examples each."""
    sizes = [sum(array.nbytes for array in tf.nest.flatten(client.data)) for client in work]
    target = min(max(sum(sizes) / _BLOCKS, 1), _BYTES)
    cuts, first, held = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and held + size / 2 > target:
            cuts.append((first, i))
            first, held = i, 0
        held += size
    return [*cuts, (first, len(work))]
