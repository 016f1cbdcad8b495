"""Features: the output of a frozen backbone, and the parts of the model below and above it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.models.functional import Functional

from keras_lp.backbones.freezing import is_frozen, run_layer
from keras_lp.backbones.images import Augmentation
from keras_lp.utils.arguments import check_choice, check_positive

# A batch whose input is a dict with this key contains features instead of model inputs.
KEY = "keras_lp_features"
MASK = "keras_lp_mask"  # the mask of the features, if they have one

CacheFeatures = bool | Literal["auto"]

CACHE_MEMORY = 2 * 2**30


@keras.saving.register_keras_serializable("keras_lp")
class Features(keras.layers.Identity):
    """Marks the features between backbone and heads, and whether `fit` computes them once.

    Args:
        cache: `"auto"`, True or False, see `lp.transfer_model`. Defaults to `"auto"`.
        memory: bytes of memory for cached features; features beyond that are stored in a file.
            Defaults to 2 GiB.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    def __init__(
        self, cache: CacheFeatures = "auto", memory: int = CACHE_MEMORY, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(cache, bool):
            check_choice("cache_features", cache, ["auto", True, False])
        check_positive("cache_memory", memory)
        self.cache = cache
        self.memory = memory

    def get_config(self) -> dict[str, Any]:
        """Returns the config of the layer."""
        return {**super().get_config(), "cache": self.cache, "memory": self.memory}


def features_layer(model: keras.Model) -> Features | None:
    """Returns the layer whose output is the features, None if the model has none."""
    return next((layer for layer in model.layers if isinstance(layer, Features)), None)


def feature_model(model: keras.Model) -> keras.Model:
    """Returns the part of a model from its inputs to the features; layers are shared."""
    return keras.Model(model.input, cast(Features, features_layer(model)).output)


def are_features(inputs: Any) -> bool:
    """Whether these model inputs are features."""
    return isinstance(inputs, Mapping) and KEY in inputs


def run_above(model: keras.Model, inputs: Mapping[str, Any], training: bool | None) -> Any:
    """Returns the outputs of a model from its features, `{KEY: features}`."""
    layer, given = features_layer(model), inputs[KEY]
    if MASK in inputs:
        set_keras_mask(given, inputs[MASK])
    below = {id(operation) for operation in feature_model(model).operations}

    def run(operation: Any) -> Any:
        if operation is layer:
            return lambda *_, **__: given
        if id(operation) in below:
            return lambda *_, **__: None
        return run_layer(operation, training)

    return model._run_through_graph([None] * len(model.inputs), run)


def obstacle(model: keras.Model, weightless: bool = False) -> str | None:
    """Returns the reason why the features cannot be computed once, None if they can.

    Args:
        model: the model.
        weightless: whether to cache features whose computation uses no weights.
    """
    layer = features_layer(model)
    if layer is None:
        return "it has no layer of features"
    below = [op for op in feature_model(model).operations if isinstance(op, keras.Layer)]
    if not weightless and not any(op.weights for op in below):
        return "nothing below its head has weights"
    if any(tensor.shape[0] is not None for tensor in model.inputs):
        return "its batch size is fixed"
    for op in below:
        if op.weights and not is_frozen(op):
            return f"{op.name!r} is not wholly frozen"
        if isinstance(op, Augmentation):
            return f"{op.name!r} is random"
        for inner in op._flatten_layers():
            if inner._seed_generators and not (op.weights and inner._call_has_training_arg):
                return f"{inner.name!r} is random"
            if getattr(inner, "stateful", False):
                return f"{inner.name!r} keeps state between batches"
            if inner.activity_regularizer is not None:
                return f"{inner.name!r} adds a loss"
    return None


def feature_function(model: keras.Model) -> Callable[[Any], dict[str, Any]]:
    """Returns a function that computes `{KEY: features}` and their mask, traced once per model."""
    kept = model.__dict__
    if "_feature_function" not in kept:
        below = feature_model(model)

        def compute(x: Any) -> dict[str, Any]:
            features = below(x, training=False)
            mask = get_keras_mask(features)
            return {KEY: features} if mask is None else {KEY: features, MASK: mask}

        # `setattr` would add its layers to the model a second time.
        kept["_feature_function"] = tf.function(compute, reduce_retracing=True, autograph=False)
        kept["_feature_function_eager"] = compute
    return kept["_feature_function_eager" if model.run_eagerly else "_feature_function"]


def feature_batch_size(model: keras.Model) -> int:
    """Returns the number of examples at which the largest tensor has at most 2**24 numbers."""
    shapes = [tensor.shape for tensor in model.inputs]
    pending = [feature_model(model)]
    while pending:
        for op in pending.pop().operations:
            shapes += [tensor.shape for tensor in keras.tree.flatten(op.output)]
            inner = op._functional if isinstance(op, keras.Sequential) else op
            if isinstance(inner, Functional):
                pending.append(inner)
    largest = 1
    for _, *sizes in shapes:
        known = [size or (224 if len(sizes) == 3 else 512) for size in sizes]
        if len(known) == 2:  # a sequence: attention computes a steps x steps matrix per head
            known[1] = max(known[1], 8 * known[0])
        largest = max(largest, math.prod(known))
    return 2 ** int(np.clip(np.log2(2**24 / largest), 0, 8))
