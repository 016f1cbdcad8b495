"""Copies of models: the same layers and values in variables of their own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_lp.utils.keras_internals import sublayers


def copy_model(
    model: keras.Model, change: Callable[[Any], Any] = lambda config: config
) -> keras.Model:
    """Returns an uncompiled copy of a model that shares no variable with it.

    Args:
        model: a built model.
        change: changes the config of each layer. Defaults to no change.

    Raises:
        ValueError: a layer has a vocabulary from `adapt`, which neither its config nor its
            variables contain.
        Exception: a layer cannot be made from its config.
    """
    for layer in sublayers(model):
        lookup = isinstance(layer, (keras.layers.StringLookup, keras.layers.IntegerLookup))
        if lookup and layer.input_vocabulary is None:
            raise ValueError(f"The vocabulary of layer {layer.name!r} is not in its config.")

    def copy(layer: keras.Layer) -> keras.Layer:
        return type(layer).from_config(change(layer.get_config()))

    state = random.getstate()  # from which Keras seeds layers without a seed
    try:
        with _as_uncompiled(model):
            made = keras.models.clone_model(model, clone_function=copy, recursive=True)
    finally:
        random.setstate(state)  # as if the initial values, replaced below, had not been drawn
    for new, old in zip(made.inputs, model.inputs, strict=True):
        new.name = old.name  # Keras names them after their layers
    for new, old in zip(made.variables, model.variables, strict=True):
        new.assign(old)
    finalize_normalization(made)
    return made


def finalize_normalization(layer: keras.Layer) -> None:
    """Lets `Normalization` layers use the mean and variance that their variables hold."""
    for inner in sublayers(layer):
        if isinstance(inner, keras.layers.Normalization):
            inner.finalize_state()


@contextlib.contextmanager
def _as_uncompiled(model: keras.Model) -> Iterator[None]:
    """Keeps Keras from compiling the copy too, which fails for unregistered losses."""
    compiled = [m for m in sublayers(model) if isinstance(m, keras.Model) and m.compiled]
    for one in compiled:
        one.compiled = False
    try:
        yield
    finally:
        for one in compiled:
            one.compiled = True
