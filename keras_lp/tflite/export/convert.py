"""Converts a Keras model to the bytes of a `.tflite` file of builtin operations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones.copying import copy_model
from keras_lp.tflite.contents import foreign_operations
from keras_lp.tflite.export.int8 import quantize
from keras_lp.tflite.interface import call_flat, input_names, outputs
from keras_lp.utils.arguments import Verbose
from keras_lp.utils.files import check_scratch_space
from keras_lp.utils.progress import Progress

_LOOPS = ("While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase")


def convert(
    model: keras.Model,
    quantization: str | None = None,
    calibration: list[np.ndarray] | None = None,
    batch_size: int = 1,
    activate: bool = True,
    verbose: Verbose = 0,
) -> bytes:
    """Converts a model to the bytes of a `.tflite` file.

    Args:
        model: a model that `check_model` accepts and that computes in float32.
        quantization: see `export_tflite`.
        calibration: for `"int8"`, the calibration inputs, in the order of `model.inputs`.
        batch_size: number of examples per call.
        activate: whether to add the softmax or sigmoid of the heads.
        verbose: how to show the progress of the calibration, see `Progress`.

    Raises:
        ValueError: the model uses an operation that is not builtin, the converter rejects it, or
            for `"int8"` an activation is not finite.
        ImportError: `"int8"` needs `ai-edge-litert`, which is not installed.
        OSError: the disk of the temporary files is full.
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
        inputs = calibration or []
        count = max(len(inputs[0]) // batch_size, 1)
        progress = Progress("Calibration", count, verbose)
        return quantize(content, _batches(model, inputs, batch_size), progress)
    except RuntimeError as error:
        raise ValueError(
            "LiteRT must be able to run an int8 model on the calibration data. Received: model "
            f"{model.name!r} with the error: {error}. Export with quantization='dynamic'."
        ) from error


def weight_bytes(model: keras.Model) -> int:
    """Returns the size of the weights of a model in bytes."""
    return sum(variable.numpy().nbytes for variable in model.variables)


def compute_types(model: keras.Model) -> set[str]:
    """Returns the compute dtypes of the layers of a model other than float32."""
    types = {layer.compute_dtype for layer in model._flatten_layers()}
    return types & {"float16", "bfloat16", "float64"}


def float32_copy(model: keras.Model) -> keras.Model:
    """Returns a copy of a model that computes in float32, with the same weights."""
    return _copy(model, _in_float32, f"it computes in {sorted(compute_types(model))}")


def without_loops(model: keras.Model) -> keras.Model:
    """Returns the model, or a copy with unrolled recurrent layers.

    `"int8"` needs it, because activations inside loops are neither measured nor quantized.
    """
    if not any(getattr(layer, "unroll", True) is False for layer in model._flatten_layers()):
        return model
    return _copy(model, _unrolled, "its recurrent layers loop")


def _copy(model: keras.Model, change: Callable[[Any], Any], reason: str) -> keras.Model:
    try:
        return copy_model(model, change)
    except Exception as error:
        raise ValueError(
            "A model that cannot be exported as it is must be copyable. Received: "
            f"model {model.name!r}: {reason}, and copying it failed: {error}. Give its layers a "
            "`get_config`, or build it in float32 (int8: with unroll=True) and copy the weights "
            "with `set_weights(model.get_weights())`."
        ) from error


def _in_float32(config: Any) -> Any:
    """Replaces every dtype policy in the config of a layer, and of its sublayers, by float32."""
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
    # The tracked object must hold the variables, not the model. If it holds the model, the
    # converter succeeds but drops the weights.
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
    """Yields full calibration batches; too few examples for one batch are repeated."""
    names, count = input_names(model), len(arrays[0])
    for start in range(0, max(count - batch_size, 0) + 1, batch_size):
        rows = np.arange(start, start + batch_size) % count
        yield {name: array[rows] for name, array in zip(names, arrays, strict=True)}


def _check_no_loops(model: keras.Model, serve: Any) -> None:
    layers = [_layers_with(model, serve, kind) for kind in _LOOPS]
    if any(layer is not None for layer in layers):
        where = ", ".join(layer for layer in layers if layer) or "a layer"
        raise ValueError(
            "A model for int8 must have no loops or branches, because their activations are not "
            f"measured. Received: model {model.name!r} with one in {where}. Export with "
            'quantization="dynamic".'
        )


def _refusal(model: keras.Model, serve: Any, message: str) -> ValueError:
    listed = re.findall(r"^(?:Custom|Flex|TF Select) ops: (.+)$", message, re.MULTILINE)
    listed += re.findall(r"'tf\.(\w+)' op is neither a custom op nor a flex op", message)
    names = sorted({name.strip() for line in listed for name in line.split(",")})
    if names:
        return _not_builtin(model, serve, names)
    return ValueError(
        "The TFLite converter must accept the model. Received: model "
        f"{model.name!r} with the error: {message.strip().splitlines()[0][:300]}"
    )


def _not_builtin(model: keras.Model, serve: Any, operations: list[str]) -> ValueError:
    described = []
    for operation in operations:
        layers = _layers_with(model, serve, operation.removeprefix("Flex"))
        described.append(f"{operation}{f' in layer {layers}' if layers else ''}")
    return ValueError(
        "A model must use only builtin operations of LiteRT; others need TensorFlow on the "
        f"device. Received: model {model.name!r} with {'; '.join(described)}. Replace the layer "
        "that uses it."
    )


def _layers_with(model: keras.Model, serve: Any, operation: str) -> str | None:
    """Returns the innermost layers that use an operation, None if the graph does not use it."""
    graph = serve.graph.as_graph_def()
    nodes = [*graph.node, *(node for one in graph.library.function for node in one.node_def)]
    places = [node.name for node in nodes if node.op == operation]
    if not places:
        return None
    names = {layer.name for layer in model._flatten_layers(include_self=False)}
    found = []
    for place in places:
        # Keras names the scope of a layer after the layer, with a number if it is called again.
        scopes = place.split("/")[:-1]
        scopes = [name if name in names else re.sub(r"_\d+$", "", name) for name in scopes]
        found += [name for name in scopes if name in names][-1:]
    return ", ".join(repr(name) for name in dict.fromkeys(found))
