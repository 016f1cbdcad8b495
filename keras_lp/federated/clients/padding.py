"""Pads sequences of different lengths on clients if the model masks the padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones.pooling import masks_steps
from keras_lp.federated.clients.arrays import Arrays, is_ragged
from keras_lp.model.model import input_structure
from keras_lp.tasks.heads import tasks
from keras_lp.utils.keras_internals import has_masks, sublayers


def example_specs(model: keras.Model, data: Arrays) -> Any:
    """Returns the dtype and shape of the examples in each array, with None for variable sizes.

    Args:
        model: the model.
        data: the arrays of a client, with inputs.
    """
    output = model.outputs[0] if isinstance(model, keras.Sequential) else model.output
    open_to = (input_structure(model), *[output] * (len(data) - 1))
    specs = []
    for part, symbolic, masked in zip(data, open_to, _masks(model), strict=False):
        arrays, tensors = tf.nest.flatten(part), tf.nest.flatten(symbolic)
        shapes = [tensor.shape for tensor in tensors] if len(arrays) == len(tensors) else []
        shapes = shapes if masked else []
        sizes = [
            [None if i < len(shape) and shape[i] is None else array.shape[i]
             for i in range(1, array.ndim)]
            for array, shape in zip(arrays, shapes or [()] * len(arrays), strict=True)
        ]  # fmt: skip
        pairs = zip(arrays, sizes, strict=True)
        specs.append([(_type(array), *own) for array, own in pairs])
    return [
        dict(zip(part, own, strict=True))
        if isinstance(part, Mapping)
        else (own if isinstance(part, tuple) else own[0])
        for part, own in zip(data, specs, strict=True)
    ]


def fill(model: keras.Model, data: Arrays, where: str = "") -> Arrays:
    """Returns the arrays of a client with shorter sequences padded as in `align`.

    Args:
        model: the model.
        data: the arrays. Those with dtype object have one array per example.
        where: the owner of the data, for the error.

    Raises:
        ValueError: sequences differ in length and the model does not mask padding.
    """
    names = ("x", "y", "sample_weight")
    for name, part, masked in zip(names, data, _masks(model), strict=False):
        ragged = [array for array in tf.nest.flatten(part) if is_ragged(array)]
        if ragged and not masked:
            lengths = [len(example) for example in ragged[0]]
            raise ValueError(
                "Sequences may differ in length only if the model masks padding: "
                'Embedding(mask_zero=True), Masking, or an input "padding_mask". Received: '
                f"{name}{where} with {min(lengths)} to {max(lengths)} steps."
            )
    flat = [
        _filled(array, value) if is_ragged(array) else array
        for array, value in zip(tf.nest.flatten(data), _values(model, data), strict=True)
    ]
    return tf.nest.pack_sequence_as(data, flat)


def align(
    model: keras.Model, clients: Sequence[Arrays], least: Sequence[tuple[int, ...]] = ()
) -> list[Arrays]:
    """Returns the arrays of clients with all examples padded to the largest size.

    The padding is zeros, the value of a `Masking` layer, or missing labels.

    Args:
        model: the model.
        clients: the arrays of each client, with inputs or features.
        least: the minimum sizes of the examples in each array.
    """
    flat = [tf.nest.flatten(data) for data in clients]
    sizes = [[array.shape[1:] for array in own] for own in flat] + ([list(least)] if least else [])
    longest = [tuple(np.max(column, axis=0).tolist()) for column in zip(*sizes, strict=True)]
    values = _values(model, clients[0])
    return [
        tf.nest.pack_sequence_as(
            data, [_pad(*one) for one in zip(own, longest, values, strict=True)]
        )
        for data, own in zip(clients, flat, strict=True)
    ]


def sizes_of(data: Arrays) -> list[tuple[int, ...]]:
    """Returns the sizes of the examples in each array."""
    return [array.shape[1:] for array in tf.nest.flatten(data)]


def _values(model: keras.Model, data: Arrays) -> list[float]:
    """Returns the padding value of each array."""
    masking = [la for la in sublayers(model) if isinstance(la, keras.layers.Masking)]
    known = tasks(model)
    x, y, *weight = data
    inputs = [float(masking[0].mask_value) if masking else 0.0] * len(tf.nest.flatten(x))
    missing = [known[name].missing for name in sorted(known)]
    labels = missing if len(missing) == len(tf.nest.flatten(y)) else [0.0] * len(tf.nest.flatten(y))
    return [*inputs, *labels, *[0.0] * len(tf.nest.flatten(weight))]


def _masks(model: keras.Model) -> tuple[bool, bool, bool]:
    """Returns whether padding of inputs, labels and weights has no effect.

    Padded labels of a task are missing labels. In other models, Keras must mask the outputs.
    """
    named = any(tensor.name == "padding_mask" for tensor in model.inputs)
    inputs = named or masks_steps(model)
    labels = inputs and (bool(tasks(model)) or _masks_outputs(model))
    return inputs, labels, labels


def _masks_outputs(model: keras.Model) -> bool:
    """Whether the outputs per step have a mask, which only eager outputs have."""
    if not any(None in tensor.shape[1:] for tensor in model.outputs):
        return False
    examples = tf.nest.map_structure(
        lambda tensor: tf.zeros([1, *(size or 2 for size in tensor.shape[1:])], tensor.dtype),
        input_structure(model),
    )
    outputs = tf.nest.flatten(model(examples))
    return has_masks(outputs)


def _type(array: np.ndarray) -> str:
    return "string" if array.dtype.kind in "SUO" else array.dtype.name


def _filled(examples: np.ndarray, value: float) -> np.ndarray:
    longest = np.max([example.shape for example in examples], axis=0).tolist()
    return np.concatenate([_pad(example[None], longest, value) for example in examples])


def _pad(array: np.ndarray, size: Sequence[int], value: float) -> np.ndarray:
    after = [most - own for most, own in zip(size, array.shape[1:], strict=True)]
    if not any(after):
        return array
    return np.pad(array, [(0, 0), *((0, one) for one in after)], constant_values=value)
