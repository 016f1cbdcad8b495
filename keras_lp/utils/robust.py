"""Aggregations that a minority of bad clients cannot move far."""

from __future__ import annotations

from typing import Literal

import tensorflow as tf

Aggregation = Literal["mean", "median", "trimmed_mean", "krum"]
BAD = 0.2  # share of the clients that may be bad


def robust_row(rows: tf.Tensor, aggregation: Aggregation) -> tf.Tensor:
    """Returns a robust mean of rows, `(columns,)`.

    Args:
        rows: the update of each client, `(clients, columns)`, at least one.
        aggregation: `"median"`, `"trimmed_mean"` or `"krum"`.
    """
    found = {"median": _median, "trimmed_mean": _trimmed_mean, "krum": _krum}
    return found[aggregation](rows)


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
