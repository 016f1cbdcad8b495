"""A model as a `.tflite` file that trains on the device, in builtin operations."""

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
from keras_lp.tflite.export.convert import compute_types, weight_bytes
from keras_lp.tflite.interface import check_model
from keras_lp.tflite.metadata.metadata import with_files
from keras_lp.tflite.training.gradients import Untrainable
from keras_lp.tflite.training.signatures import DeviceModel, Signatures
from keras_lp.tflite.training.step_check import StepCheck, check_step
from keras_lp.utils.arguments import check_choice, check_positive
from keras_lp.utils.files import check_scratch_space
from keras_lp.utils.text_table import ShownAsText

PhoneOptimizer = Literal["sgd", "momentum", "adam"]

_AVERAGED = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


@dataclasses.dataclass(frozen=True, repr=False)
class TrainableReport(ShownAsText):
    """What `export_trainable_tflite` wrote, and how one step of it compares with TensorFlow.

    Attributes:
        path: the file.
        size: its bytes.
        signatures: the names of its functions.
        trained: the weights that train, by name, with their shapes.
        carried: the averages of BatchNormalization that travel with them and stand still.
        batch_size: examples of a step.
        optimizer: `"sgd"`, `"momentum"` or `"adam"`.
        learning_rate: its rate.
        switched_off: layers that act in training in Keras and not on the device, such as Dropout.
        held_still: BatchNormalization layers that would train in Keras and stand still on the
            device: statistics, scale and offset.
        check: one step on generated examples, in LiteRT and in TensorFlow.
    """

    path: str
    size: int
    signatures: tuple[str, ...]
    trained: dict[str, tuple[int, ...]]
    carried: tuple[str, ...]
    batch_size: int
    optimizer: str
    learning_rate: float
    switched_off: tuple[str, ...]
    held_still: tuple[str, ...]
    check: StepCheck

    def __str__(self) -> str:
        numbers = sum(tf.TensorShape(shape).num_elements() for shape in self.trained.values())
        lines = [
            f"{self.path}: {self.size / 1024:,.1f} KiB, signatures {', '.join(self.signatures)}",
            f"trains {numbers:,} numbers in {len(self.trained)} weights, {self.optimizer} at "
            f"{self.learning_rate:g}, {self.batch_size} examples a step",
            str(self.check),
        ]
        if self.switched_off:
            lines.append(f"off on the device: {', '.join(self.switched_off)}")
        if self.held_still:
            lines.append(f"BatchNormalization that stands still: {', '.join(self.held_still)}")
        return "\n".join(lines)


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
    """Writes a model as a `.tflite` file that any LiteRT runtime runs and trains.

    It holds builtin operations only, no TensorFlow is needed on the device. Its signatures:

    - `infer(x)`: the outputs for one example; classes as probabilities;
    - `train(x, y, mask) -> loss, loss_weight`: a step on `batch_size` examples, of which those
      count where `mask` is 1: the loss is their mean, so that a device trains on what it has; the
      mean over batches weighs each loss by its `loss_weight`;
    - `evaluate(x, y, mask) -> loss, loss_weight, accuracy` (or `mae`) `, count`: the same without
      a step; `count` is what the metric weighs;
    - `get_weights()` and `set_weights(...)`: the weights that train, the averages of
      BatchNormalization from the first layer that trains on, and the `version` of the model;
      `set_weights` also restarts the optimizer;
    - `read_weights(ignored)`: `get_weights` for Java, which cannot call what has no input;
    - `features(x)` and `train_features(features, y, mask)`, where only the head of a model that
      keras_lp built trains: what the frozen part gives for an example is computed once.

    A model with several inputs calls them `x_<name>`. The loss is the one that the model was
    compiled with, weights of classes, missing labels and penalties included. Each step is what
    Keras does, in inference mode: Dropout, noise and augmentation are off, and
    BatchNormalization stands still, statistics, scale and offset, as in `lp.finetune_model`. All
    weights learn at one rate. The model itself is left as it is.

    `lp.DeviceTrainer` runs the file; `lp.aggregate_device_updates` averages what phones learned.

    Args:
        model: a compiled Keras model in float32, with one output and inputs of one size.
        path: where to write.
        trainable: what trains on the device: `"head"`; a number n for the top n blocks besides
            the head; a list of layer names; or `"all"`. Defaults to `"head"`.
        batch_size: examples of a step. Defaults to 16.
        optimizer: `"sgd"`, `"momentum"` (0.9) or `"adam"`. Defaults to `"sgd"`.
        learning_rate: its rate. Defaults to 0.01.
        soft_labels: whether labels of an `lp.Classification` are distributions over the classes,
            `(examples, classes)` float32, and not class numbers. Defaults to False.

    Returns:
        A `TrainableReport`; print it.

    Raises:
        ValueError: a layer that cannot train on a device (GELU, ELU, GRU, ...), by its name; a
            model with several outputs, not compiled, or not in float32; an operation outside
            LiteRT's builtin ones; a step that differs from TensorFlow's. No file is left.
        TypeError: anything else than a Keras model.
        ImportError: `ai-edge-litert` is not installed.

    Example:

    ```python
    report = lp.export_trainable_tflite(model, "digits.tflite", trainable="head", learning_rate=0.1)
    print(report)
    ```
    """
    check_choice("optimizer", optimizer, get_args(PhoneOptimizer))
    check_positive("batch_size", batch_size, integer=True)
    check_positive("learning_rate", learning_rate)
    _check_model(model)
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"`path` must be a file to write. Received: the folder {path}.")
    held_still = _training_normalization(model)
    with _training_alone(model, trainable):
        exchanged = _exchanged(model)
        trains = {id(variable) for variable in model.trainable_variables}
        trained = [name for name, variable in exchanged.items() if id(variable) in trains]
        device_model = DeviceModel(model, exchanged, soft_labels)
        if soft_labels and not isinstance(getattr(device_model.head, "task", None), Classification):
            raise ValueError(
                "Soft labels are those of an lp.Classification. Received: soft_labels=True for "
                f"model {model.name!r}."
            )
        settings = (int(batch_size), optimizer, float(learning_rate))
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
        switched_off=tuple(
            layer.name for layer in model._flatten_layers() if layer._seed_generators
        ),
        held_still=held_still,
        check=check,
    )
    write_whole(path, content)
    return report


def _check_model(model: Any) -> None:
    check_model(model, "export_trainable_tflite")
    if not model.compiled or getattr(model, "loss", None) is None:
        raise ValueError(
            "export_trainable_tflite takes a model that is compiled with a loss: the device trains "
            f"on it. Received: model {model.name!r}, which is not. Call model.compile(loss=...)."
        )
    if len(model.outputs) != 1:
        raise ValueError(
            "A model that trains on a device has one output. Received: model "
            f"{model.name!r} with {len(model.outputs)} of them. Build a model of one task with "
            "lp.transfer_model(model, task), which keeps what the tasks share."
        )
    if types := compute_types(model):
        raise ValueError(
            "export_trainable_tflite takes a model in float32. Received: layers that compute in "
            f"{sorted(types)}. Build it again under keras.config.set_dtype_policy('float32') and "
            "copy the weights with `set_weights(model.get_weights())`."
        )
    inputs = [tensor.name for tensor in model.inputs] if len(model.inputs) > 1 else []
    for name in (*inputs, model.outputs[0]._keras_history.operation.name):
        if not re.fullmatch(r"\w+", name, re.ASCII):
            raise ValueError(
                "Inputs and outputs of a .tflite file that trains have names of letters, digits "
                f"and underscores. Received: {name!r}. Build the model with other names."
            )
    loss = keras.losses.get(keras.tree.flatten(model.loss)[0])
    if getattr(loss, "reduction", _AVERAGED[0]) not in _AVERAGED:
        raise ValueError(
            "A device trains on the mean over its examples, so the loss must be a mean. Received: "
            f"a loss with reduction={loss.reduction!r}. Compile with one of {list(_AVERAGED)}."
        )


@contextlib.contextmanager
def _training_alone(model: keras.Model, trainable: Trainable) -> Iterator[None]:
    """Within it, what trains on the device trains in the model, and nothing else."""
    layers = [(layer, layer.trainable) for layer in model._flatten_layers()]
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
                f"Something must train. Received: trainable={trainable!r}, and {model.name!r} has "
                'no weights there besides BatchNormalization. Say trainable="all".'
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
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    )


def _exchanged(model: keras.Model) -> Variables:
    """Returns what trains, and the averages of BatchNormalization from there to the output."""
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
    names = {layer.name for layer in model._flatten_layers(include_self=False)}
    scopes = [re.sub(r"_\d+$", "", part) if part not in names else part
              for part in error.operation.name.split("/")]  # fmt: skip
    layer = next((part for part in reversed(scopes) if part in names), None)
    where = "the loss" if layer is None else f"layer {layer!r}"
    return (
        "What trains on a device must have a gradient in LiteRT's builtin operations. Received: "
        f"{where}, which uses {error}. Train what is above it (trainable=...), or build the model "
        "with another layer, such as one with relu."
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
                "The converter must accept a model for the device, whose operations are LiteRT's "
                f"builtin operations only. Received: model {model.name!r}, of which it says: "
                f"{error}"
            ) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps TensorFlow from warning that gradients of these gradients were not saved."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "unsaved custom gradients" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
