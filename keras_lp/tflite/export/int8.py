"""Quantizes a float32 file to 8-bit integer computation.

The activations are measured on the calibration examples. Three steps make the result more accurate
than plain rounding:

- Clipping: the range of an activation is divided into 255 steps. A few outliers would make every
  step wider, so the most extreme values are cut off.
- Bias correction: rounding the weights of a layer shifts the mean of its output. In networks with
  depthwise convolutions the shift exceeds the rounding noise. The biases of convolutions and dense
  layers compensate for it (Nagel et al., 2019, Data-Free Quantization Through Weight Equalization
  and Bias Correction, arXiv:1906.04721).
- Head correction: the last dense layer of each head compensates for the shift that is left, see
  `correction`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from keras_lp.tflite.device.runtime import load_interpreter
from keras_lp.tflite.export.correction import affine_map
from keras_lp.tflite.flatbuffer import quantize_model, read_model, schema
from keras_lp.utils.progress import Progress

_CUT_OFF = 3e-5  # share of the nonzero values that is cut off at each end
_DRAWN = 1000  # sampled values per activation and example
_CONV, _DEPTHWISE, _DENSE = (
    schema.BuiltinOperator.CONV_2D,
    schema.BuiltinOperator.DEPTHWISE_CONV_2D,
    schema.BuiltinOperator.FULLY_CONNECTED,
)
_AFTER_HEAD = (  # operations between the last dense layer of a head and its output
    schema.BuiltinOperator.SOFTMAX,
    schema.BuiltinOperator.LOGISTIC,
    schema.BuiltinOperator.RESHAPE,
)

Batches = Sequence[Mapping[str, np.ndarray]]


def quantize(
    content: bytes,
    batches: Batches,
    heads: Collection[str] = (),
    progress: Progress | None = None,
) -> bytes:
    """Returns a file that computes in 8 bits.

    Args:
        content: a float32 file with one subgraph and one signature.
        batches: calibration batches, each a dict of inputs by their names in the signature.
        heads: names of the outputs whose last dense layers are corrected. Defaults to none.
        progress: gets a step per batch, and another one if there are heads. Defaults to None.

    Raises:
        ValueError: an activation is not finite.
        ImportError: `ai-edge-litert` is not installed.
    """
    model = read_model(content)
    graph = model.subgraphs[0]
    layers = list(_layers(model))
    last = _last_layers(model, layers, heads)
    wanted: dict[str, list[np.ndarray]] = {name: [] for name in last}
    activations = {index: _Activation() for index in _computed(graph)}
    rng = np.random.default_rng(0)
    for value_of, examples in _runs(content, batches):
        for index, activation in activations.items():
            activation.see(value_of(index).ravel(), _DRAWN * examples, rng)
        for layer in layers:
            layer.see(value_of(layer.operator.inputs[0]))
        for name, layer in last.items():
            wanted[name].append(value_of(layer.operator.outputs[0]))
        if progress is not None:
            progress.step()
    for index, activation in activations.items():
        tensor = graph.tensors[index]
        low, high = activation.range(tensor.name.decode())
        tensor.quantization = schema.QuantizationParametersT(min=[low], max=[high])
    for layer in layers:
        _set_bias(model, layer, layer.bias - layer.shift())
    given = _quantized_outputs(model, last, batches, progress) if last else {}
    for name, layer in last.items():
        layer.apply(*affine_map(np.concatenate(given[name]), np.concatenate(wanted[name])))
        _set_constant(model, layer, 1, layer.weights[:, 0, 0])
        _set_bias(model, layer, layer.bias - layer.shift())
    return quantize_model(model)


def as_stored(weights: np.ndarray) -> np.ndarray:
    """Rounds weights `(units, ...)` to int8: the largest of each unit becomes 127 steps."""
    step = np.abs(weights).max(axis=tuple(range(1, weights.ndim)), keepdims=True) / 127
    return np.round(weights / np.where(step > 0, step, 1.0)) * step


class _Activation:
    """Statistics of the values of a tensor."""

    def __init__(self) -> None:
        self._least, self._most, self._finite = np.inf, -np.inf, True
        self._drawn: list[np.ndarray] = []

    def see(self, values: np.ndarray, count: int, rng: np.random.Generator) -> None:
        """Updates the statistics with a batch and samples at most `count` of its values."""
        self._least = min(self._least, values.min())
        self._most = max(self._most, values.max())
        self._finite = self._finite and bool(np.isfinite(values).all())
        if len(values) > count:
            values = values[rng.integers(len(values), size=count)]
        self._drawn.append(values[values != 0])

    def range(self, name: str) -> tuple[float, float]:
        """Returns the clipped range, or the full range if the sample is too small to clip."""
        if not self._finite:
            raise ValueError(
                "The activations of an int8 model must be finite on the calibration data. "
                f"Received: values that are not, in {name!r}. Pass calibration examples on which "
                "the outputs of the model are finite."
            )
        drawn = np.concatenate(self._drawn)
        if len(drawn) * _CUT_OFF < 1:
            return float(self._least), float(self._most)
        low, high = np.quantile(drawn, [_CUT_OFF, 1 - _CUT_OFF])
        return float(low), float(high)


@dataclasses.dataclass
class _Layer:
    """An operation that has weights.

    Attributes:
        operator: the operation.
        dense: whether it is a dense layer.
        weights: `(units, height, width, channels per group)`; 1 by 1 if dense.
        bias: `(units,)`.
        patches: the mean input patch of each batch, `(height, width, channels)`.
    """

    operator: schema.OperatorT
    dense: bool
    weights: np.ndarray
    bias: np.ndarray
    patches: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def is_linear(self) -> bool:
        """Whether the operation has no activation such as relu."""
        fused = self.operator.builtinOptions.fusedActivationFunction
        return bool(fused == schema.ActivationFunctionType.NONE)

    def see(self, x: np.ndarray) -> None:
        """Updates `patches` with the input of a batch."""
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
        """Returns the shift of the mean of each unit that rounding the weights causes."""
        patch = np.mean(self.patches, axis=0)
        weights = self.weights.astype("float64")
        channels = weights.shape[-1]
        groups = patch.shape[-1] // channels
        error = (as_stored(weights) - weights).reshape(groups, -1, *weights.shape[1:])
        grouped = patch.reshape(*patch.shape[:2], groups, channels)
        return np.einsum("guhwc,hwgc->gu", error, grouped).ravel()

    def apply(self, matrix: np.ndarray, shift: np.ndarray) -> None:
        """Changes the layer so that it returns `outputs @ matrix + shift`."""
        self.weights = np.einsum("uv,uhwc->vhwc", matrix, self.weights)
        self.bias = self.bias @ matrix + shift


def _layers(model: schema.ModelT) -> Iterator[_Layer]:
    for operator in model.subgraphs[0].operators:
        kind = model.operatorCodes[operator.opcodeIndex].builtinCode
        if kind not in (_CONV, _DEPTHWISE, _DENSE):
            continue
        weights = _constant(model, operator.inputs[1])
        if weights is None:  # the product of two activations
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
    """Returns the value of a constant float32 tensor, None if it is not constant."""
    tensor = model.subgraphs[0].tensors[index]
    data = model.buffers[tensor.buffer].data
    if tensor.type != schema.TensorType.FLOAT32 or data is None or len(data) == 0:
        return None
    return np.asarray(data, "uint8").view("<f4").reshape(tensor.shape)


def _last_layers(
    model: schema.ModelT, layers: Sequence[_Layer], heads: Collection[str]
) -> dict[str, _Layer]:
    """Returns the dense layer that computes the logits, or values, of each head.

    A head without one is left out.
    """
    by_output = {layer.operator.outputs[0]: layer for layer in layers if layer.dense}
    producers = {one.outputs[0]: one for one in model.subgraphs[0].operators}
    found: dict[str, _Layer] = {}
    for output in model.signatureDefs[0].outputs:
        index = output.tensorIndex
        while index not in by_output and index in producers:
            operator = producers[index]
            if model.operatorCodes[operator.opcodeIndex].builtinCode not in _AFTER_HEAD:
                break
            index = operator.inputs[0]
        layer, name = by_output.get(index), output.name.decode()
        taken = any(layer is one for one in found.values())  # two outputs of one head
        if name in heads and layer is not None and layer.is_linear and not taken:
            found[name] = layer
    return found


def _set_bias(model: schema.ModelT, layer: _Layer, bias: np.ndarray) -> None:
    """Sets the bias of a layer."""
    _set_constant(model, layer, 2, bias)


def _set_constant(model: schema.ModelT, layer: _Layer, position: int, value: np.ndarray) -> None:
    """Gives a layer its own tensor of weights or biases, because files share equal constants."""
    buffer = schema.BufferT()
    buffer.data = value.astype("<f4").view("uint8").ravel()
    tensor = schema.TensorT()
    output = model.subgraphs[0].tensors[layer.operator.outputs[0]].name
    tensor.name = output + (b"/weights", b"/bias")[position - 1]
    tensor.shape, tensor.type = list(value.shape), schema.TensorType.FLOAT32
    tensor.buffer = len(model.buffers)
    model.buffers.append(buffer)
    model.subgraphs[0].tensors.append(tensor)
    inputs = [*layer.operator.inputs, -1][:3]
    inputs[position] = len(model.subgraphs[0].tensors) - 1
    layer.operator.inputs = inputs


def _quantized_outputs(
    model: schema.ModelT, last: Mapping[str, _Layer], batches: Batches, progress: Progress | None
) -> dict[str, list[np.ndarray]]:
    """Runs the int8 file on each batch; returns what the last dense layers give."""
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    kept = graph.outputs, signature.outputs
    graph.outputs, signature.outputs = [], []
    for name, layer in last.items():
        output = schema.TensorMapT()
        output.name, output.tensorIndex = name.encode(), layer.operator.outputs[0]
        graph.outputs.append(output.tensorIndex)
        signature.outputs.append(output)
    content = quantize_model(model)
    graph.outputs, signature.outputs = kept
    run = load_interpreter(content).get_signature_runner()
    results = []
    for batch in batches:
        results.append(run(**batch))
        if progress is not None:
            progress.step()
    return {name: [one[name] for one in results] for name in last}


def _computed(graph: schema.SubGraphT) -> list[int]:
    """Returns the indices of the float32 inputs and activations."""
    given = [index for operator in graph.operators for index in operator.outputs]
    float32 = schema.TensorType.FLOAT32
    return [i for i in (*graph.inputs, *given) if graph.tensors[i].type == float32]


def _runs(content: bytes, batches: Batches) -> Iterator[tuple[Callable[[int], np.ndarray], int]]:
    """Runs each batch; yields a getter of tensor values and the number of examples."""
    interpreter = load_interpreter(content, keep_all=True)
    run = interpreter.get_signature_runner()
    for batch in batches:
        run(**batch)
        yield interpreter.get_tensor, len(next(iter(batch.values())))
