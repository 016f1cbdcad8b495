"""Low-rank adapters in the layers of a model."""

from __future__ import annotations

import keras
import numpy as np


def adapted_layers(model: keras.Model) -> list[keras.Layer]:
    """Returns the layers of a model that have adapters, in order."""
    return [la for la in model._flatten_layers() if getattr(la, "lora_enabled", False)]


def adapters_of(layer: keras.Layer) -> list[keras.Variable]:
    """Returns A and B of an adapted layer."""
    return [v for v in layer._trainable_variables if v.name.startswith("lora_")]


def is_loaded(layer: keras.Layer) -> bool:
    """Whether A and B of an adapted layer are zero: `.keras` files merge them into the kernel."""
    return not any(np.any(variable) for variable in adapters_of(layer))


def revive_adapters(model: keras.Model) -> None:
    """Initialises A again in a loaded model: with A and B both zero, neither would train."""
    for layer in adapted_layers(model):
        if is_loaded(layer):
            a, _ = adapters_of(layer)
            a.assign(keras.initializers.HeUniform()(a.shape, a.dtype))
