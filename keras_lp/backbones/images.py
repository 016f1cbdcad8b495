"""Pictures: from what the user has to what a network takes, and augmentation."""

from __future__ import annotations

from typing import Any, Literal, get_args

import keras
import numpy as np

from keras_lp.utils.arguments import check_choice

Preset = Literal["light", "strong"]
AugmentationLike = Preset | keras.Layer


@keras.saving.register_keras_serializable("keras_lp")
class Augmentation(keras.layers.Layer):
    """Changes the inputs at random in training; otherwise it is not there at all.

    Args:
        layer: a Keras layer that keeps the shape of its input.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    def __init__(self, layer: keras.Layer, **kwargs: Any) -> None:
        # Pixels stay as they are under mixed precision too.
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
        """Makes the layer again from `get_config()`."""
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})


def augment(inputs: Any, augmentation: Any) -> Any:
    """Changes inputs as the argument `augmentation` of a builder says.

    Args:
        inputs: the symbolic input of a model.
        augmentation: `"light"`, `"strong"` or a Keras layer.

    Raises:
        ValueError: an unknown name, a name for inputs that are not pictures, or a layer that
            changes the shape.
        TypeError: something else.
    """
    if isinstance(augmentation, keras.Layer):
        seen = keras.Input(batch_shape=inputs.shape, dtype=inputs.dtype)
        changed = augmentation(seen)
        if tuple(changed.shape) != tuple(inputs.shape):
            raise ValueError(
                "An augmentation must keep the shape of the inputs: it is left out where the model "
                f"predicts. Received: augmentation={augmentation.name!r}, which turns "
                f"{tuple(inputs.shape)} into {tuple(changed.shape)}. Put what changes the size "
                "into your data set, or use `image_size`."
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
            f"augmentation={augmentation!r} is for pictures, inputs of (height, width, channels). "
            f"Received: inputs of shape {tuple(inputs.shape[1:])}. Pass a Keras layer of yours."
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
        ValueError: neither a number nor two.
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
    """Resizes pictures in the graph and repeats a grey channel.

    Args:
        images: pictures of any size, and of `channels` channels or one.
        channels: the channels that the network takes.
        image_size: (height, width) that the network takes; None leaves the size.
    """
    if image_size is not None and tuple(images.shape[1:3]) != image_size:
        images = keras.layers.Resizing(*image_size, name="resizing")(images)
    if images.shape[-1] == 1 and channels > 1:
        images = keras.layers.Concatenate(name="grey_to_rgb")([images] * channels)
    return images
