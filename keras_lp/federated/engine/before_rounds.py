"""Sets feature scales and class weights of heads before training, from sums over clients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from keras_lp.federated.clients.arrays import Arrays
from keras_lp.federated.clients.source import replace_inputs
from keras_lp.federated.engine import head_sums
from keras_lp.federated.engine.head_problem import Standardization
from keras_lp.federated.engine.sums import Sums
from keras_lp.model import class_balance
from keras_lp.model.caching import FeatureCache
from keras_lp.model.scaling import set_scale, waiting_heads
from keras_lp.tasks.heads import heads


def scale_features(
    model: keras.Model, data: Sequence[Arrays], on_features: bool, folder: Path
) -> tuple[int, int]:
    """Sets the feature scale of heads that do not have one, like the first `fit` of a model.

    Args:
        model: the model.
        data: the arrays of each client.
        on_features: whether the inputs are features.
        folder: the folder for the rows of the data.

    Returns:
        The number of bytes that each client sent and received.
    """
    with FeatureCache(model, verbose=0) as cache:
        features = data if on_features else [replace_inputs(cache, arrays) for arrays in data]
        sums = Sums(features, folder)
        found = sums.add_up(head_sums.feature_moments(sums.read_rows))
    if not found["count"] > 0:
        return 0, 0
    known = Standardization(found)
    set_scale(waiting_heads(model), known.mean, known.scale)
    up = sum(array.nbytes for array in found.values())
    return up, 2 * known.mean.astype(np.float32).nbytes


def balance_classes(model: keras.Model, data: Sequence[Arrays], folder: Path) -> tuple[int, int]:
    """Sets the class weights of balanced heads, like the first `fit` of a model.

    See `scale_features` for the arguments and the result.
    """
    waiting = class_balance.waiting_heads(heads(model))
    sums = Sums(data, folder)
    found = sums.add_up(head_sums.class_sums(waiting, sums.read_rows))
    for name, head in waiting.items():
        class_balance.set_weights(head, found[name])
    up = sum(array.nbytes for array in found.values())
    return up, up // 2
