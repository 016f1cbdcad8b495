"""A Keras model as the bytes of a `.tflite` file of builtin operations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.tflite.contents import foreign_operations
from keras_lp.tflite.export.int8 import quantize
from keras_lp.tflite.interface import call_flat, input_names, outputs
from keras_lp.utils.files import check_scratch_space

_LOOPS = ("While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase")


def convert(
    model: keras.Model,
    quantization: str | None = None,
    calibration: list[np.ndarray] | None = None,
    batch_size: int = 1,
    activate: bool = True,
) -> bytes:
    """Converts a model that `check_model` accepts and that computes in float32.

    Args:
        model: the model.
        quantization: as in `export_tflite`.
        calibration: for `"int8"` the inputs to measure activations on, in order.
        batch_size: examples a call.
        activate: whether the file adds the softmax or sigmoid of the heads.

    Raises:
        ValueError: an operation outside the builtin ones, a model that the converter refuses, or
            for `"int8"` activations that are not finite.
        ImportError: `ai-edge-litert` is not installed, which `"int8"` needs.
        OSError: the disk is full, where temporary files are.
    """
    check_scratch_space(weight_bytes(model))
    serve, module = _serving_function(model, batch_size, activate)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([serve], module)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if quantization in ("dynamic", "float16"):
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantization == "int8":
        _check_no_loops(model, serve)
    try:
        content = converter.convert()
    except Exception as error:
        raise _refusal(model, serve, str(error)) from error
    if foreign := foreign_operations(content):
        raise _not_builtin(model, serve, foreign)
    if quantization != "int8":
        return content
    try:
        return quantize(content, _batches(model, calibration or [], batch_size))
    except RuntimeError as error:
        raise ValueError(
            "LiteRT must run a model for int8 on the calibration data. Received: model "
            f"{model.name!r}, of which it says: {error}. Export with quantization='dynamic'."
        ) from error


def weight_bytes(model: keras.Model) -> int:
    """Returns the size of the weights of a model, in bytes."""
    return sum(variable.numpy().nbytes for variable in model.variables)


def compute_types(model: keras.Model) -> set[str]:
    """The types other than float32 that layers of a model compute in."""
    types = {layer.compute_dtype for layer in model._flatten_layers()}
    return types & {"float16", "bfloat16", "float64"}


def float32_copy(model: keras.Model) -> keras.Model:
    """A copy of a model that computes in float32, with the same weights."""
    return _copy(model, _in_float32, f"it computes in {sorted(compute_types(model))}")


def without_loops(model: keras.Model) -> keras.Model:
    """The model, or a copy with the steps of recurrent layers one after the other.

    `"int8"` needs it: activations are measured, and computed in 8 bits, outside loops only.
    """
    if not any(getattr(layer, "unroll", True) is False for layer in model._flatten_layers()):
        return model
    return _copy(model, _unrolled, "its recurrent layers loop")


def _copy(model: keras.Model, change: Callable[[Any], Any], reason: str) -> keras.Model:
    def copy(layer: keras.Layer) -> keras.Layer:
        return type(layer).from_config(change(layer.get_config()))

    try:
        made = keras.models.clone_model(model, clone_function=copy, recursive=True)
        made.set_weights(model.get_weights())
    except Exception as error:
        raise ValueError(
            "A model that a phone cannot run as it is must be one that can be copied. Received: "
            f"model {model.name!r}: {reason}, and copying it failed: {error}. Give its layers a "
            "`get_config`, or build it in float32 (int8: with unroll=True) and copy the weights "
            "with `set_weights(model.get_weights())`."
        ) from error
    return made


def _in_float32(config: Any) -> Any:
    """The config of a layer with float32 instead of every policy, also of layers inside it."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return "float32"
        return {key: _in_float32(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_in_float32(value) for value in config)
    return config


def _unrolled(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: key == "unroll" or _unrolled(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_unrolled(value) for value in config)
    return config


def _serving_function(model: keras.Model, batch_size: int, activate: bool) -> tuple[Any, tf.Module]:
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
            output.name: keras.activations.get(output.activation)(value) if activate else value
            for output, value in zip(described, raw, strict=True)
        }

    module.serve = serve
    return serve.get_concrete_function(), module


def _batches(
    model: keras.Model, arrays: list[np.ndarray], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Calibration in the size of the file's batches, whole ones; too few examples come again."""
    names, count = input_names(model), len(arrays[0])
    for start in range(0, max(count - batch_size, 0) + 1, batch_size):
        rows = np.arange(start, start + batch_size) % count
        yield {name: array[rows] for name, array in zip(names, arrays, strict=True)}


def _check_no_loops(model: keras.Model, serve: Any) -> None:
    layers = [_layers_with(model, serve, kind) for kind in _LOOPS]
    if any(layer is not None for layer in layers):
        where = ", ".join(layer for layer in layers if layer) or "a layer"
        raise ValueError(
            "A model for int8 has no loops or branches: what they compute is not measured. "
            f"Received: model {model.name!r} with one in {where}. Export with "
            'quantization="dynamic".'
        )


def _refusal(model: keras.Model, serve: Any, message: str) -> ValueError:
    listed = re.findall(r"^(?:Custom|Flex|TF Select) ops: (.+)$", message, re.MULTILINE)
    listed += re.findall(r"'tf\.(\w+)' op is neither a custom op nor a flex op", message)
    names = sorted({name.strip() for line in listed for name in line.split(",")})
    if names:
        return _not_builtin(model, serve, names)
    return ValueError(
        "The converter must accept a model for the phone. Received: model "
        f"{model.name!r}, of which it says: {message.strip().splitlines()[0][:300]}"
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


def _layers_with(model: keras.Model, serve: Any, operation: str) -> str | None:
    """The innermost layers that an operation stands in, None where the graph has it nowhere."""
    graph = serve.graph.as_graph_def()
    nodes = [*graph.node, *(node for one in graph.library.function for node in one.node_def)]
    places = [node.name for node in nodes if node.op == operation]
    if not places:
        return None
    names = {layer.name for layer in model._flatten_layers(include_self=False)}
    found = []
    for place in places:
        # Keras names the scope of a layer after it, and counts through when it comes again.
        scopes = place.split("/")[:-1]
        scopes = [name if name in names else re.sub(r"_\d+$", "", name) for name in scopes]
        found += [name for name in scopes if name in names][-1:]
    return ", ".join(repr(name) for name in dict.fromkeys(found))
