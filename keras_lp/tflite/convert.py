"""A Keras model as the bytes of a `.tflite` file of builtin operations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.tflite.contents import foreign_operations
from keras_lp.tflite.interface import call_flat, input_names, outputs


def convert(
    model: keras.Model,
    quantization: str | None = None,
    calibration: list[np.ndarray] | None = None,
    batch_size: int = 1,
) -> bytes:
    """Converts a model that `check_model` accepts and that computes in float32.

    Args:
        model: the model.
        quantization: as in `export_tflite`.
        calibration: for `"int8"` the inputs to measure activations on, in order.
        batch_size: examples a call.

    Raises:
        ValueError: an operation outside the builtin ones, or a model that the converter refuses.
    """
    serve, module = _serving_function(model, batch_size)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([serve], module)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if quantization is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantization == "int8":
        converter.representative_dataset = lambda: _batches(model, calibration, batch_size)
    try:
        content = converter.convert()
    except Exception as error:
        raise _refusal(model, serve, str(error)) from error
    if foreign := foreign_operations(content):
        raise _not_builtin(model, serve, foreign)
    return content


def compute_types(model: keras.Model) -> set[str]:
    """The types other than float32 that layers of a model compute in."""
    types = {layer.compute_dtype for layer in model._flatten_layers()}
    return types & {"float16", "bfloat16", "float64"}


def float32_copy(model: keras.Model) -> keras.Model:
    """A copy of a model that computes in float32, with the same weights."""

    def copy(layer: keras.Layer) -> keras.Layer:
        return type(layer).from_config(_in_float32(layer.get_config()))

    try:
        made = keras.models.clone_model(model, clone_function=copy, recursive=True)
        made.set_weights(model.get_weights())
    except Exception as error:
        raise ValueError(
            "A phone file is made from a float32 copy of the model. Received: model "
            f"{model.name!r}, which computes in {sorted(compute_types(model))} and cannot be "
            f"copied: {error}. Build it under keras.config.set_dtype_policy('float32') and copy "
            "the weights with `set_weights(model.get_weights())`."
        ) from error
    return made


def _in_float32(config: Any) -> Any:
    """The config of a layer with float32 in place of every policy, also of layers inside it."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return "float32"
        return {key: _in_float32(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_in_float32(value) for value in config)
    return config


def _serving_function(model: keras.Model, batch_size: int) -> tuple[Any, tf.Module]:
    # The tracked object must hold the variables, not the model: with the model the converter
    # succeeds and leaves the weights out.
    module = tf.Module()
    module.held = [variable.value for variable in model.variables]
    specs = [
        tf.TensorSpec((batch_size, *tensor.shape[1:]), tensor.dtype, name)
        for name, tensor in zip(input_names(model), model.inputs, strict=True)
    ]
    described = outputs(model)

    @tf.function(input_signature=specs)
    def serve(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        raw = call_flat(model, tensors)
        return {
            output.name: keras.activations.get(output.activation)(value)
            for output, value in zip(described, raw, strict=True)
        }

    module.serve = serve
    return serve.get_concrete_function(), module


def _batches(
    model: keras.Model, arrays: list[np.ndarray], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Calibration in the size of the file's batches; examples come again to fill the last one."""
    names = input_names(model)
    for start in range(0, len(arrays[0]), batch_size):
        rows = np.arange(start, start + batch_size) % len(arrays[0])
        yield {name: array[rows] for name, array in zip(names, arrays, strict=True)}


def _refusal(model: keras.Model, serve: Any, message: str) -> ValueError:
    listed = re.findall(r"^(?:Custom|Flex) ops: (.+)$", message, re.MULTILINE)
    names = sorted({name.strip() for line in listed for name in line.split(",")})
    if names:
        return _not_builtin(model, serve, names)
    return ValueError(
        "The converter must accept a model for the phone. Received: model "
        f"{model.name!r}, of which it says: {message}"
    )


def _not_builtin(model: keras.Model, serve: Any, operations: list[str]) -> ValueError:
    described = []
    for operation in operations:
        layers = _layers_with(model, serve, operation.removeprefix("Flex"))
        described.append(f"{operation}{f' in layer {layers}' if layers else ''}")
    return ValueError(
        "A model for the phone uses LiteRT's builtin operations only: others need TensorFlow "
        f"on the device. Received: model {model.name!r} with {'; '.join(described)}. Replace what "
        "computes it."
    )


def _layers_with(model: keras.Model, serve: Any, operation: str) -> str:
    """The innermost layers that an operation of the graph stands in, empty where none is known."""
    graph = serve.graph.as_graph_def()
    nodes = [*graph.node, *(node for one in graph.library.function for node in one.node_def)]
    names = {layer.name for layer in model._flatten_layers(include_self=False)}
    found = []
    for node in nodes:
        if node.op == operation:
            # Keras names the scope of a layer after it, and counts through when it comes again.
            scopes = [
                name if name in names else re.sub(r"_\d+$", "", name)
                for name in node.name.split("/")[:-1]
            ]
            found += [name for name in scopes if name in names][-1:]
    return ", ".join(repr(name) for name in dict.fromkeys(found))
