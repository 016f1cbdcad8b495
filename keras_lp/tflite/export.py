"""A trained model as a `.tflite` file of builtin operations, run and compared with Keras."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp import checks
from keras_lp.heads import Head
from keras_lp.model import input_structure

_EXAMPLES = 64  # generated inputs of the comparison


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export_tflite` wrote, and how it compares with Keras on generated inputs.

    Attributes:
        path: the file.
        quantization: None, `"dynamic"` or `"float16"`.
        size: bytes of the file.
        max_difference: largest absolute difference of any output between LiteRT and Keras.
        top1_agreement: share of the inputs for which both give the same most probable class, the
            least over the classifying outputs; None where there is none.
        outputs_vary: whether Keras's outputs differ between the inputs. If not, the comparison
            proves nothing.
        outputs: the names of the outputs in the file's signature, with their shapes.
    """

    path: str
    quantization: str | None
    size: int
    max_difference: float
    top1_agreement: float | None
    outputs_vary: bool
    outputs: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        agreement = (
            "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.1%}"
        )
        verdict = (
            f"largest difference from Keras {self.max_difference:.1e}{agreement}"
            if self.outputs_vary
            else "cannot be verified: the outputs do not vary over generated inputs"
        )
        outputs = ", ".join(f"{name}{list(shape)}" for name, shape in self.outputs.items())
        return (
            f"{self.path}: {self.size / 1024:,.1f} KiB, {self.quantization or 'float32'}, "
            f"outputs {outputs}; {verdict}"
        )


def export_tflite(
    model: keras.Model, path: str | os.PathLike, *, quantization: str | None = None
) -> ExportReport:
    """Writes a model as a `.tflite` file that any LiteRT runtime runs, one example at a time.

    Classification outputs are probabilities (softmax), MultiLabel outputs too (sigmoid), and
    Regression outputs values; a model that keras_lp did not build is exported as it is. The
    signature names outputs as the model does, and inputs too (`input` where they have no name). The
    file is run in LiteRT and compared with Keras on generated inputs before it is put in place.

    Args:
        model: a built Keras model in float32; one from a builder knows its tasks.
        path: where to write.
        quantization: None keeps float32; `"float16"` halves the file; `"dynamic"` stores weights
            in 8 bits, a quarter of the file. Defaults to None.

    Returns:
        An `ExportReport`; print it.

    Raises:
        ValueError: an unknown quantization; a model that is not built or not in float32; an
            operation outside LiteRT's builtin ones; a path that is a folder. No file is left.
        TypeError: anything else than a Keras model.
        ImportError: `ai-edge-litert` is not installed.

    Example:

    ```python
    report = lp.export_tflite(model, "xray.tflite", quantization="dynamic")
    print(report)
    ```
    """
    checks.check_choice("quantization", quantization, [None, "dynamic", "float16"])
    _check_model(model)
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"`path` must be a file to write. Received: the folder {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _convert(model, quantization)
    report = _compare(model, content, str(path), quantization)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return report


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(f"export_tflite takes a Keras model. Received: model={model!r}.")
    if not model.built or not getattr(model, "inputs", None):
        raise ValueError(
            "export_tflite takes a model that knows its inputs. Received: model "
            f"{model.name!r} of type {type(model).__name__}, which does not. Build it as a "
            "Functional or Sequential model."
        )
    types = {layer.compute_dtype for layer in model._flatten_layers()} - {"float32", None}
    if types & {"float16", "bfloat16", "float64"}:
        raise ValueError(
            "export_tflite takes a model in float32. Received: layers that compute in "
            f"{sorted(types)}. Build it again under keras.config.set_dtype_policy('float32') and "
            "copy the weights with `set_weights(model.get_weights())`."
        )
    names = [*_input_names(model), *(output.name for output in _outputs(model))]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
            raise ValueError(
                "Inputs and outputs of a .tflite file have names of letters, digits, dots and "
                f"underscores. Received: {name!r}. Build the model with other names."
            )
    for tensor in model.inputs:
        if None in tensor.shape[1:]:
            raise ValueError(
                "A .tflite file has inputs of one size. Received: input "
                f"{tensor.name!r} of shape {tuple(tensor.shape)}. Build the model with "
                "`input_shape`."
            )


def _convert(model: keras.Model, quantization: str | None) -> bytes:
    # The tracked object must hold the variables, not the model: with the model the converter
    # succeeds and leaves the weights out.
    module = tf.Module()
    module.held = [variable.value for variable in model.variables]
    specs = [
        tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype, name)
        for name, tensor in zip(_input_names(model), model.inputs, strict=True)
    ]
    outputs = _outputs(model)

    @tf.function(input_signature=specs)
    def serve(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        raw = _call(model, tensors)
        return {
            output.name: keras.activations.get(output.activation)(value)
            for output, value in zip(outputs, raw, strict=True)
        }

    module.serve = serve
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [serve.get_concrete_function()], module
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if quantization is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    try:
        return converter.convert()
    except Exception as error:
        raise ValueError(
            "The converter must accept a model for the phone, whose operations are LiteRT's "
            f"builtin operations only. Received: model {model.name!r}, of which it says: {error}"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Output:
    name: str
    activation: str  # what the export adds
    is_classes: bool  # whether the largest entry is the answer


def _outputs(model: keras.Model) -> list[_Output]:
    """Describes the outputs of a model in the order of `keras.tree.flatten`."""
    structure = None if isinstance(model, keras.Sequential) else model.output
    names = sorted(structure) if isinstance(structure, Mapping) else _unique(model)
    described = []
    for name, tensor in zip(names, model.outputs, strict=True):
        layer = tensor._keras_history.operation
        activation = layer.task.activation if isinstance(layer, Head) else "linear"
        softmax = isinstance(layer, keras.layers.Softmax) or (
            getattr(layer, "activation", None) is keras.activations.softmax
        )
        described.append(_Output(name, activation, softmax or activation == "softmax"))
    return described


def _unique(model: keras.Model) -> list[str]:
    counts: dict[str, int] = {}
    names = []
    for name in (tensor._keras_history.operation.name for tensor in model.outputs):
        counts[name] = counts.get(name, 0) + 1
        names.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return names


def _input_names(model: keras.Model) -> list[str]:
    """The names of the inputs; "input" where the user gave none (Keras counts through)."""
    several = len(model.inputs) > 1
    return [
        (f"input_{i}" if several else "input")
        if re.fullmatch(r"keras_tensor(_\d+)?|input_layer(_\d+)?", tensor.name)
        else tensor.name
        for i, tensor in enumerate(model.inputs)
    ]


def _call(model: keras.Model, tensors: Sequence[Any]) -> list[Any]:
    """Calls a model on its inputs in order; returns its outputs in order."""
    structure = input_structure(model)
    packed = keras.tree.pack_sequence_as(structure, list(tensors))
    return keras.tree.flatten(model(packed, training=False))


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


# In NumPy: the comparison must not stand on what it checks.
_ACTIVATIONS = {
    "linear": lambda x: x,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softmax": _softmax,
}


def _compare(
    model: keras.Model, content: bytes, path: str, quantization: str | None
) -> ExportReport:
    inputs = _generated_inputs(model)
    theirs = _run(content, dict(zip(_input_names(model), inputs, strict=True)))
    ours, agreements = {}, []
    for output, raw in zip(_outputs(model), _call(model, inputs), strict=True):
        raw = np.asarray(raw, "float64")
        ours[output.name] = _ACTIVATIONS[output.activation](raw)
        if output.is_classes:
            same = raw.argmax(-1) == theirs[output.name].argmax(-1)
            agreements.append(float(same.mean()))
    return ExportReport(
        path=path,
        quantization=quantization,
        size=len(content),
        max_difference=max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours),
        top1_agreement=min(agreements) if agreements else None,
        outputs_vary=all(float(np.ptp(value, axis=0).max()) > 1e-6 for value in ours.values()),
        outputs={name: (1, *value.shape[1:]) for name, value in ours.items()},
    )


def _generated_inputs(model: keras.Model) -> list[np.ndarray]:
    """Random inputs in order: numbers and pictures from 0 to 255, ids every vocabulary has."""
    rng = np.random.default_rng(0)
    inputs = []
    for tensor in model.inputs:
        shape = (_EXAMPLES, *tensor.shape[1:])
        if keras.backend.is_float_dtype(tensor.dtype):
            inputs.append(rng.uniform(0, 255, shape).astype(tensor.dtype))
        else:
            largest = 256 if tensor.dtype == "uint8" else 2
            inputs.append(rng.integers(0, largest, shape).astype(tensor.dtype))
    return inputs


def _run(content: bytes, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs a file in LiteRT, example by example."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError(
            "export_tflite runs the file it writes, which needs the LiteRT runtime. Install it: "
            "pip install 'keras_lp[phone]'"
        ) from error
    runner = Interpreter(model_content=content).get_signature_runner()
    rows = [
        runner(**{name: array[i : i + 1] for name, array in inputs.items()})
        for i in range(_EXAMPLES)
    ]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
