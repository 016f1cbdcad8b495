"""Copies of models: the same layers and values in variables of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras


def copy_model(
    model: keras.Model, change: Callable[[Any], Any] = lambda config: config
) -> keras.Model:
    """Returns a copy of a model that shares no variable with it.

    Args:
        model: a built model.
        change: what becomes of the config of each layer. Defaults to nothing.

    Raises:
        Exception: what a layer raises that cannot be made from its config.
    """

    def copy(layer: keras.Layer) -> keras.Layer:
        return type(layer).from_config(change(layer.get_config()))

    made = keras.models.clone_model(model, clone_function=copy, recursive=True)
    for new, old in zip(made.variables, model.variables, strict=True):
        new.assign(old)
    return made
