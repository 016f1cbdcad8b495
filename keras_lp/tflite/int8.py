"""A float32 file made to compute in 8 bits, with as little change as that allows.

Two errors of plain rounding are put right on the calibration examples:

- The range of an activation is divided into 255 steps. One as wide as the rarest value makes the
  steps wide for all, so the furthest values are cut off.
- Rounding the weights of a layer shifts the mean of what it gives, by more than its noise in
  networks with depthwise convolutions. The bias takes the shift back: bias correction (Nagel et
  al., 2019, Data-Free Quantization Through Weight Equalization and Bias Correction,
  arXiv:1906.04721).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flatbuffers
import numpy as np
import tensorflow as tf
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.python.convert import mlir_quantize

from keras_lp.tflite.runtime import load_interpreter

_CUT_OFF = 3e-5  # share of an activation's values at either end
_DRAWN = 1000  # values of an activation that a batch tells of
_CONV, _DEPTHWISE, _DENSE = (
    schema.BuiltinOperator.CONV_2D,
    schema.BuiltinOperator.DEPTHWISE_CONV_2D,
    schema.BuiltinOperator.FULLY_CONNECTED,
)


def quantize(content: bytes, batches: Iterable[Mapping[str, np.ndarray]]) -> bytes:
    """Returns a file that computes in 8 bits.

    Args:
        content: a float32 file of one subgraph with one signature.
        batches: calibration, inputs by their names in the signature.

    Raises:
        ImportError: `ai-edge-litert` is not installed.
    """
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    graph = model.subgraphs[0]
    layers = list(_layers(model))
    activations = _activations(graph)
    drawn: dict[int, list[np.ndarray]] = {index: [] for index in activations}
    means = [[] for _ in layers]
    rng = np.random.default_rng(0)
    for values in _runs(content, batches):
        for index in activations:
            drawn[index].append(_draw(values(index).ravel(), rng))
        for layer, seen in zip(layers, means, strict=True):
            seen.append(layer.mean_patch(values(layer.operator.inputs[0])))
    for index, parts in drawn.items():
        low, high = _range(np.concatenate(parts))
        graph.tensors[index].quantization = schema.QuantizationParametersT(min=[low], max=[high])
    for layer, seen in zip(layers, means, strict=True):
        _set_bias(model, layer, layer.bias - layer.shift(np.mean(seen, axis=0)))
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return mlir_quantize(bytes(builder.Output()))


def rounded(weights: np.ndarray, axis: int) -> np.ndarray:
    """Weights as they are after 8 bits: 127 steps either way for each entry of an axis."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    step = np.abs(weights).max(axis=others, keepdims=True) / 127
    return np.round(weights / np.where(step > 0, step, 1.0)) * step


@dataclasses.dataclass(frozen=True)
class _Layer:
    """An operation with weights.

    Attributes:
        kind: of the operation.
        operator: the operation.
        weights: `(units, height, width, channels of a group)`, depthwise
            `(1, height, width, units)`, dense `(units, inputs)`.
        bias: `(units,)`.
    """

    kind: int
    operator: schema.OperatorT
    weights: np.ndarray
    bias: np.ndarray

    def mean_patch(self, x: np.ndarray) -> np.ndarray:
        """What a unit's weights meet on the mean: `(height, width, channels)` or `(inputs,)`."""
        if self.kind == _DENSE:
            return x.reshape(-1, self.weights.shape[1]).mean(axis=0)
        height, width = self.weights.shape[1:3]
        options = self.operator.builtinOptions
        patches = tf.image.extract_patches(
            x,
            [1, height, width, 1],
            [1, options.strideH, options.strideW, 1],
            [1, options.dilationHFactor, options.dilationWFactor, 1],
            "SAME" if options.padding == schema.Padding.SAME else "VALID",
        )
        return np.mean(patches, axis=(0, 1, 2)).reshape(height, width, -1)

    def shift(self, patch: np.ndarray) -> np.ndarray:
        """How far rounding the weights moves the mean of each unit."""
        axis = self.weights.ndim - 1 if self.kind == _DEPTHWISE else 0
        error = rounded(self.weights, axis) - self.weights
        if self.kind == _DENSE:
            return error @ patch
        if self.kind == _DEPTHWISE:
            units = error.shape[-1] // patch.shape[-1]  # a channel
            return np.sum(error[0] * np.repeat(patch, units, axis=-1), axis=(0, 1))
        groups = patch.shape[-1] // error.shape[-1]
        error = error.reshape(groups, -1, *error.shape[1:])
        return np.einsum(
            "guhwc,hwgc->gu", error, patch.reshape(*patch.shape[:2], groups, -1)
        ).ravel()


def _layers(model: schema.ModelT) -> Iterator[_Layer]:
    for operator in model.subgraphs[0].operators:
        kind = model.operatorCodes[operator.opcodeIndex].builtinCode
        if kind not in (_CONV, _DEPTHWISE, _DENSE):
            continue
        weights = _constant(model, operator.inputs[1])
        if weights is None:  # a product of two activations
            continue
        units = weights.shape[-1 if kind == _DEPTHWISE else 0]
        has_bias = len(operator.inputs) > 2 and operator.inputs[2] >= 0
        bias = _constant(model, operator.inputs[2]) if has_bias else np.zeros(units)
        if bias is not None:
            yield _Layer(kind, operator, weights, bias)


def _constant(model: schema.ModelT, index: int) -> np.ndarray | None:
    """The value of a float32 tensor, None where it is computed."""
    tensor = model.subgraphs[0].tensors[index]
    data = model.buffers[tensor.buffer].data
    if tensor.type != schema.TensorType.FLOAT32 or data is None or len(data) == 0:
        return None
    return np.asarray(data, "uint8").view("<f4").reshape(tensor.shape).astype("float64")


def _set_bias(model: schema.ModelT, layer: _Layer, bias: np.ndarray) -> None:
    """Gives a layer a bias of its own: files share constants that are equal."""
    buffer = schema.BufferT()
    buffer.data = bias.astype("<f4").view("uint8")
    tensor = schema.TensorT()
    tensor.name = model.subgraphs[0].tensors[layer.operator.outputs[0]].name + b"/bias"
    tensor.shape, tensor.type = [len(bias)], schema.TensorType.FLOAT32
    tensor.buffer = len(model.buffers)
    model.buffers.append(buffer)
    model.subgraphs[0].tensors.append(tensor)
    index = len(model.subgraphs[0].tensors) - 1
    layer.operator.inputs = [*layer.operator.inputs[:2], index]


def _activations(graph: schema.SubGraphT) -> list[int]:
    """The tensors of numbers that are computed, and the inputs."""
    given = [index for operator in graph.operators for index in operator.outputs]
    float32 = schema.TensorType.FLOAT32
    return [i for i in (*graph.inputs, *given) if graph.tensors[i].type == float32]


def _runs(content: bytes, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Any]:
    """For each batch, what returns the value of a tensor."""
    interpreter = load_interpreter(content, keep_all=True)
    run = interpreter.get_signature_runner()
    for batch in batches:
        run(**batch)
        yield interpreter.get_tensor


def _draw(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    few = len(values) <= _DRAWN
    return values.copy() if few else values[rng.integers(len(values), size=_DRAWN)]


def _range(values: np.ndarray) -> tuple[float, float]:
    """The range without its ends, among few values all of it."""
    low = np.quantile(values, _CUT_OFF, method="lower")
    high = np.quantile(values, 1 - _CUT_OFF, method="higher")
    return float(low), float(high)
