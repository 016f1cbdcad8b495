"""Backbone objects from which several models are built.

A backbone whose layers train from the start is copied, so that training changes neither the user's
object nor the other models built on it. A frozen backbone is shared: fine-tuning a model that was
built with it later trains the shared object, and `warn_if_trained` tells the next model.
"""

from __future__ import annotations

import weakref

import keras

from keras_lp.backbones.copying import copy_model
from keras_lp.utils.keras_internals import own_trainable_variables, sublayers
from keras_lp.utils.warn import warn

_TRAINED: weakref.WeakSet[keras.Layer] = weakref.WeakSet()
# Copies that train, by the backbone that they were made of.
_COPIES: weakref.WeakKeyDictionary[keras.Model, weakref.ref[keras.Model]] = (
    weakref.WeakKeyDictionary()
)


def note_training(model: keras.Model) -> None:
    """Remembers which layers train in a model."""
    _TRAINED.update(
        layer
        for layer in sublayers(model, include_self=False)
        if layer.trainable and own_trainable_variables(layer)
    )


def own_copy(backbone: keras.Model) -> keras.Model:
    """Returns a copy of a backbone that will train, or the backbone if it cannot be copied."""
    try:
        copy = copy_model(backbone)
    except Exception:  # layers of users raise what they like in `from_config`
        return backbone
    _COPIES[backbone] = weakref.ref(copy)
    return copy


def warn_if_copied(backbone: keras.Model) -> None:
    """Warns if another model trains a copy of a backbone that is about to be frozen."""
    if _COPIES.get(backbone, lambda: None)() is not None:
        warn(
            "A backbone object keeps its weights: a model that trains it trains a copy. Received: "
            f"backbone {backbone.name!r}, frozen, of which another model trains a copy. To build "
            "on what that model has learned, pass the model instead of the backbone.",
        )


def warn_if_trained(backbone: keras.Model) -> None:
    """Warns if layers of a backbone train, or trained, in a model that keras_lp built."""
    found = [layer.name for layer in sublayers(backbone) if layer in _TRAINED]
    if found:
        warn(
            "A backbone object should have its pretrained weights: a model built on it starts from "
            f"the weights that other models have learned. Received: backbone {backbone.name!r}, "
            f"whose layers {found[:3]}{' and more' if len(found) > 3 else ''} train in another "
            "model, which shares its weights. To start from the same weights each time, pass a "
            'file: backbone.save("backbone.keras").',
        )
