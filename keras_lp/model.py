"""The one Keras model subclass: what the builders return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lp import checks
from keras_lp.tasks import TASK_LOSS, Head, Task, heads, tasks


@keras.saving.register_keras_serializable("keras_lp")
class Model(keras.Model):
    """A compiled Functional model with a backbone and one head a task.

    It behaves as any Keras model, with two differences:

    - a missing label (-1 for `Classification` and the entries of `MultiLabel`, NaN for
      `Regression`, or a task's key absent from the dict of labels) takes no part in the loss and
      the metrics, nor in what they are divided by;
    - `fit` looks at inputs and labels before they are used, and refuses a model whose
      `trainable` flags changed since `compile`.

    Made by `lp.transfer_model`, `lp.finetune_model` and `lp.multitask_model`.
    """

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as `keras.Model.fit` does, after checking what it is given.

        Args:
            x: inputs: arrays, or a batched `tf.data.Dataset` of `(x, labels)`.
            y: labels: an array, or for several tasks a dict of arrays by task.
            *args: further arguments of `keras.Model.fit`.
            **kwargs: further arguments of `keras.Model.fit`.

        Returns:
            The `keras.callbacks.History`.

        Raises:
            ValueError: `trainable` flags that changed since `compile`; NaN inputs; labels
                outside the classes or of an unknown task. In a `tf.data.Dataset` they are found
                when their batch is reached, and TensorFlow passes the message on.
        """
        checks.check_trainable_unchanged(self)
        x = self._checked(x, y)
        validation = kwargs.get("validation_data")
        if isinstance(validation, tf.data.Dataset):
            kwargs["validation_data"] = self._checked(validation, None)
        elif isinstance(validation, (tuple, list)):
            self._checked(*validation[:2])
        return super().fit(x, y, *args, **kwargs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Returns the sum of the tasks' losses, each the mean over its labels present."""
        y, y_pred, sample_weight = _mask_missing(self, y, y_pred, sample_weight)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Updates the metrics with the labels present and returns all results."""
        y, y_pred, sample_weight = _mask_missing(self, y, y_pred, sample_weight)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def get_metrics_result(self) -> dict[str, Any]:
        """Returns all results; the tasks' losses are means over labels, not over batches."""
        logs = super().get_metrics_result()
        names = list(tasks(self))
        single = len(names) == 1
        exact = {
            name: logs.pop(TASK_LOSS if single else f"{name}_{TASK_LOSS}", None) for name in names
        }
        if names and all(value is not None for value in exact.values()):
            if not single:
                logs.update({f"{name}_loss": value for name, value in exact.items()})
            if not self.losses:  # a penalty has no label to count: Keras's mean of batches stays
                logs["loss"] = sum(exact.values())
        return logs

    def _checked(self, x: Any, y: Any) -> Any:
        if isinstance(x, tf.data.Dataset):
            return checks.checked_dataset(tasks(self), x)
        if y is not None:
            checks.check_examples(tasks(self), x, y)
        return x


def build_model(
    backbone: keras.Model,
    new_tasks: Mapping[str, Task],
    *,
    pooling: str | None,
    hidden_units: Sequence[int],
    dropout: float,
    single: bool,
) -> Model:
    """Returns an uncompiled model: the backbone, pooled, with one head a task.

    Args:
        backbone: a headless model with one output of rank 2, 3 or 4.
        new_tasks: the tasks by name; a head, its output and its metrics carry the name.
        pooling: `"avg"`, `"max"`, `"flatten"` or None.
        hidden_units: sizes of the dense layers (relu) of each head.
        dropout: rate of the dropout before each head's last layer.
        single: whether the output is a tensor; else it is a dict by task.
    """
    inputs = keras.tree.map_structure(
        lambda tensor: keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name),
        backbone.inputs[0] if len(backbone.inputs) == 1 else backbone.input,
    )
    features = _pool(backbone(inputs), pooling)
    outputs = {}
    for name, task in new_tasks.items():
        x = features
        for i, units in enumerate(hidden_units):
            x = keras.layers.Dense(units, activation="relu", name=f"{name}_hidden_{i}")(x)
        if dropout:
            x = keras.layers.Dropout(dropout, name=f"{name}_dropout")(x)
        outputs[name] = Head(task, name=name)(x)
    return Model(inputs, next(iter(outputs.values())) if single else outputs)


def compile_tasks(model: Model, optimizer: Any) -> Model:
    """Compiles a model with the losses and metrics of its tasks, and returns it."""
    losses = {name: task.loss() for name, task in tasks(model).items()}
    metrics = {name: task.metrics() for name, task in tasks(model).items()}
    if not isinstance(model.output, Mapping):
        losses, metrics = (next(iter(named.values())) for named in (losses, metrics))
    model.compile(optimizer=optimizer, loss=losses, weighted_metrics=metrics)
    # Built now, so that a model saved before it has trained loads without a warning.
    model.optimizer.build(model.trainable_variables)
    return model


def backbone_of(model: keras.Model) -> keras.Model | None:
    """Returns the backbone of a model that keras_lp built, else None."""
    if not heads(model):
        return None
    return next((layer for layer in model.layers if isinstance(layer, keras.Model)), None)


def make_optimizer(optimizer: Any, learning_rate: Any) -> keras.optimizers.Optimizer:
    """Returns a Keras optimizer from its name, or the optimizer given as it is.

    Args:
        optimizer: the name of a Keras optimizer, or an optimizer with a rate of its own.
        learning_rate: the rate, for a name.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor an optimizer.
    """
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise TypeError(
            "`optimizer` must be the name of a Keras optimizer or an instance of one. Received: "
            f"optimizer={optimizer!r}."
        )
    if not isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        checks.check_positive("learning_rate", learning_rate)
        learning_rate = float(learning_rate)
    known = {
        name.lower(): value
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
        and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
    }
    checks.check_choice("optimizer", optimizer.lower(), sorted(known))
    return known[optimizer.lower()](learning_rate=learning_rate)


def _pool(features: Any, pooling: str | None) -> Any:
    checks.check_choice("pooling", pooling, ["avg", "max", "flatten", None])
    rank = len(features.shape)
    if rank == 2 or pooling is None:
        return features
    if pooling == "flatten":
        return keras.layers.Flatten(name="pooling")(features)
    layers = {
        ("avg", 3): keras.layers.GlobalAveragePooling1D,
        ("max", 3): keras.layers.GlobalMaxPooling1D,
        ("avg", 4): keras.layers.GlobalAveragePooling2D,
        ("max", 4): keras.layers.GlobalMaxPooling2D,
    }
    if (pooling, rank) not in layers:
        raise ValueError(
            "A backbone must give features of rank 2 (batch, features), 3 (batch, steps, "
            "features) or 4 (batch, height, width, features). Received: an output of shape "
            f"{tuple(features.shape)}."
        )
    return layers[pooling, rank](name="pooling")(features)


def _mask_missing(
    model: keras.Model, y: Any, y_pred: Any, sample_weight: Any
) -> tuple[Any, Any, Any]:
    if not isinstance(y_pred, Mapping):
        (task,) = tasks(model).values()
        return task.mask_missing(y, y_pred, sample_weight)
    labels, outputs, weights = {}, {}, {}
    for name, task in tasks(model).items():
        weight = sample_weight.get(name) if isinstance(sample_weight, Mapping) else sample_weight
        labels[name], outputs[name], weights[name] = task.mask_missing(
            y.get(name), y_pred[name], weight
        )
    return labels, outputs, weights
