"""A trained model as a `.tflite` file of builtin operations, run and compared with Keras."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp import checks
from keras_lp.tasks import heads, tasks

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
            least over the tasks; None where no output is a classification.
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
    Regression outputs values. The signature names inputs and outputs as the model does. The file
    is run in LiteRT and compared with Keras on generated inputs before it is put in place.

    Args:
        model: a built Keras model in float32; one from a builder knows its tasks.
        path: where to write.
        quantization: None keeps float32; `"float16"` halves the file; `"dynamic"` stores weights
            in 8 bits, a quarter of the file. Defaults to None.

    Returns:
        An `ExportReport`; print it.

    Raises:
        ValueError: an unknown quantization; a model that is not built or not in float32; an
            operation outside LiteRT's builtin ones. No file is left then.
        ImportError: `ai-edge-litert` is not installed.

    Example:

    ```python
    report = lp.export_tflite(model, "xray.tflite", quantization="dynamic")
    print(report)
    ```
    """
    checks.check_choice("quantization", quantization, [None, "dynamic", "float16"])
    _check_model(model)
    content = _convert(model, quantization)
    report = _compare(model, content, str(path), quantization)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
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
    policies = {layer.dtype_policy.name for layer in model._flatten_layers()}
    if any(policy.startswith("mixed") for policy in policies):
        raise ValueError(
            "export_tflite takes a model in float32. Received: layers with the policies "
            f"{sorted(policies)}. Build it again under "
            "keras.config.set_dtype_policy('float32') and copy the weights with "
            "`set_weights(model.get_weights())`."
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
    signature = {
        tensor.name: tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype, tensor.name)
        for tensor in model.inputs
    }

    @tf.function(input_signature=list(signature.values()))
    def serve(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        return _named_outputs(model, dict(zip(signature, tensors, strict=True)))

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
            "A model for the phone must consist of LiteRT's builtin operations. Received: model "
            f"{model.name!r}, of which the converter says: {error}"
        ) from error


def _named_outputs(model: keras.Model, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Calls the model on inputs by name; returns probabilities and values by output name."""
    flat = [inputs[tensor.name] for tensor in model.inputs]
    packed = flat[0] if len(flat) == 1 else keras.tree.pack_sequence_as(model.input, flat)
    outputs = model(packed, training=False)
    if not isinstance(outputs, Mapping):
        flat_outputs = keras.tree.flatten(outputs)
        outputs = dict(zip(_output_names(model), flat_outputs, strict=True))
    known = tasks(model)
    return {
        name: keras.activations.get(known[name].activation)(output) if name in known else output
        for name, output in outputs.items()
    }


def _output_names(model: keras.Model) -> list[str]:
    return list(heads(model)) or [tensor.name for tensor in model.outputs]


def _compare(
    model: keras.Model, content: bytes, path: str, quantization: str | None
) -> ExportReport:
    inputs = _generated_inputs(model)
    ours = {name: np.asarray(value) for name, value in _named_outputs(model, inputs).items()}
    theirs = _run(content, inputs)
    known = tasks(model)
    agreements = [
        float(np.mean(ours[name].argmax(-1) == theirs[name].argmax(-1)))
        for name in ours
        if (known[name].activation if name in known else "softmax") == "softmax"
        and ours[name].shape[-1] > 1
    ]
    return ExportReport(
        path=path,
        quantization=quantization,
        size=len(content),
        max_difference=max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours),
        top1_agreement=min(agreements) if agreements else None,
        outputs_vary=all(float(np.ptp(value, axis=0).max()) > 1e-6 for value in ours.values()),
        outputs={name: (1, *value.shape[1:]) for name, value in ours.items()},
    )


def _generated_inputs(model: keras.Model) -> dict[str, np.ndarray]:
    """Random inputs by name: images and numbers from 0 to 255, ids that every vocabulary has."""
    rng = np.random.default_rng(0)
    inputs = {}
    for tensor in model.inputs:
        shape = (_EXAMPLES, *tensor.shape[1:])
        if keras.backend.is_float_dtype(tensor.dtype):
            inputs[tensor.name] = rng.uniform(0, 255, shape).astype(tensor.dtype)
        else:
            inputs[tensor.name] = rng.integers(0, 2, shape).astype(tensor.dtype)
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
