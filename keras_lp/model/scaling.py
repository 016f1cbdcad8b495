"""Feature scaling: a head on a frozen backbone gets standardised features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones.features import (
    KEY,
    Features,
    are_features,
    feature_batch_size,
    feature_function,
    feature_model,
    features_layer,
)
from keras_lp.backbones.freezing import is_frozen
from keras_lp.balancing.ways import Balancing
from keras_lp.model.data import is_arrays
from keras_lp.tasks.heads import Head, heads
from keras_lp.utils.moments import moments

SAMPLE = 1024  # number of examples of a data set from which the scale is computed
LEAST = 0.3  # of the median deviation; columns that vary less are mostly noise and stay small


def scale_features(model: keras.Model, x: Any) -> None:
    """Sets the scale of the inputs of heads from the features of the first `fit`.

    The outputs do not change. With features of mean 0 and standard deviation 1, one learning rate
    suits all of them.

    Args:
        model: the model that is going to train.
        x: argument of `fit`: inputs, or features.
    """
    waiting = waiting_heads(model)
    features = _features_of(model, x) if waiting else None
    if features is not None:
        set_scale(waiting, *moments(features.reshape(-1, features.shape[-1])))


def waiting_heads(model: keras.Model) -> list[Head]:
    """Returns the heads whose inputs have no scale yet and do not change during training."""
    if not _is_wanted(model):
        return []
    return [head for head in heads(model).values() if _has_no_scale(head)]


def set_scale(heads: Sequence[Head], mean: np.ndarray, deviation: np.ndarray) -> None:
    """Makes heads scale their inputs to mean 0 and deviation 1, with the same outputs.

    A column whose deviation is less than `LEAST` times the median is divided by that product.

    Args:
        heads: the heads.
        mean: mean of each column, `(columns,)`.
        deviation: standard deviation of each column, infinite for a constant column, which is not
            scaled.
    """
    constant = np.isinf(deviation)
    least = LEAST * np.median(deviation[~constant]) if not constant.all() else 0
    mean, deviation = np.where(constant, 0, mean), np.maximum(deviation, least)
    deviation = np.where(constant, 1, deviation)
    for head in heads:
        head.scale_inputs(mean, 1 / deviation)


def fold_scales(model: keras.Model) -> None:
    """Folds the scale of the inputs into kernel and bias of the heads; the outputs do not change.

    If the features train, a scale would amplify the gradients of columns that hardly vary.
    """
    for head in heads(model).values():
        head.set_raw_weights(*head.raw_weights())


def _has_no_scale(head: Head) -> bool:
    if not head.scales_inputs:
        return False
    return bool(not np.any(head.input_mean) and np.all(head.input_scale == 1))


def is_on_features(head: Head) -> bool:
    """Whether a head takes the features directly, except for Dropout during training."""
    below = head.input._keras_history.operation
    while isinstance(below, (keras.layers.Dropout, Balancing)):
        below = below.input._keras_history.operation
    return isinstance(below, Features)


def _is_wanted(model: keras.Model) -> bool:
    layer = features_layer(model)
    if layer is None or layer.cache is False or model._distribute_strategy is not None:
        return False
    below = [op for op in feature_model(model).operations if isinstance(op, keras.Layer)]
    fixed = any(tensor.shape[0] is not None for tensor in model.inputs)
    return not fixed and all(is_frozen(op) for op in below if op.weights)


def _features_of(model: keras.Model, x: Any) -> np.ndarray | None:
    """Returns features of all or the first examples, None if they can be read only once.

    Args:
        model: the model.
        x: argument of `fit`: features, or batches of inputs.
    """
    if are_features(x):
        return x[KEY]
    if isinstance(x, tf.data.Dataset):
        batches = (batch[0] for batch in x)
    elif isinstance(x, keras.utils.PyDataset) and x.num_batches is not None:
        batches = (x[i][0] for i in range(x.num_batches))
    elif is_arrays(x):
        size = feature_batch_size(model)
        first = min(SAMPLE, len(keras.tree.flatten(x)[0]))
        batches = (
            keras.tree.map_structure(lambda leaf, i=i: leaf[i : min(i + size, first)], x)
            for i in range(0, first, size)
        )
    else:
        return None
    found, count = [], 0
    for batch in batches:
        if not are_features(batch):
            batch = feature_function(model)(keras.tree.map_structure(tf.convert_to_tensor, batch))
        found.append(np.asarray(batch[KEY]))
        count += len(found[-1])
        if count >= SAMPLE:
            break
    return np.concatenate(found) if found else None
