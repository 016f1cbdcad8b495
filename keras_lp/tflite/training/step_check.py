"""Compares one training step of a file in LiteRT with the same step in TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.finetuning.layerwise import with_multipliers
from keras_lp.tflite.device.exchange import VERSION
from keras_lp.tflite.device.runtime import load_interpreter
from keras_lp.tflite.export.examples import generate_texts
from keras_lp.tflite.interface import vocabulary_sizes
from keras_lp.tflite.training.signatures import DeviceModel, input_specs

_TOLERANCE = 1e-2  # relative; the first step of Adam divides by gradients near 0


@dataclasses.dataclass(frozen=True)
class StepCheck:
    """One training step on generated examples in LiteRT, compared with TensorFlow.

    Attributes:
        loss: the loss in LiteRT before the step.
        loss_difference: its relative difference from the loss in TensorFlow.
        step_difference: the norm of the difference of the two steps, relative to the step in
            TensorFlow; None if that step is 0, which proves nothing.
    """

    loss: float
    loss_difference: float
    step_difference: float | None

    def __str__(self) -> str:
        if self.step_difference is None:
            return "cannot be verified: a step on generated examples changes no weight"
        return (
            "relative difference from TensorFlow on generated examples: training step "
            f"{self.step_difference:.1e}, loss {self.loss_difference:.1e}"
        )


def check_step(
    content: bytes,
    device_model: DeviceModel,
    trained: Sequence[str],
    batch_size: int,
    optimizer: str,
    rates: Sequence[float],
) -> StepCheck:
    """Runs a training step of a file in LiteRT, and the same step in TensorFlow and Keras.

    Raises:
        ValueError: the relative difference of the loss or the step is more than 0.01, or a weight
            that does not train changes.
        ImportError: `ai-edge-litert` is not installed.
    """
    examples = _examples(device_model, batch_size)
    run = load_interpreter(content).get_signature_runner
    before = run("get_weights")()
    loss = float(run("train")(**examples)["loss"])
    after = run("get_weights")()
    expected_loss, expected = _reference(device_model, examples, trained, optimizer, rates)
    step = np.concatenate([(after[name] - before[name]).ravel() for name in trained])
    wanted = np.concatenate([(expected[name] - before[name]).ravel() for name in trained])
    size = float(np.linalg.norm(wanted))
    check = StepCheck(
        loss=loss,
        loss_difference=abs(loss - expected_loss) / max(abs(expected_loss), 1e-6),
        step_difference=float(np.linalg.norm(step - wanted)) / size if size else None,
    )
    if not max(check.loss_difference, check.step_difference or 0.0) <= _TOLERANCE:
        raise ValueError(
            "A training step on the device must equal that of TensorFlow. Received: model "
            f"{device_model.model.name!r}, {check}. Train fewer layers (trainable=...)."
        )
    still = [name for name in before if name not in trained or name == VERSION]
    changed = [name for name in still if not np.array_equal(before[name], after[name])]
    if changed:
        raise ValueError(f"A step must not change frozen weights. Received: {changed} changed.")
    return check


def _examples(device_model: DeviceModel, batch_size: int) -> dict[str, np.ndarray]:
    """Generates random examples: valid ids for texts, images with blank areas.

    If there are two or more, the last one is masked.
    """
    rng = np.random.default_rng(0)
    examples = {}
    sizes = vocabulary_sizes(device_model.model)
    for i, (name, spec) in enumerate(input_specs(device_model.model, batch_size).items()):
        if i in sizes:
            examples[name] = generate_texts(rng, tuple(spec.shape), sizes[i])
        elif not spec.dtype.is_floating:
            examples[name] = rng.integers(0, 2, spec.shape)
        elif len(spec.shape) == 4:
            examples[name] = rng.uniform(0, 255, spec.shape)
            examples[name][:, : spec.shape[1] // 3] = 0
        else:
            examples[name] = rng.normal(size=spec.shape)
        examples[name] = examples[name].astype(spec.dtype.as_numpy_dtype)
    labels = device_model.label_spec(batch_size)
    classes = device_model.model.outputs[0].shape[-1] if labels.dtype.is_integer else 2
    y = rng.integers(0, classes, labels.shape).astype(labels.dtype.as_numpy_dtype)
    if device_model.soft_labels:
        y = rng.dirichlet(np.ones(labels.shape[-1]), labels.shape[:-1]).astype("float32")
    mask = np.ones(batch_size, "float32")
    mask[1:][-1:] = 0
    return {**examples, "y": y, "mask": mask}


def _reference(
    device_model: DeviceModel,
    examples: dict[str, np.ndarray],
    trained: Sequence[str],
    optimizer: str,
    rates: Sequence[float],
) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the loss and weights after a step with TensorFlow gradients and a Keras optimizer."""
    variables = {
        name: keras.Variable(variable) for name, variable in device_model.exchanged.items()
    }
    x = {name: value for name, value in examples.items() if name not in ("y", "mask")}

    @tf.function(autograph=False)
    def differentiate() -> tuple[tf.Tensor, list[tf.Tensor]]:
        weights = {name: tf.convert_to_tensor(variable) for name, variable in variables.items()}
        chosen = [weights[name] for name in trained]

        def loss() -> tf.Tensor:
            output = device_model.outputs({name: tf.constant(v) for name, v in x.items()})
            return device_model.loss(tf.constant(examples["y"]), output, tf.constant(mask))

        mask = examples["mask"]
        with tf.GradientTape() as tape:
            tape.watch(chosen)
            value = device_model.run(weights, loss)
        zero = tf.UnconnectedGradients.ZERO
        return value, tape.gradient(value, chosen, unconnected_gradients=zero)

    loss, gradients = differentiate()
    chosen = [variables[name] for name in trained]
    made: Any = {
        "sgd": lambda: keras.optimizers.SGD(1.0),
        "momentum": lambda: keras.optimizers.SGD(1.0, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(1.0),
    }[optimizer]()
    made = with_multipliers(made, rates)
    made.apply([tf.convert_to_tensor(gradient) for gradient in gradients], chosen)
    return float(loss), {name: variables[name].numpy() for name in trained}
