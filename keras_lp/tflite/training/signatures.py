"""The signatures of a trainable file, traced from a Keras model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones import features
from keras_lp.model.compiled import has_own_losses
from keras_lp.model.model import input_structure
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import heads
from keras_lp.tasks.regression import Regression
from keras_lp.tflite.device.exchange import VERSION, layer_of_variable
from keras_lp.tflite.training.gradients import builtin_gradients, gradients
from keras_lp.utils.keras_internals import producer

Tensors = Mapping[str, tf.Tensor]


class DeviceModel:
    """A compiled model in inference mode whose weights are passed as tensors.

    Args:
        model: a compiled model with one output.
        exchanged: the weights that are variables on the device, by name. The others are constants.
        soft_labels: whether class labels are distributions instead of class numbers.
    """

    def __init__(
        self,
        model: keras.Model,
        exchanged: Mapping[str, keras.Variable],
        soft_labels: bool = False,
    ) -> None:
        self.model = model
        self.soft_labels = soft_labels
        self.exchanged = dict(exchanged)
        self.head = next(iter(heads(model).values()), None)
        self.output_name = producer(model.outputs[0]).name
        given = {id(variable) for variable in self.exchanged.values()}
        self._constants = [
            (variable, keras.ops.convert_to_numpy(variable))
            for variable in (*model.variables, *model.metrics_variables)
            if id(variable) not in given
        ]
        # Frozen biases of 0 next to weights that train, as with adapters. As constants they would
        # be removed, and then the converter loses the activation after them.
        layers = layer_of_variable(model)
        partly = {id(layers[one]) for one in given if one in layers}
        zeros = (
            variable
            for variable, value in self._constants
            if value.ndim == 1 and not value.any() and id(layers.get(id(variable))) in partly
        )
        self.zeros = {f"zero_{i}": variable for i, variable in enumerate(zeros)}

    def run(self, weights: Tensors, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of tensors with `weights` instead of the weights of the model.

        Args:
            weights: by the names of `exchanged`, and perhaps of `zeros`.
            function: the function.
            *arguments: its arguments.
        """
        known = {**self.exchanged, **self.zeros}
        mapping = [(known[name], value) for name, value in weights.items()]
        given = {id(variable) for variable, _ in mapping}
        mapping += [
            (variable, tf.constant(value))
            for variable, value in self._constants
            if id(variable) not in given
        ]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True):
            return function(*arguments)

    def outputs(self, x: Tensors | tf.Tensor) -> tf.Tensor:
        """Returns the output for a dict of inputs, or for features."""
        if isinstance(x, tf.Tensor):
            return features.run_above(self.model, {features.KEY: x}, False)
        (output,) = keras.tree.flatten(self.model(self._packed(x), training=False))
        return output

    def features(self, x: Tensors) -> tf.Tensor:
        """Returns the features of the frozen backbone."""
        return features.feature_model(self.model)(self._packed(x), training=False)

    def loss(self, y: tf.Tensor, output: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Returns the Keras loss as the mean over the examples with `mask` 1."""
        count = tf.maximum(tf.reduce_sum(mask), 1.0)
        weight = mask * (mask.shape[0] / count)  # Keras divides by the batch size
        return self.model.compute_loss(None, y, output, weight, training=False)

    def losses(self, y: tf.Tensor, output: tf.Tensor, mask: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns `loss` and `loss_weight`, its weight in a mean over batches.

        As in the logs of Keras, `loss_weight` is the sum of the label weights. For a loss that is
        not just that of a task, it is the number of examples.
        """
        weight = mask
        if self.head is not None and has_own_losses(self.model) and not self.model.losses:
            *_, weight = self.head.for_loss(*self.head.task.mask_missing(y, output, mask))
        return {"loss": self.loss(y, output, mask), "loss_weight": tf.reduce_sum(weight)}

    def metric(self, y: tf.Tensor, output: tf.Tensor, mask: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the mean `accuracy` or `mae` over the labels present, and their `count`."""
        if self.head is not None:
            task = self.head.task
            y, output, weight = task.for_metrics(*task.mask_missing(y, output, mask))
        else:
            weight = tf.ones_like(y, tf.float32) * tf.reshape(mask, [-1, *[1] * (len(y.shape) - 1)])
        count = tf.reduce_sum(weight)
        kind = self._metric_kind()
        if kind is None:
            return {"count": count}
        if kind == "mae":
            each = tf.abs(y - output)[..., 0]
        elif self.has_classes():
            chosen = tf.argmax(output, -1, tf.int32)
            each = tf.cast(tf.equal(chosen, tf.cast(y, tf.int32)), tf.float32)
        else:
            each = tf.cast(tf.equal(output > 0, y > 0.5), tf.float32)[..., 0]
        return {
            kind: tf.reduce_sum(each * weight) / tf.maximum(count, 1.0),
            "count": count,
        }

    def activated(self, output: tf.Tensor) -> tf.Tensor:
        """Returns probabilities for the logits of a head; other outputs are not changed."""
        if self.head is None:
            return output
        return keras.activations.get(self.head.task.activation)(output)

    def label_spec(self, batch_size: int) -> tf.TensorSpec:
        """Returns the shape and dtype of a batch of labels."""
        shape = (batch_size, *self.model.outputs[0].shape[1:])
        if self.has_classes() and not self.soft_labels:
            return tf.TensorSpec(shape[:-1], tf.int32, "y")
        return tf.TensorSpec(shape, tf.float32, "y")

    def has_features(self) -> bool:
        """Whether only the head trains, so that its inputs can be computed once."""
        if features.obstacle(self.model) is not None:
            return False
        below = features.feature_model(self.model)
        return getattr(below.output, "_keras_mask", None) is None

    def _packed(self, x: Tensors) -> Any:
        inputs = [x[name] for name in input_specs(self.model, None)]
        return keras.tree.pack_sequence_as(input_structure(self.model), inputs)

    def _metric_kind(self) -> str | None:
        if self.head is None:
            return "accuracy" if self.has_classes() else None
        return "mae" if isinstance(self.head.task, Regression) else "accuracy"

    def has_classes(self) -> bool:
        """Whether each label is one class of several."""
        if self.head is not None:
            return isinstance(self.head.task, Classification)
        loss = keras.losses.get(keras.tree.flatten(self.model.loss)[0])
        sparse = keras.losses.sparse_categorical_crossentropy
        return loss is sparse or isinstance(loss, keras.losses.SparseCategoricalCrossentropy)


def input_specs(model: keras.Model, batch_size: int | None) -> dict[str, tf.TensorSpec]:
    """Returns the specs of the inputs in order: `x`, or `x_<name>` for several inputs."""
    names = ["x"] if len(model.inputs) == 1 else [f"x_{tensor.name}" for tensor in model.inputs]
    return {
        name: tf.TensorSpec((batch_size, *tensor.shape[1:]), tensor.dtype, name)
        for name, tensor in zip(names, model.inputs, strict=True)
    }


class Optimizer(tf.Module):
    """SGD, momentum or Adam as in Keras, with builtin operations.

    Args:
        kind: `"sgd"`, `"momentum"` (0.9) or `"adam"`.
        rates: the learning rate of each variable.
        weights: the trained variables.
    """

    def __init__(self, kind: str, rates: Sequence[float], weights: Sequence[tf.Variable]) -> None:
        super().__init__()
        self._kind, self._rates, self._weights = kind, list(rates), list(weights)
        count = {"sgd": 0, "momentum": 1, "adam": 2}[kind]
        self._slots = [
            [tf.Variable(tf.zeros(weight.shape)) for weight in weights] for _ in range(count)
        ]
        self._powers = [tf.Variable(1.0) for _ in range(2 if kind == "adam" else 0)]

    def apply(self, found: Sequence[tf.Tensor]) -> None:
        """Applies the gradients."""
        if self._kind == "adam":
            power1, power2 = (
                power.assign(power.read_value() * beta)
                for power, beta in zip(self._powers, (0.9, 0.999), strict=True)
            )
            correction = tf.sqrt(1 - power2) / (1 - power1)
        for i, (weight, gradient) in enumerate(zip(self._weights, found, strict=True)):
            if self._kind == "sgd":
                step = -self._rates[i] * gradient
            elif self._kind == "momentum":
                (velocity,) = (slot[i] for slot in self._slots)
                step = 0.9 * velocity.read_value() - self._rates[i] * gradient
                velocity.assign(step)
            else:
                mean, square = (slot[i] for slot in self._slots)
                m = mean.read_value() + (gradient - mean.read_value()) * (1 - 0.9)
                v = square.read_value() + (gradient * gradient - square.read_value()) * (1 - 0.999)
                mean.assign(m)
                square.assign(v)
                step = -self._rates[i] * correction * m / (tf.sqrt(v) + 1e-7)
            weight.assign(weight.read_value() + step)

    def reset(self) -> None:
        """Resets the state of the optimizer."""
        for slot in (variable for slots in self._slots for variable in slots):
            slot.assign(tf.zeros(slot.shape))
        for power in self._powers:
            power.assign(1.0)


class Signatures(tf.Module):
    """The variables and signatures of a trainable file.

    It must hold no Keras object, because the converter would then drop the weights.

    Args:
        device_model: the model.
        trained: the names of the exchanged weights that train. The others are only exchanged.
        version: version of the model, from `model_version`.
        batch_size: number of examples per training step.
        optimizer: `"sgd"`, `"momentum"` or `"adam"`.
        rates: the learning rate of each trained weight.

    Attributes:
        functions: the concrete functions by name of the signature.
    """

    def __init__(
        self,
        device_model: DeviceModel,
        trained: Sequence[str],
        version: np.ndarray,
        batch_size: int,
        optimizer: str,
        rates: Sequence[float],
    ) -> None:
        super().__init__()
        self._weights = {
            name: tf.Variable(keras.ops.convert_to_numpy(variable))
            for name, variable in device_model.exchanged.items()
        }
        self._zeros = {
            name: tf.Variable(tf.zeros(variable.shape))
            for name, variable in device_model.zeros.items()
        }
        self._version = tf.Variable(version)
        self._trained = list(trained)
        self._optimizer = Optimizer(optimizer, rates, [self._weights[name] for name in trained])
        one = input_specs(device_model.model, 1)
        batch = input_specs(device_model.model, batch_size)
        labels = {
            "y": device_model.label_spec(batch_size),
            "mask": tf.TensorSpec((batch_size,), tf.float32, "mask"),
        }
        weights = {
            name: tf.TensorSpec(variable.shape, variable.dtype, name)
            for name, variable in {**self._weights, VERSION: self._version}.items()
        }

        def infer(**x: tf.Tensor) -> dict[str, tf.Tensor]:
            output = device_model.run(self._all(), device_model.outputs, x)
            return {device_model.output_name: device_model.activated(output)}

        def train(y: tf.Tensor, mask: tf.Tensor, **x: tf.Tensor) -> dict[str, tf.Tensor]:
            return self._step(device_model, x.get("features", x), y, mask)

        def evaluate(y: tf.Tensor, mask: tf.Tensor, **x: tf.Tensor) -> dict[str, tf.Tensor]:
            def measure() -> dict[str, tf.Tensor]:
                output = device_model.outputs(x)
                losses = device_model.losses(y, output, mask)
                return {**losses, **device_model.metric(y, output, mask)}

            return device_model.run(self._all(), measure)

        def get_weights() -> dict[str, tf.Tensor]:
            return {**self._read(), VERSION: tf.identity(self._version)}

        def read_weights(ignored: tf.Tensor) -> dict[str, tf.Tensor]:
            return get_weights()  # the Java interpreter rejects a signature without inputs

        def set_weights(**given: tf.Tensor) -> dict[str, tf.Tensor]:
            for name, value in given.items():
                (self._version if name == VERSION else self._weights[name]).assign(value)
            self._optimizer.reset()
            for zero in self._zeros.values():  # a variable that is never assigned is a constant
                zero.assign(tf.zeros(zero.shape))
            # Read, not passed through: LiteRT.js overwrites an input that is also an output.
            return {VERSION: self._version.read_value()}

        self.functions = {
            "infer": _trace(infer, one),
            "train": _trace(train, {**batch, **labels}),
            "evaluate": _trace(evaluate, {**batch, **labels}),
            "get_weights": _trace(get_weights, {}),
            "read_weights": _trace(read_weights, {"ignored": tf.TensorSpec((1,), name="ignored")}),
            "set_weights": _trace(set_weights, weights),
        }
        if device_model.has_features():

            def compute(**x: tf.Tensor) -> dict[str, tf.Tensor]:
                return {"features": device_model.run(self._all(), device_model.features, x)}

            self.functions["features"] = _trace(compute, one)
            shape = self.functions["features"].structured_outputs["features"].shape
            given = tf.TensorSpec((batch_size, *shape[1:]), tf.float32, "features")
            self.functions["train_features"] = _trace(train, {"features": given, **labels})

    def _read(self) -> dict[str, tf.Tensor]:
        return {name: variable.read_value() for name, variable in self._weights.items()}

    def _all(self) -> dict[str, tf.Tensor]:
        zeros = {name: variable.read_value() for name, variable in self._zeros.items()}
        return {**self._read(), **zeros}

    def _step(
        self,
        device_model: DeviceModel,
        x: Tensors | tf.Tensor,
        y: tf.Tensor,
        mask: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        weights = self._all()

        def measure() -> dict[str, tf.Tensor]:
            return device_model.losses(y, device_model.outputs(x), mask)

        with builtin_gradients():
            found = device_model.run(weights, measure)
        self._optimizer.apply(gradients(found["loss"], [weights[name] for name in self._trained]))
        return found


def _trace(function: Callable[..., Any], specs: Mapping[str, tf.TensorSpec]) -> Any:
    return tf.function(function, autograph=False).get_concrete_function(**specs)
