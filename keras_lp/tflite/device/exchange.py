"""The weights that phones and server exchange, by name, and the version of the model.

A name includes the index of the weight in `model.weights`, because paths change when a model is
saved and loaded. A version has two halves: the first identifies the model, the second the round.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import keras
import numpy as np

from keras_lp.utils.keras_internals import own_variables, sublayers

VERSION = "version"
HALF = 4  # int32 numbers in each half of a version

Variables = dict[str, keras.Variable]


def named_weights(model: keras.Model, variables: Iterable[keras.Variable]) -> Variables:
    """Returns the given weights by name, in the order of the model."""
    wanted = {id(variable) for variable in variables}
    return {
        name: variable for name, variable in all_weights(model).items() if id(variable) in wanted
    }


def find_weights(model: keras.Model, names: Iterable[str]) -> Variables | None:
    """Returns the weights with these names in the order of the model; None if one is missing."""
    known, names = all_weights(model), set(names)
    if not names or not names <= known.keys():
        return None
    return {name: variable for name, variable in known.items() if name in names}


def model_version(model: keras.Model, exchanged: Mapping[str, keras.Variable]) -> np.ndarray:
    """Returns the version of a model: `(2 * HALF,)` int32.

    The first half is a digest of everything that does not change: names, shapes, and the values of
    weights that are not exchanged. The second half is a digest of the exchanged values, which
    differ in every round, so no round counter is needed.

    Args:
        model: the model.
        exchanged: the exchanged weights, by name.
    """
    stays, moves = hashlib.sha256(), hashlib.sha256()
    for name, variable in all_weights(model).items():
        values = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
        stays.update(f"{name} {values.shape} {values.dtype} {name in exchanged};".encode())
        (moves if name in exchanged else stays).update(values.tobytes())
    halves = [np.frombuffer(digest.digest()[: 4 * HALF], "<i4") for digest in (stays, moves)]
    return np.concatenate(halves).astype("int32")


def layer_of_variable(model: keras.Model) -> dict[int, keras.Layer]:
    """Returns the layer of each weight, by the id of the weight."""
    return {id(variable): layer for layer in sublayers(model) for variable in own_variables(layer)}


def all_weights(model: keras.Model) -> Variables:
    """Returns all weights of a model by name."""
    layers = layer_of_variable(model)
    named = {}
    for position, variable in enumerate(model.weights):
        layer = layers[id(variable)].name
        name = re.sub(r"\W", "_", f"{layer}_{variable.name}", flags=re.ASCII)
        named[f"w{position}_{name}"] = variable
    return named
