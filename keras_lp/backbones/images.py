"""Images: conversion from the user's images to the network's input, and augmentation."""

from __future__ import annotations

from typing import Any, Literal, get_args

import keras
import numpy as np

from keras_lp.utils.arguments import check_choice

Preset = Literal["light", "strong"]
AugmentationLike = Preset | keras.Layer


@keras.saving.register_keras_serializable("keras_lp")
class Augmentation(keras.layers.Layer):
    """Augments the inputs during training; in inference the inputs are unchanged.

    Args:
        layer: a Keras layer that keeps the shape of its input.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    def __init__(self, layer: keras.Layer, **kwargs: Any) -> None:
        # Pixels are not converted to float16 under mixed precision.
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        self.layer = layer

    def build(self, input_shape: Any) -> None:
        self.layer(keras.Input(batch_shape=input_shape))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.layer(inputs) if training else inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the config of the layer, with the augmenting layer in it."""
        layer = keras.saving.serialize_keras_object(self.layer)
        return {**super().get_config(), "layer": layer}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Augmentation:
        """Creates the layer from `get_config()`."""
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})


def augment(inputs: Any, augmentation: Any) -> Any:
    """Applies the `augmentation` argument of a builder to inputs.

    Args:
        inputs: the symbolic input of a model.
        augmentation: `"light"`, `"strong"` or a Keras layer.

    Raises:
        ValueError: if a name is unknown, the inputs are not images although a name is given, or a
            layer changes the shape.
        TypeError: if `augmentation` is anything else.
    """
    if isinstance(augmentation, keras.Layer):
        seen = keras.Input(batch_shape=inputs.shape, dtype=inputs.dtype)
        changed = augmentation(seen)
        if tuple(changed.shape) != tuple(inputs.shape):
            raise ValueError(
                "An augmentation must keep the shape of the inputs, because it is left out in "
                f"inference. Received: augmentation={augmentation.name!r}, which turns "
                f"{tuple(inputs.shape)} into {tuple(changed.shape)}. Change the size in your data "
                "set, or use `image_size`."
            )
        return Augmentation(augmentation, name="augmentation")(inputs)
    if not isinstance(augmentation, str):
        raise TypeError(
            '`augmentation` must be "light", "strong", a Keras layer or None. Received: '
            f"augmentation={augmentation!r}."
        )
    check_choice("augmentation", augmentation, get_args(Preset))
    if len(inputs.shape) != 4:
        raise ValueError(
            f"augmentation={augmentation!r} is for images, inputs of (height, width, channels). "
            f"Received: inputs of shape {tuple(inputs.shape[1:])}. Pass your own Keras layer."
        )
    strong = augmentation == "strong"
    amount = 2.0 if strong else 1.0
    options = {"fill_mode": "nearest"}
    layers = [
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomTranslation(0.05 * amount, 0.05 * amount, **options),
        keras.layers.RandomRotation(0.02 * amount, **options),  # of a full turn
        keras.layers.RandomZoom(0.1 * amount, **options),
    ]
    if strong:
        layers += [keras.layers.RandomBrightness(0.2), keras.layers.RandomContrast(0.2)]
    return Augmentation(keras.layers.Pipeline(layers), name="augmentation")(inputs)


def check_image_size(image_size: Any) -> tuple[int, int] | None:
    """Returns `image_size` as (height, width).

    Raises:
        ValueError: if it is neither one number nor two.
    """
    if image_size is None:
        return None
    sizes = np.broadcast_to(image_size, (2,)) if np.size(image_size) in (1, 2) else np.zeros(2)
    if not np.issubdtype(sizes.dtype, np.integer) or sizes.min() < 1:
        raise ValueError(
            "`image_size` must be one number of pixels or (height, width). Received: "
            f"image_size={image_size!r}."
        )
    return int(sizes[0]), int(sizes[1])


def fit_images(images: Any, channels: int, image_size: tuple[int, int] | None) -> Any:
    """Resizes images in the graph and repeats a grey channel.

    Args:
        images: images of any size with `channels` channels or one.
        channels: number of channels that the network takes.
        image_size: (height, width) that the network takes; None keeps the size.
    """
    if image_size is not None and tuple(images.shape[1:3]) != image_size:
        images = keras.layers.Resizing(*image_size, name="resizing")(images)
    if images.shape[-1] == 1 and channels > 1:
        images = keras.layers.Concatenate(name="grey_to_rgb")([images] * channels)
    return images
