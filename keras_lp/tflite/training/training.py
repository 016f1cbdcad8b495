"""Exports a model to a `.tflite` file that trains on the device with builtin operations."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import keras
import tensorflow as tf

from keras_lp.backbones.blocks import below_head, blocks_of
from keras_lp.backbones.freezing import Trainable, choose, freeze, restore_flag, set_trainable
from keras_lp.tasks.classification import Classification
from keras_lp.tflite.contents import write_whole
from keras_lp.tflite.device.exchange import (
    Variables,
    layer_of_variable,
    model_version,
    named_weights,
)
from keras_lp.tflite.export.convert import weight_bytes
from keras_lp.tflite.export.copies import compute_types
from keras_lp.tflite.interface import describe
from keras_lp.tflite.metadata.metadata import with_files
from keras_lp.tflite.training.gradients import Untrainable
from keras_lp.tflite.training.signatures import DeviceModel, Signatures
from keras_lp.tflite.training.step_check import StepCheck, check_step
from keras_lp.utils.arguments import check_choice, check_positive
from keras_lp.utils.files import check_scratch_space
from keras_lp.utils.keras_internals import draws_random_numbers, producer, sublayers
from keras_lp.utils.text_table import ShownAsText

PhoneOptimizer = Literal["sgd", "momentum", "adam"]

_AVERAGED = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


@dataclasses.dataclass(frozen=True, repr=False)
class TrainableReport(ShownAsText):
    """Describes the file that `export_trainable_tflite` wrote. Can be printed.

    Attributes:
        path: path of the file.
        size: size of the file in bytes.
        signatures: the names of the signatures.
        trained: the shapes of the trained weights, by name.
        carried: names of the BatchNormalization averages that are exchanged but not updated.
        batch_size: number of examples per training step.
        optimizer: `"sgd"`, `"momentum"` or `"adam"`.
        learning_rate: the learning rate.
        rates: the learning rate of each trained weight, by name.
        switched_off: layers that are active during training in Keras but not on the device, such
            as Dropout.
        held_still: BatchNormalization layers that are trainable in Keras but frozen on the device
            (statistics, scale and offset).
        check: one training step on generated examples in LiteRT, compared with TensorFlow.
    """

    path: str
    size: int
    signatures: tuple[str, ...]
    trained: dict[str, tuple[int, ...]]
    carried: tuple[str, ...]
    batch_size: int
    optimizer: str
    learning_rate: float
    rates: dict[str, float]
    switched_off: tuple[str, ...]
    held_still: tuple[str, ...]
    check: StepCheck

    def __str__(self) -> str:
        numbers = sum(tf.TensorShape(shape).num_elements() for shape in self.trained.values())
        lines = [
            f"{self.path}: {self.size / 1024:,.1f} KiB, signatures {', '.join(self.signatures)}",
            f"trains {numbers:,} parameters in {len(self.trained)} weights, {self.optimizer} with "
            f"learning rate {self._shown_rate()}, batch size {self.batch_size}",
            str(self.check),
        ]
        if self.switched_off:
            lines.append(f"off on the device: {', '.join(self.switched_off)}")
        if self.held_still:
            lines.append(f"frozen BatchNormalization: {', '.join(self.held_still)}")
        return "\n".join(lines)

    def _shown_rate(self) -> str:
        low, high = min(self.rates.values()), max(self.rates.values())
        return f"{high:g}" if low == high else f"{low:.3g} to {high:.3g} by layer"


def export_trainable_tflite(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    trainable: Trainable = "head",
    batch_size: int = 16,
    optimizer: PhoneOptimizer = "sgd",
    learning_rate: float = 0.01,
    soft_labels: bool = False,
) -> TrainableReport:
    """Exports a model to a `.tflite` file that any LiteRT runtime can run and train.

    The file uses builtin operations only, so the device does not need TensorFlow. Its signatures:

    - `infer(x)` returns the outputs for one example, with probabilities for classes.
    - `train(x, y, mask) -> loss, loss_weight` runs one training step on `batch_size` examples. Only
      the examples with `mask` 1 count, so a device can train on fewer. `loss` is their mean; the
      mean over several batches must be weighted by `loss_weight`.
    - `evaluate(x, y, mask) -> loss, loss_weight, accuracy` (or `mae`) `, count` computes the same
      without a training step. `count` is the weight of the metric.
    - `get_weights()` and `set_weights(...)` read and write the trained weights, the
      BatchNormalization averages from the first trained layer on, and the `version` of the model.
      `set_weights` also resets the optimizer.
    - `read_weights(ignored)` is `get_weights` for Java, which cannot call a signature without
      inputs.
    - `features(x)` and `train_features(features, y, mask)` exist if keras_lp built the model and
      only the head trains. They compute the output of the frozen part only once per example.

    The inputs of a model with several inputs are named `x_<name>`. The loss is the one that the
    model is compiled with, including class weights, missing labels and regularization. A step is
    the same as in Keras in inference mode: Dropout, noise and augmentation are off, and
    BatchNormalization is frozen (statistics, scale and offset), as in `lp.finetune_model`. Layer
    rates of the model (`layer_decay`, `layer_rates`) keep their ratios; adapters of `lp.LoRA` train
    instead of their kernels. Weight decay of the optimizer is left out. The model itself is not
    changed.

    `lp.DeviceTrainer` runs the file, and `lp.aggregate_device_updates` averages the weights of
    several phones.

    Args:
        model: a compiled Keras model in float32, with one output and inputs of fixed size.
        path: path of the file to write.
        trainable: the part that trains on the device: `"head"`; an integer n for the head and the
            top n blocks; a list of layer names; or `"all"`. Defaults to `"head"`.
        batch_size: number of examples per training step. Defaults to 16.
        optimizer: `"sgd"`, `"momentum"` (0.9) or `"adam"`. Defaults to `"sgd"`.
        learning_rate: learning rate of the optimizer; with layer rates, that of the head. Defaults
            to 0.01.
        soft_labels: whether the labels of an `lp.Classification` are distributions over the
            classes, float32 `(examples, classes)`, instead of class numbers. Defaults to False.

    Returns:
        A `TrainableReport`, which can be printed.

    Raises:
        ValueError: a layer cannot train on the device (GELU, ELU, GRU, ...; the error names it),
            the model has several outputs, is not compiled or not in float32, an operation is not
            builtin in LiteRT, or a training step differs from TensorFlow. No file is written.
        TypeError: `model` is not a Keras model.
        ImportError: `ai-edge-litert` is not installed.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"])
    >>> report = lp.export_trainable_tflite(model, "sums.tflite", learning_rate=0.1)
    >>> report.trained
    {'w2_predictions_kernel': (8, 2), 'w3_predictions_bias': (2,)}
    """
    check_choice("optimizer", optimizer, get_args(PhoneOptimizer))
    check_positive("batch_size", batch_size, integer=True)
    check_positive("learning_rate", learning_rate)
    _check_model(model)
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"`path` must be a file to write. Received: the folder {path}.")
    held_still = _training_normalization(model)
    multipliers = _multipliers(model)
    with _training_alone(model, trainable):
        exchanged = _exchanged(model)
        trains = {id(variable) for variable in model.trainable_variables}
        trained = [name for name, variable in exchanged.items() if id(variable) in trains]
        device_model = DeviceModel(model, exchanged, soft_labels)
        if soft_labels and not isinstance(getattr(device_model.head, "task", None), Classification):
            raise ValueError(
                "soft_labels=True requires a model with an lp.Classification task. Received: "
                f"model {model.name!r}. Leave `soft_labels` out."
            )
        rates = {
            name: float(learning_rate) * multipliers.get(id(exchanged[name]), 1.0)
            for name in trained
        }
        settings = (int(batch_size), optimizer, list(rates.values()))
        version = model_version(model, exchanged)
        try:
            signatures = Signatures(device_model, trained, version, *settings)
        except Untrainable as error:
            raise ValueError(_cannot_train(model, error)) from error
        content = with_files(_convert(model, signatures), {})
        check = check_step(content, device_model, trained, *settings)
    report = TrainableReport(
        path=str(path),
        size=len(content),
        signatures=tuple(signatures.functions),
        trained={name: tuple(exchanged[name].shape) for name in trained},
        carried=tuple(name for name in exchanged if name not in trained),
        batch_size=int(batch_size),
        optimizer=optimizer,
        learning_rate=float(learning_rate),
        rates=rates,
        switched_off=tuple(layer.name for layer in sublayers(model) if draws_random_numbers(layer)),
        held_still=held_still,
        check=check,
    )
    write_whole(path, content)
    return report


def _multipliers(model: keras.Model) -> dict[int, float]:
    """Returns the factors of the layer rates by the id of the weight; empty without layer rates."""
    found = getattr(model.optimizer, "multipliers", None) or []
    variables = model.trainable_variables
    if len(found) != len(variables):  # what trains has changed since it was compiled
        return {}
    return {id(v): one for v, one in zip(variables, found, strict=True)}


def _check_model(model: Any) -> None:
    describe(model, "export_trainable_tflite")
    if not model.compiled or getattr(model, "loss", None) is None:
        raise ValueError(
            "export_trainable_tflite takes a model that is compiled with a loss. Received: "
            f"model {model.name!r}, which is not. Call model.compile(loss=...)."
        )
    if len(model.outputs) != 1:
        raise ValueError(
            "A model that trains on a device must have one output. Received: model "
            f"{model.name!r} with {len(model.outputs)} outputs. Build a single-task model with "
            "lp.transfer_model(model, task), which keeps the shared backbone."
        )
    if types := compute_types(model):
        raise ValueError(
            "export_trainable_tflite takes a model in float32. Received: layers that compute in "
            f"{sorted(types)}. Build it again under keras.config.set_dtype_policy('float32') and "
            "copy the weights with `set_weights(model.get_weights())`."
        )
    inputs = [tensor.name for tensor in model.inputs] if len(model.inputs) > 1 else []
    for name in (*inputs, producer(model.outputs[0]).name):
        if not re.fullmatch(r"\w+", name, re.ASCII):
            raise ValueError(
                "Input and output names of a trainable .tflite file must consist of letters, "
                f"digits and underscores. Received: {name!r}. Build the model with other names."
            )
    loss = keras.losses.get(keras.tree.flatten(model.loss)[0])
    if getattr(loss, "reduction", _AVERAGED[0]) not in _AVERAGED:
        raise ValueError(
            "The loss of a model that trains on a device must be the mean over the examples. "
            f"Received: reduction={loss.reduction!r}. Compile with one of {list(_AVERAGED)}."
        )


@contextlib.contextmanager
def _training_alone(model: keras.Model, trainable: Trainable) -> Iterator[None]:
    """Context manager in which only the part that trains on the device is trainable."""
    layers = [(layer, layer.trainable) for layer in sublayers(model)]
    variables = [(variable, variable.trainable) for variable in model.weights]
    below = below_head(model)
    chosen = choose(below, blocks_of(below), trainable)
    set_trainable(model, True)
    freeze(below, chosen, keep_statistics=True)
    for layer, _ in layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            set_trainable(layer, False)
    try:
        if not model.trainable_variables:
            raise ValueError(
                f"`trainable` must select weights other than those of BatchNormalization. "
                f"Received: trainable={trainable!r}, which selects none in {model.name!r}. "
                'Pass trainable="all".'
            )
        yield
    finally:
        for layer, flag in layers:  # outer layers come first
            restore_flag(layer, flag)
        for variable, flag in variables:
            variable.trainable = flag


def _training_normalization(model: keras.Model) -> tuple[str, ...]:
    return tuple(
        layer.name
        for layer in sublayers(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    )


def _exchanged(model: keras.Model) -> Variables:
    """Returns the trained weights and the BatchNormalization averages above the first of them."""
    trains = model.trainable_variables
    ids = {id(variable) for variable in trains}
    layers = layer_of_variable(model)
    first = next(i for i, v in enumerate(model.weights) if id(v) in ids)
    averages = [
        variable
        for variable in model.weights[first:]
        if isinstance(layers[id(variable)], keras.layers.BatchNormalization)
        and variable.name.startswith("moving_")
    ]
    return named_weights(model, [*trains, *averages])


def _cannot_train(model: keras.Model, error: Untrainable) -> str:
    names = {layer.name for layer in sublayers(model, include_self=False)}
    scopes = [re.sub(r"_\d+$", "", part) if part not in names else part
              for part in error.operation.name.split("/")]  # fmt: skip
    layer = next((part for part in reversed(scopes) if part in names), None)
    where = "the loss" if layer is None else f"layer {layer!r}"
    return (
        "All trained layers must have gradients in builtin operations of LiteRT. Received: "
        f"{where}, which uses {error}. Train only the layers above it (trainable=...), or build "
        "the model with another layer or activation, such as relu."
    )


def _convert(model: keras.Model, signatures: Signatures) -> bytes:
    check_scratch_space(weight_bytes(model))
    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        tf.saved_model.save(
            signatures,
            folder,
            signatures=signatures.functions,
            options=tf.saved_model.SaveOptions(experimental_custom_gradients=False),
        )
        converter = tf.lite.TFLiteConverter.from_saved_model(
            folder, signature_keys=list(signatures.functions)
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.experimental_enable_resource_variables = True
        try:
            return converter.convert()
        except Exception as error:
            raise ValueError(
                "The TFLite converter must accept the model with builtin operations of LiteRT "
                f"only. Received: model {model.name!r} with the error: {error}"
            ) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppresses the warning of TensorFlow that second-order gradients are not saved."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "unsaved custom gradients" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
