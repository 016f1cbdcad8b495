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


def revive_adapters(model: keras.Model) -> None:
    """Draws A again where A and B are both zero, as in a loaded model: there neither would move."""
    for layer in adapted_layers(model):
        a, b = adapters_of(layer)
        if not np.any(a) and not np.any(b):
            a.assign(keras.initializers.HeUniform()(a.shape, a.dtype))
