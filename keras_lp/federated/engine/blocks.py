"""Groups several clients into blocks, which TFF processes as one client at a lower cost.

TFF has a fixed cost per client value. The clients of a block train sequentially on their own rows,
each from the same weights and independent of the others. The rows are in files.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.federated.clients.arrays import Arrays, count_examples
from keras_lp.federated.engine.adapters import ALL_RANKS
from keras_lp.federated.engine.files import read_rows, write_rows
from keras_lp.federated.engine.workers import on_worker, remote

# The worker starts a TensorFlow session for each concurrent block, which takes about 15 ms.
# TensorFlow itself uses all cores within a step.
_BLOCKS = 2  # per worker
_BYTES = 32 * 2**20  # per block


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a client in a round.

    Attributes:
        data: its arrays.
        shares: its weight in the mean of each group.
        seed: two integers for shuffling and Dropout.
        personal: its personal values, `(size,)`. Defaults to none.
        rank: the rank of its adapters. Defaults to all.
    """

    data: Arrays
    shares: np.ndarray
    seed: np.ndarray
    personal: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, "float32"))
    rank: int = ALL_RANKS


def rows_spec(data: Arrays) -> Any:
    """Returns the `tf.TensorSpec`s of the rows of clients with arrays like `data`."""
    return tf.nest.map_structure(
        lambda array: tf.TensorSpec((None, *array.shape[1:]), array.dtype), data
    )


def block_spec(groups: int, personal: int = 0) -> Any:
    """Returns the `tf.TensorSpec`s of a block without its rows.

    Args:
        groups: number of groups of weights.
        personal: number of personal values of a client. Defaults to 0.
    """
    return collections.OrderedDict(
        number=tf.TensorSpec((), tf.int32),
        examples=tf.TensorSpec((None,), tf.int32),
        shares=tf.TensorSpec((None, groups), tf.float32),
        seeds=tf.TensorSpec((None, 2), tf.int32),
        personal=tf.TensorSpec((None, personal), tf.float32),
        ranks=tf.TensorSpec((None,), tf.int32),
        positions=tf.TensorSpec((None,), tf.int32),
        learning_rate=tf.TensorSpec((), tf.float32),
        clip=tf.TensorSpec((), tf.float32),
    )


def to_blocks(
    work: Sequence[Work], learning_rate: float, folder: Path, clip: float = math.inf
) -> list[tf.data.Dataset]:
    """Writes the rows of a round and returns its blocks as data sets with one element.

    Args:
        work: the work of each client.
        learning_rate: the learning rate of the round.
        folder: the folder for the rows. Rows of the previous round are overwritten.
        clip: the norm to which the update of each client is clipped. Defaults to infinity.
    """
    blocks = []
    for number, (first, last) in enumerate(_cuts(work)):
        part = work[first:last]
        columns = zip(*(tf.nest.flatten(client.data) for client in part), strict=True)
        for i, arrays in enumerate(columns):
            write_rows(folder / f"{number}.{i}.rows", arrays)
        element = collections.OrderedDict(
            number=np.int32(number),
            examples=np.array([count_examples(client.data) for client in part], "int32"),
            shares=np.stack([client.shares for client in part]),
            seeds=np.stack([client.seed for client in part]),
            personal=np.stack([client.personal for client in part]),
            ranks=np.array([client.rank for client in part], "int32"),
            positions=np.arange(first, last, dtype="int32"),
            learning_rate=np.float32(learning_rate),
            clip=np.float32(clip),
        )
        blocks.append(tf.data.Dataset.from_tensors(element))
    return blocks


def rows_reader(folder: Path, spec: Any) -> Callable[[tf.Tensor], Any]:
    """Returns a function that reads the rows of a block by its number in a graph.

    Args:
        folder: the folder of `to_blocks`.
        spec: the result of `rows_spec`.
    """

    def read(number: tf.Tensor) -> Any:
        name = tf.strings.as_string(number)
        columns = [
            read_rows(tf.strings.join([f"{on_worker(folder)}/", name, f".{i}.rows"]), one)
            for i, one in enumerate(tf.nest.flatten(spec))
        ]
        return tf.nest.pack_sequence_as(spec, columns)

    return read


def _cuts(work: Sequence[Work]) -> list[tuple[int, int]]:
    """Returns ranges of consecutive clients with about equal amounts of data."""
    sizes = [sum(array.nbytes for array in tf.nest.flatten(client.data)) for client in work]
    workers = remote()
    blocks = _BLOCKS * (1 if workers is None else len(workers))
    target = min(max(sum(sizes) / blocks, 1), _BYTES)
    cuts, first, held = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and held + size / 2 > target:
            cuts.append((first, i))
            first, held = i, 0
        held += size
    return [*cuts, (first, len(work))]
