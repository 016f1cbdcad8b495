"""Pooling: converts features with spatial or time axes to vectors."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import keras
from keras import ops

from keras_lp.utils.arguments import check_choice
from keras_lp.utils.keras_internals import sublayers

Pooling = Literal["auto", "avg", "max", "flatten"]

FLAT = 4096  # largest size of a flattened feature map, see benchmarks/results/pooling.md


@keras.saving.register_keras_serializable("keras_lp")
class TokenPooling(keras.layers.Layer):
    """The mean or maximum over the tokens of a text, without padding; zeros without tokens.

    Args:
        mode: `"avg"` or `"max"`.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    def __init__(self, mode: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mode = mode

    def call(self, features: Any, padding_mask: Any) -> Any:
        """Pools features `(batch, tokens, width)` over the tokens with `padding_mask` 1.

        Args:
            features: features.
            padding_mask: `(batch, tokens)`.
        """
        real = ops.cast(padding_mask, "bool")[..., None]
        if self.mode == "max":
            largest = ops.max(ops.where(real, features, -float("inf")), axis=1)
            return ops.where(ops.any(real, axis=1), largest, 0.0)
        count = ops.cast(ops.maximum(ops.sum(ops.cast(real, "int32"), axis=1), 1), features.dtype)
        return ops.sum(ops.where(real, features, 0.0), axis=1) / count

    def get_config(self) -> dict[str, Any]:
        """Returns the config of the layer."""
        return {**super().get_config(), "mode": self.mode}


@keras.saving.register_keras_serializable("keras_lp")
class MaskedAveragePooling1D(keras.layers.GlobalAveragePooling1D):
    """The mean over the steps that are not masked; zeros if all are masked (Keras gives NaN)."""

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Pools inputs `(batch, steps, width)` over the steps with `mask` `(batch, steps)` true."""
        if mask is None:
            return super().call(inputs)
        weight = ops.cast(mask, inputs.dtype)[..., None]
        return ops.sum(inputs * weight, axis=1) / ops.maximum(ops.sum(weight, axis=1), 1)


@keras.saving.register_keras_serializable("keras_lp")
class MaskedMaxPooling1D(keras.layers.GlobalMaxPooling1D):
    """The maximum over the steps that are not masked (Keras uses all); zeros if all are masked."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Pools inputs `(batch, steps, width)` over the steps with `mask` `(batch, steps)` true."""
        if mask is None:
            return super().call(inputs)
        mask = ops.cast(mask, "bool")[..., None]
        lowest = -ops.max(-inputs, axis=1, keepdims=True)  # LiteRT has no gradient of min
        largest = ops.max(ops.where(mask, inputs, lowest), axis=1)
        return ops.where(ops.any(mask, axis=1), largest, 0.0)

    def compute_mask(self, inputs: Any, mask: Any = None) -> None:
        """Returns None: there are no steps after pooling."""


def pool(features: Any, pooling: Pooling | None, padding_mask: Any = None) -> Any:
    """Adds the layer for the `pooling` argument of a builder.

    Args:
        features: a symbolic tensor of rank 2, 3 or 4.
        pooling: `"avg"`, `"max"`, `"flatten"`, None, or `"auto"`. `"auto"` flattens a feature map
            of at most `FLAT` numbers, which keeps the positions, and averages a larger one, one of
            unknown size, or a sequence.
        padding_mask: `(batch, tokens)`, 1 for the tokens of a text that are not padding.

    Raises:
        ValueError: if the name is unknown, or the features have another rank or an unknown size.
    """
    check_choice("pooling", pooling, [*get_args(Pooling), None])
    rank = len(features.shape)
    if pooling == "auto":
        sizes = features.shape[1:]
        small = rank == 4 and None not in sizes and math.prod(sizes) <= FLAT
        pooling = "flatten" if small else "avg"
    if rank == 2 or pooling is None:
        return features
    if pooling == "flatten":
        if None in features.shape[1:]:
            raise ValueError(
                'pooling="flatten" needs features of a known size. Received: an output of shape '
                f'{tuple(features.shape)}. Give `input_shape`, or pool with "avg".'
            )
        return keras.layers.Flatten(name="pooling")(features)
    if padding_mask is not None and rank == 3:
        return TokenPooling(pooling, name="pooling")(features, padding_mask)
    layers = {
        ("avg", 3): MaskedAveragePooling1D,
        ("max", 3): MaskedMaxPooling1D,
        ("avg", 4): keras.layers.GlobalAveragePooling2D,
        ("max", 4): keras.layers.GlobalMaxPooling2D,
    }
    if (pooling, rank) not in layers:
        raise ValueError(
            "A backbone must output features of rank 2 (batch, features), 3 (batch, steps, "
            "features) or 4 (batch, height, width, features). Received: an output of shape "
            f"{tuple(features.shape)}."
        )
    return layers[pooling, rank](name="pooling")(features)


def masks_steps(model: keras.Model) -> bool:
    """Whether a layer of a model masks steps of sequences."""
    return any(
        isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False)
        for layer in sublayers(model)
    )
