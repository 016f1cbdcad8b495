"""Heads: the last layer of each task, and the decoding of its outputs.

A head carries its task in its config, so the class names survive saving, loading and cloning.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lp.tasks.multi_label import MultiLabel
from keras_lp.tasks.regression import Regression
from keras_lp.tasks.task import ClassTask, Task
from keras_lp.utils.keras_internals import unscale_loss_for_distribution


@keras.saving.register_keras_serializable("keras_lp")
class Head(keras.layers.Dense):
    """The last layer of one task. It outputs logits (or values) and stores the task.

    The head of a `Regression` also has the `mean` and `std` of the labels as non-trainable
    weights: its outputs are in the units of the labels, its loss is in units of `std`. A head that
    scales its inputs has the weights `input_mean` and `input_scale`.

    Args:
        task: the `Task` that this layer predicts.
        scales_inputs: whether `call` subtracts a mean from each input column and multiplies by a
            scale, which `scale_inputs` sets; initially 0 and 1. Defaults to False.
        **kwargs: arguments of `keras.layers.Dense`, except `units` and `activation`.
    """

    def __init__(self, task: Task, scales_inputs: bool = False, **kwargs: Any) -> None:
        # float32 also under mixed precision: a loss on float16 logits overflows.
        super().__init__(task.units, **{"dtype": "float32", **kwargs})
        self.task = task
        self.scales_inputs = scales_inputs
        # The loss over all labels of an epoch; Keras would average batches by their size.
        self.loss_mean = keras.metrics.Mean(name=f"{self.name}_loss")

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        if isinstance(self.task, Regression):
            self.mean, self.std = (
                self.add_weight(
                    (self.units,),
                    initializer=keras.initializers.Constant(default if given is None else given),
                    trainable=False,
                    name=name,
                )
                for name, given, default in (
                    ("mean", self.task.mean, 0.0),
                    ("std", self.task.std, 1.0),
                )
            )
        if self.is_balanced:
            self.class_weight = self.add_weight(
                (self.units,), initializer="ones", trainable=False, name="class_weight"
            )
        if self.scales_inputs:
            self.input_mean, self.input_scale = (
                self.add_weight(
                    (input_shape[-1],), initializer=initializer, trainable=False, name=name
                )
                for name, initializer in (("input_mean", "zeros"), ("input_scale", "ones"))
            )

    @property
    def is_balanced(self) -> bool:
        """Whether the class weights are computed from the labels of the first `fit`."""
        given = getattr(self.task, "class_weight", None)
        return isinstance(given, str)  # "balanced"

    def set_by_fit(self) -> dict[str, Any]:
        """Returns the weights that the first `fit` sets, by name, except those of `Regression`."""
        names = ("input_mean", "input_scale") if self.scales_inputs else ()
        names = (*names, "class_weight") if self.is_balanced else names
        return {name: getattr(self, name) for name in names}

    def for_loss(self, y: Any, y_pred: Any, weight: Any) -> tuple[Any, Any, Any]:
        """Returns the output of the task's `mask_missing` for the loss, with class weights."""
        return self.task.for_loss(
            y, y_pred, weight, self.class_weight if self.is_balanced else None
        )

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Returns `(batch, ..., units)` logits, or values in the units of the labels."""
        if self.scales_inputs:
            inputs = (ops.cast(inputs, self.compute_dtype) - self.input_mean) * self.input_scale
        outputs = super().call(inputs, training=training)
        if isinstance(self.task, Regression):
            outputs = outputs * self.std + self.mean
        return outputs

    def scale_inputs(self, mean: np.ndarray, scale: np.ndarray) -> None:
        """Sets the scaling of the inputs and adapts kernel and bias: the outputs do not change.

        Args:
            mean: value to subtract from each column, `(columns,)`.
            scale: factor that is applied after the subtraction, above 0.
        """
        kernel, bias = (np.asarray(weight, "float64") for weight in self.raw_weights())
        self.input_mean.assign(mean)
        self.input_scale.assign(scale)
        self.kernel.assign(kernel / scale[:, None])
        self.bias.assign(bias + mean @ kernel)

    def raw_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns kernel and bias for unscaled inputs."""
        kernel, bias = (np.asarray(weight, "float64") for weight in (self.kernel, self.bias))
        if self.scales_inputs:
            kernel = kernel * np.asarray(self.input_scale, "float64")[:, None]
            bias = bias - np.asarray(self.input_mean, "float64") @ kernel
        return kernel, bias

    def set_raw_weights(self, kernel: np.ndarray, bias: np.ndarray) -> None:
        """Sets kernel and bias for unscaled inputs, and turns scaling off."""
        self.kernel.assign(kernel)
        self.bias.assign(bias)
        if self.scales_inputs:
            self.input_mean.assign(np.zeros(len(kernel)))
            self.input_scale.assign(np.ones(len(kernel)))

    def compute_loss(
        self, loss: keras.losses.Loss, y: Any, y_pred: Any, sample_weight: Any
    ) -> tuple[Any, Any]:
        """Returns the mean loss over the labels present, and the sum of their weights."""
        y, y_pred, weight = self.task.mask_missing(y, y_pred, sample_weight)
        y, y_pred, weight = self.for_loss(y, y_pred, weight)
        if isinstance(self.task, Regression):
            y, y_pred = y / self.std[:, None], y_pred / self.std[:, None]
        value, total = self.task.loss_on(loss, y, y_pred)(y, y_pred, weight), ops.sum(weight)
        self.loss_mean.update_state(unscale_loss_for_distribution(value), total)
        return value, total

    def save_own_variables(self, store: Any) -> None:
        """Saves all weights; `Dense` would save only its own."""
        super().save_own_variables(store)
        if isinstance(self.task, Regression):
            store["mean"], store["std"] = self.mean, self.std
        for name, variable in self.set_by_fit().items():
            store[name] = variable

    def load_own_variables(self, store: Any) -> None:
        """Loads the weights that `save_own_variables` saved."""
        super().load_own_variables(store)
        if isinstance(self.task, Regression):
            self.mean.assign(store["mean"])
            self.std.assign(store["std"])
        for name, variable in self.set_by_fit().items():
            variable.assign(store[name])

    def get_config(self) -> dict[str, Any]:
        """Returns the config of the layer, with the task in it."""
        config = super().get_config()
        del config["units"], config["activation"]
        task = keras.saving.serialize_keras_object(self.task)
        return {**config, "task": task, "scales_inputs": self.scales_inputs}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Head:
        """Creates the layer from `get_config()`."""
        task = keras.saving.deserialize_keras_object(config["task"])
        return cls(**{**config, "task": task})


def heads(model: keras.Model) -> dict[str, Head]:
    """Returns the task heads of a model by name, in the order of its outputs."""
    found = {layer.name: layer for layer in model.layers if isinstance(layer, Head)}
    order = [name for name in getattr(model, "output_names", []) if name in found]
    return {name: found[name] for name in order or found}


def tasks(model: keras.Model) -> dict[str, Task]:
    """Returns the tasks of a model by the name of their head."""
    return {name: head.task for name, head in heads(model).items()}


def copy_heads(source: keras.Model, target: keras.Model) -> None:
    """Copies the weights of heads and their hidden layers to a model with the same tasks."""
    known = heads(target)
    for name, head in heads(source).items():
        own = known[name]
        own.set_raw_weights(*head.raw_weights())
        if isinstance(head.task, Regression):
            own.mean.assign(head.mean)
            own.std.assign(head.std)
        if head.is_balanced:
            own.class_weight.assign(head.class_weight)
        for layer in source.layers:
            if layer.name.startswith(f"{name}_hidden_"):
                target.get_layer(layer.name).set_weights(layer.get_weights())


def backbone_of(model: keras.Model) -> keras.Model | None:
    """Returns the backbone of a model that keras_lp built, else None."""
    if not heads(model):
        return None
    return next((layer for layer in model.layers if isinstance(layer, keras.Model)), None)


def decode_predictions(model: keras.Model, predictions: Any, top: int | None = 1) -> Any:
    """Converts the outputs of a model to class names and probabilities.

    Args:
        model: a model that keras_lp built.
        predictions: output of `model.predict`: logits `(examples, classes)`, or a dict of
            them for a multitask model.
        top: number of classes per example, the most probable first, regardless of thresholds.
            None returns the answer: for `MultiLabel` all labels whose probability is above their
            threshold (`lp.choose_thresholds`, else 0.5), possibly none; for `Classification` the
            most probable class. Defaults to 1.

    Returns:
        For each example a list of pairs `(class name, probability)`, the most probable first. For
        `Regression` the unchanged values. For a multitask model a dict of these by task.

    Raises:
        ValueError: if the model has no tasks, predictions have another shape or name, or `top`
            is below 1.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
    >>> task = lp.MultiLabel(["sun", "rain", "snow"], thresholds={"snow": 0.25})
    >>> model = lp.transfer_model(backbone, task)
    >>> logits = np.log([[3.0, 4.0, 1 / 2], [1 / 4, 1 / 9, 1 / 4]])  # model.predict(x)
    >>> decoded = lp.decode_predictions(model, logits, top=None)
    >>> [[(name, round(p, 2)) for name, p in example] for example in decoded]
    [[('rain', 0.8), ('sun', 0.75), ('snow', 0.33)], []]
    """
    known = tasks(model)
    if not known:
        raise ValueError(
            "decode_predictions needs a model that keras_lp built, whose heads know their "
            f"classes. Received: a {type(model).__name__} without such a head. Build it with "
            "lp.transfer_model or lp.multitask_model."
        )
    if top is not None and (not isinstance(top, numbers.Integral) or top < 1):
        raise ValueError(f"`top` must be an integer of 1 or more, or None. Received: top={top!r}.")
    if isinstance(predictions, Mapping):
        unknown = [name for name in predictions if name not in known]
        if unknown:
            raise ValueError(
                f"Predictions must be named after the tasks {list(known)}. Received: {unknown}."
            )
        return {name: _decode(known[name], predictions[name], top) for name in predictions}
    if len(known) > 1:
        raise ValueError(
            f"This model has the tasks {list(known)}, so its predictions are a dict. Received: "
            f"predictions of type {type(predictions).__name__}. Pass the output of `model.predict`."
        )
    return _decode(next(iter(known.values())), predictions, top)


def _decode(task: Task, predictions: Any, top: int | None) -> Any:
    values = np.asarray(predictions)
    if values.ndim != 2 or values.shape[-1] != task.units:
        raise ValueError(
            f"Predictions must have shape (examples, {task.units}). Received: predictions of "
            f"shape {values.shape}."
        )
    if not isinstance(task, ClassTask):
        return values
    probabilities = ops.convert_to_numpy(keras.activations.get(task.activation)(values))
    best = np.argsort(-probabilities, axis=-1, kind="stable")
    shown = np.ones(values.shape, bool)
    if top is None and isinstance(task, MultiLabel):
        shown = task.is_predicted(values)
    else:
        best = best[:, : top or 1]
    names = task.class_names
    return [
        [(names[i], float(row[i])) for i in order if told[i]]
        for row, order, told in zip(probabilities, best, shown, strict=True)
    ]
