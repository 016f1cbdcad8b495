"""Backbone objects from which several models are built.

A frozen backbone is shared. A backbone that trains is copied, so that training changes neither
the user's object nor the other models built on it.
"""

from __future__ import annotations

import warnings
import weakref

import keras

from keras_lp.backbones.copying import copy_model

_TRAINED: weakref.WeakSet[keras.Layer] = weakref.WeakSet()


def note_training(model: keras.Model) -> None:
    """Remembers which layers train in a model."""
    _TRAINED.update(
        layer
        for layer in model._flatten_layers(include_self=False)
        if layer.trainable and layer._trainable_variables
    )


def own_copy(backbone: keras.Model) -> keras.Model:
    """Returns a copy of a backbone that will train, or the backbone if it cannot be copied."""
    try:
        return copy_model(backbone)
    except Exception:  # layers of users raise what they like in `from_config`
        return backbone


def warn_if_trained(backbone: keras.Model) -> None:
    """Warns if layers of a backbone train, or trained, in a model that keras_lp built."""
    found = [layer.name for layer in backbone._flatten_layers() if layer in _TRAINED]
    if found:
        warnings.warn(
            "A backbone object should have its pretrained weights: a model built on it starts from "
            f"the weights that other models have learned. Received: backbone {backbone.name!r}, "
            f"whose layers {found[:3]}{' and more' if len(found) > 3 else ''} train in another "
            "model, which shares its weights. To start from the same weights each time, pass a "
            'file: backbone.save("backbone.keras").',
            stacklevel=5,
        )
