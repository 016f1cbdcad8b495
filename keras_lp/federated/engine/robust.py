"""Robust means of the updates of clients, in the shapes of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from keras_lp.federated.engine.compression import unflatten
from keras_lp.utils.robust import Aggregation, robust_row


def robust_mean(
    updates: Sequence[tf.Tensor], present: tf.Tensor, aggregation: Aggregation
) -> list[tf.Tensor]:
    """Returns a robust mean of the updates of clients, NaN if there is none.

    Args:
        updates: the updates of all clients, an array `(clients, ...)` for each weight.
        present: whether the update of each client counts, `(clients,)`.
        aggregation: `"median"`, `"trimmed_mean"` or `"krum"`.
    """
    flat = tf.concat(
        [tf.reshape(tf.cast(one, tf.float32), [one.shape[0], -1]) for one in updates], 1
    )
    rows = tf.boolean_mask(flat, present)
    nothing = tf.fill([1, flat.shape[1]], float("nan"))
    rows = tf.cond(tf.shape(rows)[0] > 0, lambda: rows, lambda: nothing)
    found = robust_row(rows, aggregation)
    return unflatten(found, [tf.TensorSpec(one.shape[1:], one.dtype) for one in updates])
