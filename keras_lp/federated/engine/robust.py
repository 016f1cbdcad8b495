"""Aggregations that a minority of bad clients cannot move far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import tensorflow as tf

from keras_lp.federated.engine.compression import unflatten

Aggregation = Literal["mean", "median", "trimmed_mean", "krum"]
BAD = 0.2  # share of the clients that may be bad


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
    found = {"median": _median, "trimmed_mean": _trimmed_mean, "krum": _krum}[aggregation](rows)
    return unflatten(found, [tf.TensorSpec(one.shape[1:], one.dtype) for one in updates])


def _median(rows: tf.Tensor) -> tf.Tensor:
    count = tf.shape(rows)[0]
    ordered = tf.sort(rows, axis=0)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def _trimmed_mean(rows: tf.Tensor) -> tf.Tensor:
    count = tf.shape(rows)[0]
    bad = _bad(count)
    return tf.reduce_mean(tf.sort(rows, axis=0)[bad : count - bad], axis=0)


def _krum(rows: tf.Tensor) -> tf.Tensor:
    """Returns the update with the smallest sum of squared distances to its neighbours."""
    count = tf.shape(rows)[0]
    squares = tf.reduce_sum(rows**2, 1)
    distances = squares[:, None] + squares - 2 * rows @ tf.transpose(rows)
    neighbours = tf.maximum(count - _bad(count) - 2, 1)
    ordered = tf.sort(distances, axis=1)[:, 1 : 1 + neighbours]  # the first is its own
    return rows[tf.argmin(tf.reduce_sum(ordered, 1))]


def _bad(count: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.floor(BAD * tf.cast(count, tf.float32) + 1e-4), tf.int32)
