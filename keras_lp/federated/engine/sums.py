"""Sums a function over the examples of clients with TFF."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.federated import tff_runtime
from keras_lp.federated.clients.arrays import Arrays
from keras_lp.federated.engine import tff_model
from keras_lp.federated.engine.blocks import Work, block_spec, rows_reader, rows_spec, to_blocks


class Sums:
    """Sums functions over the data of clients.

    Args:
        data: the arrays of each client.
        folder: the folder for the rows of the data.

    Attributes:
        read_rows: a function that reads the rows of a block in a graph.
    """

    def __init__(self, data: Sequence[Arrays], folder: Path) -> None:
        self._folder = folder
        unused = np.zeros(1, "float32"), np.zeros(2, "int32")  # shares and seed
        self._blocks = to_blocks([Work(arrays, *unused) for arrays in data], 0.0, folder)
        self.read_rows = rows_reader(folder, rows_spec(data[0]))
        self._function: Any = None
        self._computation: Any = None

    def here(self, function: Callable[..., Any]) -> Any:
        """Returns the sums of a function over all clients, computed in this process."""
        run = tf.function(function, autograph=False)
        parts = [run((), block.get_single_element()) for block in self._blocks]
        return tf.nest.map_structure(lambda *one: np.sum(one, axis=0), *parts)

    def add_up(self, function: Callable[..., Any], weights: tuple[np.ndarray, ...] = ()) -> Any:
        """Returns the sums of a function over all clients as arrays.

        Args:
            function: `(weights, block) -> sums`. Repeated calls with the same function are fast.
            weights: the weights that are sent to the clients.
        """
        if function is not self._function:
            specs = [tf.TensorSpec(array.shape, array.dtype) for array in weights]
            tff = tff_runtime.load_tff()
            self._computation = tff_model.build_sum(tff, specs, block_spec(1), function)
            self._function = function
        call = functools.partial(self._computation, weights, self._blocks)
        sums = tff_runtime.call(call, self._folder, len(self._blocks))
        return tf.nest.map_structure(np.asarray, sums)
