"""Converts a Keras model to the bytes of a `.tflite` file of builtin operations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.tflite.contents import foreign_operations
from keras_lp.tflite.export.int8 import quantize
from keras_lp.tflite.interface import Interface
from keras_lp.utils.arguments import Verbose
from keras_lp.utils.files import check_scratch_space
from keras_lp.utils.keras_internals import sublayers
from keras_lp.utils.progress import Progress

_LOOPS = ("While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase")


def convert(
    described: Interface,
    quantization: str | None = None,
    calibration: Sequence[np.ndarray] = (),
    batch_size: int = 1,
    verbose: Verbose = 0,
) -> bytes:
    """Converts a model to the bytes of a `.tflite` file.

    Args:
        described: a model that computes in float32, for `"int8"` without loops.
        quantization: see `export_tflite`.
        calibration: for `"int8"`, the calibration inputs, in the order of the model's.
        batch_size: number of examples per call.
        verbose: how to show the progress of the calibration, see `Progress`.

    Raises:
        ValueError: the model uses an operation that is not builtin, the converter rejects it, or
            for `"int8"` an activation is not finite.
        ImportError: `"int8"` needs `ai-edge-litert`, which is not installed.
        OSError: the disk of the temporary files is full.
    """
    model = described.model
    check_scratch_space(weight_bytes(model))
    serve, module = _serving_function(described, batch_size)
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
    batches = _batches(described.input_names, calibration, batch_size)
    heads = [output.name for output in described.outputs if output.task is not None]
    try:
        steps = len(batches) * (2 if heads else 1)
        with Progress("Calibration", steps, verbose) as progress:
            return quantize(content, batches, heads, progress)
    except RuntimeError as error:
        raise ValueError(
            "LiteRT must be able to run an int8 model on the calibration data. Received: model "
            f"{model.name!r} with the error: {error}. Export with quantization='dynamic'."
        ) from error


def weight_bytes(model: keras.Model) -> int:
    """Returns the size of the weights of a model in bytes."""
    return sum(variable.numpy().nbytes for variable in model.variables)


def _serving_function(described: Interface, batch_size: int) -> tuple[Any, tf.Module]:
    # The tracked object must hold the variables, not the model. If it holds the model, the
    # converter succeeds but drops the weights.
    module = tf.Module()
    module.held = [variable.value for variable in described.model.variables]
    specs = [
        tf.TensorSpec((batch_size, *one.shape), one.dtype, one.name) for one in described.inputs
    ]

    @tf.function(input_signature=specs)
    def serve(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            output.name: keras.activations.get(output.activation)(value)
            for output, value in zip(described.outputs, described.call(tensors), strict=True)
        }

    module.serve = serve
    return serve.get_concrete_function(), module


def _batches(
    names: Sequence[str], arrays: Sequence[np.ndarray], batch_size: int
) -> list[dict[str, np.ndarray]]:
    """Returns full calibration batches; too few examples for one batch are repeated."""
    count = len(arrays[0])
    starts = range(0, max(count - batch_size, 0) + 1, batch_size)
    rows = [np.arange(start, start + batch_size) % count for start in starts]
    return [{n: array[one] for n, array in zip(names, arrays, strict=True)} for one in rows]


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
        f"{model.name!r} with the error: {message.strip().splitlines()[0][:300]}. Change the layer "
        "that the error names, or use another quantization."
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
    names = {layer.name for layer in sublayers(model, include_self=False)}
    found = []
    for place in places:
        # Keras names the scope of a layer after the layer, with a number if it is called again.
        scopes = place.split("/")[:-1]
        scopes = [name if name in names else re.sub(r"_\d+$", "", name) for name in scopes]
        found += [name for name in scopes if name in names][-1:]
    return ", ".join(repr(name) for name in dict.fromkeys(found))
