"""A float32 file made to compute in 8 bits, with as little change as that allows.

The activations are measured on the calibration examples, which also serve to do better than to
round:

- The range of an activation is divided into 255 steps. One as wide as the rarest value makes the
  steps wide for all, so the furthest values are cut off.
- Rounding the weights of a layer shifts the mean of what it gives, by more than its noise in
  networks with depthwise convolutions. In convolutions and dense layers the bias takes the shift
  back: bias correction (Nagel et al., 2019, Data-Free Quantization Through Weight Equalization and
  Bias Correction, arXiv:1906.04721).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import flatbuffers
import numpy as np
import tensorflow as tf
from tensorflow.lite.python import schema_py_generated as schema

from keras_lp.tflite.device.runtime import load_interpreter

_CUT_OFF = 3e-5  # share of the values other than 0, at either end
_DRAWN = 1000  # values of an activation, an example
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
        ValueError: an activation that is not finite.
        ImportError: `ai-edge-litert` is not installed.
    """
    # TensorFlow's own converter ends with this call; only here it can be given other ranges.
    from tensorflow.lite.python.convert import mlir_quantize

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    graph = model.subgraphs[0]
    layers = list(_layers(model))
    activations = {index: _Activation() for index in _computed(graph)}
    rng = np.random.default_rng(0)
    for value_of, examples in _runs(content, batches):
        for index, activation in activations.items():
            activation.see(value_of(index).ravel(), _DRAWN * examples, rng)
        for layer in layers:
            layer.see(value_of(layer.operator.inputs[0]))
    for index, activation in activations.items():
        tensor = graph.tensors[index]
        low, high = activation.range(tensor.name.decode())
        tensor.quantization = schema.QuantizationParametersT(min=[low], max=[high])
    for layer in layers:
        _set_bias(model, layer, layer.bias - layer.shift())
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return mlir_quantize(bytes(builder.Output()))


def as_stored(weights: np.ndarray) -> np.ndarray:
    """Weights `(units, ...)` as int8 stores them: in steps, of which a unit's largest is 127."""
    step = np.abs(weights).max(axis=tuple(range(1, weights.ndim)), keepdims=True) / 127
    return np.round(weights / np.where(step > 0, step, 1.0)) * step


class _Activation:
    """What is known of the values of a tensor."""

    def __init__(self) -> None:
        self._least, self._most, self._finite = np.inf, -np.inf, True
        self._drawn: list[np.ndarray] = []

    def see(self, values: np.ndarray, count: int, rng: np.random.Generator) -> None:
        """Takes the values of a batch into account, at most `count` of them as draws."""
        self._least = min(self._least, values.min())
        self._most = max(self._most, values.max())
        self._finite = self._finite and bool(np.isfinite(values).all())
        if len(values) > count:
            values = values[rng.integers(len(values), size=count)]
        self._drawn.append(values[values != 0])

    def range(self, name: str) -> tuple[float, float]:
        """The range without its rarest values, all of it where the draws do not tell these."""
        if not self._finite:
            raise ValueError(
                "What a model for int8 computes on the calibration data must be finite. Received: "
                f"values that are not, in {name!r}. Calibrate on examples on which the model "
                "gives numbers."
            )
        drawn = np.concatenate(self._drawn)
        if len(drawn) * _CUT_OFF < 1:
            return float(self._least), float(self._most)
        low, high = np.quantile(drawn, [_CUT_OFF, 1 - _CUT_OFF])
        return float(low), float(high)


@dataclasses.dataclass
class _Layer:
    """An operation with weights.

    Attributes:
        operator: the operation.
        dense: whether it is a dense layer.
        weights: `(units, height, width, channels of a group)`; 1 by 1 if dense.
        bias: `(units,)`.
        patches: for each batch the mean patch that the weights meet, `(height, width, channels)`.
    """

    operator: schema.OperatorT
    dense: bool
    weights: np.ndarray
    bias: np.ndarray
    patches: list[np.ndarray] = dataclasses.field(default_factory=list)

    def see(self, x: np.ndarray) -> None:
        """Takes the input of a batch into account."""
        _, height, width, channels = self.weights.shape
        if self.dense:
            self.patches.append(x.reshape(-1, 1, 1, channels).mean(axis=0, dtype="float64"))
            return
        options = self.operator.builtinOptions
        patches = tf.image.extract_patches(
            x.mean(axis=0, keepdims=True, dtype="float64"),
            [1, height, width, 1],
            [1, options.strideH, options.strideW, 1],
            [1, options.dilationHFactor, options.dilationWFactor, 1],
            "SAME" if options.padding == schema.Padding.SAME else "VALID",
        )
        self.patches.append(np.mean(patches, axis=(0, 1, 2)).reshape(height, width, -1))

    def shift(self) -> np.ndarray:
        """How far rounding the weights moves the mean of each unit."""
        patch = np.mean(self.patches, axis=0)
        weights = self.weights.astype("float64")
        channels = weights.shape[-1]
        groups = patch.shape[-1] // channels
        error = (as_stored(weights) - weights).reshape(groups, -1, *weights.shape[1:])
        grouped = patch.reshape(*patch.shape[:2], groups, channels)
        return np.einsum("guhwc,hwgc->gu", error, grouped).ravel()


def _layers(model: schema.ModelT) -> Iterator[_Layer]:
    for operator in model.subgraphs[0].operators:
        kind = model.operatorCodes[operator.opcodeIndex].builtinCode
        if kind not in (_CONV, _DEPTHWISE, _DENSE):
            continue
        weights = _constant(model, operator.inputs[1])
        if weights is None:  # a product of two activations
            continue
        if kind == _DENSE:
            weights = weights[:, None, None]
        if kind == _DEPTHWISE:  # from (1, height, width, units)
            weights = weights.transpose(3, 1, 2, 0)
        has_bias = len(operator.inputs) > 2 and operator.inputs[2] >= 0
        bias = _constant(model, operator.inputs[2]) if has_bias else np.zeros(len(weights))
        if bias is not None:
            yield _Layer(operator, kind == _DENSE, weights, bias)


def _constant(model: schema.ModelT, index: int) -> np.ndarray | None:
    """The value of a float32 tensor, None where it is computed."""
    tensor = model.subgraphs[0].tensors[index]
    data = model.buffers[tensor.buffer].data
    if tensor.type != schema.TensorType.FLOAT32 or data is None or len(data) == 0:
        return None
    return np.asarray(data, "uint8").view("<f4").reshape(tensor.shape)


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


def _computed(graph: schema.SubGraphT) -> list[int]:
    """The inputs and results that are float32."""
    given = [index for operator in graph.operators for index in operator.outputs]
    float32 = schema.TensorType.FLOAT32
    return [i for i in (*graph.inputs, *given) if graph.tensors[i].type == float32]


def _runs(
    content: bytes, batches: Iterable[Mapping[str, np.ndarray]]
) -> Iterator[tuple[Callable[[int], np.ndarray], int]]:
    """Runs each batch; yields what gives the value of a tensor, and the number of examples."""
    interpreter = load_interpreter(content, keep_all=True)
    run = interpreter.get_signature_runner()
    for batch in batches:
        run(**batch)
        yield interpreter.get_tensor, len(next(iter(batch.values())))
