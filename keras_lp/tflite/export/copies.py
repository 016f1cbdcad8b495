"""Copies of models that the converter can take: in float32, or without loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_lp.backbones.copying import copy_model


def compute_types(model: keras.Model) -> set[str]:
    """Returns the compute dtypes of the layers of a model other than float32."""
    types = {layer.compute_dtype for layer in model._flatten_layers()}
    return types & {"float16", "bfloat16", "float64"}


def float32_copy(model: keras.Model) -> keras.Model:
    """Returns a copy of a model that computes in float32, with the same weights."""
    return _copy(model, _in_float32, f"it computes in {sorted(compute_types(model))}")


def without_loops(model: keras.Model) -> keras.Model:
    """Returns the model, or a copy with unrolled recurrent layers.

    `"int8"` needs it, because activations inside loops are neither measured nor quantized.
    """
    if not any(getattr(layer, "unroll", True) is False for layer in model._flatten_layers()):
        return model
    return _copy(model, _unrolled, "its recurrent layers loop")


def _copy(model: keras.Model, change: Callable[[Any], Any], reason: str) -> keras.Model:
    try:
        return copy_model(model, change)
    except Exception as error:
        raise ValueError(
            "A model that cannot be exported as it is must be copyable. Received: "
            f"model {model.name!r}: {reason}, and copying it failed: {error}. Give its layers a "
            "`get_config`, or build it in float32 (int8: with unroll=True) and copy the weights "
            "with `set_weights(model.get_weights())`."
        ) from error


def _in_float32(config: Any) -> Any:
    """Replaces every dtype policy in the config of a layer, and of its sublayers, by float32."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return "float32"
        return {key: _in_float32(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_in_float32(value) for value in config)
    return config


def _unrolled(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: key == "unroll" or _unrolled(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_unrolled(value) for value in config)
    return config
