"""Warns about backbone objects that several models share: training one changes the others."""

from __future__ import annotations

import warnings
import weakref

import keras

_TRAINED: weakref.WeakSet[keras.Layer] = weakref.WeakSet()


def note_training(model: keras.Model) -> None:
    """Remembers which layers train in a model."""
    _TRAINED.update(
        layer
        for layer in model._flatten_layers(include_self=False)
        if layer.trainable and layer._trainable_variables
    )


def warn_if_trained(backbone: keras.Model) -> None:
    """Warns if layers of a backbone train, or trained, in a model that keras_lp built."""
    found = [layer.name for layer in backbone._flatten_layers() if layer in _TRAINED]
    if found:
        warnings.warn(
            "Models built on the same backbone object share its weights: this model starts from "
            "the weights that another has learned, and training it changes the other. Received: "
            f"backbone {backbone.name!r}, whose layers {found[:3]}"
            f"{' and more' if len(found) > 3 else ''} train in another model. To start from the "
            'same weights each time, pass a file: backbone.save("backbone.keras").',
            stacklevel=5,
        )
