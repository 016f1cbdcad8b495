"""How many clients of the running round are done, from the worker to this process.

TFF answers once, when the round is over. So the worker writes the number to a file of each block,
a few times a second at most: a round of less time writes none.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import tensorflow as tf

from keras_lp.federated.engine.workers import on_worker

_SECONDS = 0.2  # between two writes


class ClientsDone:
    """Counts the clients of a round that are done.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def clear(self) -> None:
        """Forgets the round before."""
        for path in self._folder.glob("*.done"):
            path.unlink()

    def read(self) -> int:
        """Returns the number so far."""
        found = 0
        for path in self._folder.glob("*.done"):
            with contextlib.suppress(ValueError, OSError):  # it is being written
                found += int(path.read_text())
        return found

    def write(self, block: tf.Tensor, done: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        """Writes, in a graph, that clients of a block are done; returns when it last did.

        Args:
            block: the number of the block.
            done: how many of its clients are done.
            last: what the call before returned, at first `tf.timestamp()`.
        """
        now = tf.timestamp()

        def write() -> tf.Tensor:
            folder = on_worker(self._folder)
            name = tf.strings.join([f"{folder}/", tf.strings.as_string(block), ".done"])
            with tf.control_dependencies([tf.io.write_file(name, tf.strings.as_string(done))]):
                return tf.identity(now)

        return tf.cond(now - last > _SECONDS, write, lambda: last)
