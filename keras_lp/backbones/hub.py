"""KerasHub presets as backbones. KerasHub is imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

PREFIX = "hub:"


def load_preset(preset: str, weights: Any, kwargs: dict[str, Any]) -> keras.Model:
    """Returns the backbone of a KerasHub preset.

    Args:
        preset: a name such as `"resnet_50_imagenet"`, a handle or a folder.
        weights: `"imagenet"` for the preset's own weights, None for untrained weights, or a
            weights file.
        kwargs: constructor arguments that override the preset.

    Raises:
        ImportError: if KerasHub is not installed.
        ConnectionError: if the preset cannot be downloaded.
        ValueError: if the preset is unknown.
    """
    keras_hub = import_hub()

    def load() -> keras.Model:
        own = weights == "imagenet"
        return keras_hub.models.Backbone.from_preset(preset, load_weights=own, **kwargs)

    network = _reach(preset, load)
    if weights not in ("imagenet", None):
        network.load_weights(weights)
    return network


def image_scaling(preset: str) -> tuple[Any, Any]:
    """Returns the scale and the offset that the preset applies to pixels; (1, 0) if unknown."""
    keras_hub = import_hub()
    try:
        converter = _reach(preset, lambda: keras_hub.layers.ImageConverter.from_preset(preset))
    except (FileNotFoundError, ValueError):  # the preset does not define a scaling
        return 1.0, 0.0
    scale = 1.0 if converter.scale is None else converter.scale
    return scale, 0.0 if converter.offset is None else converter.offset


def import_hub() -> Any:
    """Imports KerasHub; the error tells how to install it."""
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            'A backbone "hub:..." needs KerasHub. Install it: pip install keras-hub.'
        ) from error
    return keras_hub


def _reach(preset: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except FileNotFoundError:
        raise
    except OSError as error:  # requests raises these too
        raise ConnectionError(
            f"The KerasHub preset {preset!r} must be downloaded once, and that failed. Received: "
            f"{error}. Connect to the network, or pass the folder of a preset you have: "
            "'hub:./folder'."
        ) from error
