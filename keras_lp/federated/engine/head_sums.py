"""TensorFlow functions that compute the sums over examples that clients send to solve heads.

The rows of all clients of a block are in one array, so a sum over it is the sum over the clients.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.backbones import features
from keras_lp.model import class_balance
from keras_lp.tasks.heads import Head
from keras_lp.tasks.regression import Regression

# With more columns, the matrix of their products is too large to send.
PRODUCT_COLUMNS = 512

# Kernel, bias, kernel, bias, ... of the heads in float64, because differences of losses near the
# optimum are below the precision of float32.
Weights = tuple[Any, ...]


def moments(
    heads: Mapping[str, Head], read_rows: Callable[[tf.Tensor], Any]
) -> Callable[[Weights, Any], Any]:
    """Returns a function that sums features and labels: `((), block) -> sums`.

    The sums are the `count` of examples; the `total` `(columns,)` of the features; their
    `products` `(columns, columns)`, or only the squares `(columns,)` for more than 512 columns;
    and in `labels`, for each `Regression` head, the count, total and squares `(3, units)` of the
    labels that are present.
    """

    def add_up(_: Weights, block: Any) -> Any:
        x, y, _ = _unpack(read_rows(block["number"]))
        wide = x.shape[-1] > PRODUCT_COLUMNS
        return collections.OrderedDict(
            count=tf.cast(tf.shape(x)[0], tf.float64),
            total=tf.reduce_sum(x, 0),
            products=tf.reduce_sum(x**2, 0) if wide else tf.matmul(x, x, transpose_a=True),
            labels=collections.OrderedDict(
                (name, _label_sums(_of_task(y, name), head.task.units))
                for name, head in heads.items()
                if isinstance(head.task, Regression)
            ),
        )

    return add_up


def feature_moments(read_rows: Callable[[tf.Tensor], Any]) -> Callable[[Weights, Any], Any]:
    """Returns a function that sums finite features and their squares: `((), block) -> sums`.

    The names are those of `moments`. Each step of a sequence counts as an example.
    """

    def add_up(_: Weights, block: Any) -> Any:
        x = _unpack(read_rows(block["number"]))[0]
        x = tf.reshape(x, [-1, x.shape[-1]])
        x = tf.boolean_mask(x, tf.reduce_all(tf.math.is_finite(x), -1))
        return collections.OrderedDict(
            count=tf.cast(tf.shape(x)[0], tf.float64),
            total=tf.reduce_sum(x, 0),
            products=tf.reduce_sum(x**2, 0),
        )

    return add_up


def class_sums(
    heads: Mapping[str, Head], read_rows: Callable[[tf.Tensor], Any]
) -> Callable[[Weights, Any], Any]:
    """Returns a function that counts labels by class: `((), block) -> sums`.

    The sums are `(2, classes)` per head: the number of labels in each class and not in it.
    """

    def add_up(_: Weights, block: Any) -> Any:
        _, y, *_ = read_rows(block["number"])
        return collections.OrderedDict(
            (name, class_balance.class_sums(head, _of_task(y, name)))
            for name, head in heads.items()
        )

    return add_up


def losses(
    heads: Mapping[str, Head],
    scales: Mapping[str, tuple[np.ndarray, np.ndarray]],
    read_rows: Callable[[tf.Tensor], Any],
) -> Callable[[Weights, Any], Any]:
    """Returns a function that sums losses and gradients: `(weights, block) -> sums`.

    The sums are, for each head, the weighted `loss`, the `weight` of the labels, and the gradients
    of the loss with respect to `kernel` and `bias`.

    Args:
        heads: the heads by name.
        scales: mean and standard deviation of the labels of each `Regression` head, by name.
        read_rows: the result of `blocks.rows_reader`.
    """

    # As constants, because clients have no variables of the server.
    class_weights = {
        name: np.asarray(head.class_weight) if head.is_balanced else None
        for name, head in heads.items()
    }

    def add_up(weights: Weights, block: Any) -> Any:
        x, y, sample_weight = _unpack(read_rows(block["number"]))
        pairs = zip(weights[::2], weights[1::2], strict=True)
        return collections.OrderedDict(
            (
                name,
                _head_sums(head, scales.get(name), class_weights[name], pair, x, y, sample_weight),
            )
            for (name, head), pair in zip(heads.items(), pairs, strict=True)
        )

    return add_up


def _head_sums(
    head: Head,
    scale: Any,
    class_weight: Any,
    pair: Sequence[tf.Tensor],
    x: tf.Tensor,
    y: Any,
    sample_weight: Any,
) -> Any:
    kernel, bias = pair
    mean, std = scale or (0.0, 1.0)
    y, sample_weight = (_of_task(part, head.name) for part in (y, sample_weight))
    with tf.GradientTape() as tape:
        tape.watch((kernel, bias))
        outputs = tf.matmul(x, kernel) + bias
        standard = y if scale is None else (tf.cast(y, tf.float64) - mean) / std
        example = head.task.mask_missing(standard, outputs, sample_weight)
        labels, outputs, weight = head.task.for_loss(*example, class_weight)
        own = head.task.loss_on(head.task.make_loss(), labels, outputs)
        loss = type(own).from_config({**own.get_config(), "reduction": "sum", "dtype": "float64"})
        total = loss(labels, outputs, weight)
    by_kernel, by_bias = tape.gradient(total, (kernel, bias))
    return collections.OrderedDict(
        loss=total,
        weight=tf.reduce_sum(tf.cast(weight, tf.float64)),
        kernel=by_kernel,
        bias=by_bias,
    )


def _label_sums(y: tf.Tensor, units: int) -> tf.Tensor:
    y = tf.reshape(tf.cast(y, tf.float64), [-1, units])
    present = tf.math.is_finite(y)
    y = tf.where(present, y, 0.0)
    return tf.stack([tf.reduce_sum(part, 0) for part in (tf.cast(present, y.dtype), y, y**2)])


def _unpack(data: Any) -> tuple[tf.Tensor, Any, Any]:
    """Returns features in float64, labels, and sample weights or None."""
    x, y, sample_weight = (*data, None)[:3]
    return tf.cast(x[features.KEY], tf.float64), y, sample_weight


def _of_task(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else part
