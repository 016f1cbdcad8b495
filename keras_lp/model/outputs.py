"""The outputs of a model on data, by task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.model.checks import check_weights
from keras_lp.model.data import batches, check_labels, readable
from keras_lp.model.model import by_task
from keras_lp.tasks.heads import Head

_BATCH = 32  # batch size for arrays, as in `predict`

Piece = Callable[[Head, Any, Any, Any], tuple[np.ndarray, ...]]


def collect(
    model: keras.Model, known: Mapping[str, Head], data: Any, piece: Piece
) -> dict[str, tuple[np.ndarray, ...]]:
    """Returns arrays about all examples by task.

    Args:
        model: a model that keras_lp built.
        known: the heads of the tasks.
        data: the argument `validation_data`.
        piece: function from a head and the labels, outputs and weights of a batch, as
            `mask_missing` returns them, to arrays with a row for each example or label.

    Raises:
        ValueError: if `fit` would reject the data, they have no batch, or outputs are NaN.
    """
    pieces: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in known}
    for x, y, sample_weight in batches(readable(data, "validation_data"), _BATCH):
        check_labels(model, x, y, " of validation_data")
        check_weights(sample_weight, " of validation_data")
        outputs = model.predict_on_batch(x)
        for name, head, labels, output, weight in by_task(model, y, outputs, sample_weight):
            if name not in known:
                continue
            if np.isnan(output).any():
                raise ValueError(
                    f"Outputs must not be NaN. Received: NaN of the task {name!r}. The training "
                    "may have diverged: try a smaller learning rate."
                )
            tensor = tf.convert_to_tensor(output)
            masked = head.task.mask_missing(labels, tensor, weight)
            pieces[name].append(piece(head, *(np.asarray(part, "float64") for part in masked)))
    if not all(pieces.values()):
        raise ValueError("`validation_data` must have a batch. Received: an empty data set.")
    return {
        name: tuple(np.concatenate(parts) for parts in zip(*found, strict=True))
        for name, found in pieces.items()
    }
