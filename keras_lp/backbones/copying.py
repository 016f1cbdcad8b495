"""Copies of models: the same layers and values in new variables."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras


def copy_model(
    model: keras.Model, change: Callable[[Any], Any] = lambda config: config
) -> keras.Model:
    """Returns a copy of a model that shares no variable with it.

    Args:
        model: a built model.
        change: function that maps the config of each layer to its new config. Defaults to the
            identity.

    Raises:
        Exception: the error of a layer that cannot be created from its config.
    """

    def copy(layer: keras.Layer) -> keras.Layer:
        return type(layer).from_config(change(layer.get_config()))

    state = random.getstate()  # Keras draws the seeds of unseeded layers from it
    try:
        made = keras.models.clone_model(model, clone_function=copy, recursive=True)
    finally:
        random.setstate(state)  # undoes the drawing of initial values, which are replaced below
    for new, old in zip(made.variables, model.variables, strict=True):
        new.assign(old)
    return made
