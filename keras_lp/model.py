"""The one Keras model subclass: what the builders return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_lp import checks
from keras_lp.freezing import restore_flag
from keras_lp.heads import heads, tasks
from keras_lp.tasks import TASK_LOSS


@keras.saving.register_keras_serializable("keras_lp")
class Model(keras.Model):
    """A compiled Functional model with a backbone and one head a task.

    It behaves as any Keras model, with these differences:

    - a missing label (-1 for `Classification` and the entries of `MultiLabel`, NaN for
      `Regression`, or a task's key absent from the dict of labels) takes no part in the loss and
      the metrics, nor in what they are divided by;
    - `fit` looks at inputs and labels before they are used (arrays and `tf.data.Dataset`s), and
      refuses a model whose `trainable` flags changed since `compile`;
    - a `.keras` file keeps the flags of layers inside layers too, which Keras itself forgets.

    Metrics of your own belong into `compile(weighted_metrics=...)`: Keras gives those under
    `metrics=` no weights, so they would count missing labels.

    Made by `lp.transfer_model`, `lp.finetune_model` and `lp.multitask_model`.
    """

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Trains as `keras.Model.fit` does, after checking what it is given.

        Args:
            x: inputs: arrays, or a batched `tf.data.Dataset` of `(x, labels)`.
            y: labels: an array, or for several tasks a dict of arrays by task.
            batch_size: as in Keras.
            epochs: as in Keras.
            verbose: as in Keras.
            callbacks: as in Keras.
            validation_split: as in Keras.
            validation_data: as in Keras, checked like `x` and `y`.
            *args: further arguments of `keras.Model.fit`.
            **kwargs: further arguments of `keras.Model.fit`.

        Returns:
            The `keras.callbacks.History`.

        Raises:
            ValueError: `trainable` flags that changed since `compile`; NaN inputs; no labels,
                or labels outside the classes, of another shape or of an unknown task. In a
                `tf.data.Dataset` a bad value is found when its batch is reached, and TensorFlow
                passes the message on.
            TypeError: labels that are not numbers.
        """
        checks.check_trainable_unchanged(self)
        x = self._checked(x, y)
        if isinstance(validation_data, tf.data.Dataset):
            validation_data = self._checked(validation_data, None)
        elif isinstance(validation_data, (tuple, list)):
            self._checked(*validation_data[:2])
        return super().fit(
            x,
            y,
            batch_size,
            epochs,
            verbose,
            callbacks,
            validation_split,
            validation_data,
            *args,
            **kwargs,
        )

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
        known = tasks(self)
        several = isinstance(self.output, Mapping) and len(known) > 1
        exact = {
            name: logs.pop(f"{name}_{TASK_LOSS}" if several else TASK_LOSS, None) for name in known
        }
        if any(value is None for value in exact.values()) or not self._has_own_losses():
            return logs
        if several:
            logs.update({f"{name}_loss": value for name, value in exact.items()})
        if not self.losses:  # a penalty has no label to count: Keras's mean of batches stays
            weights = self._compile_config.config["loss_weights"] or {}
            logs["loss"] = sum(weights.get(name, 1.0) * value for name, value in exact.items())
        return logs

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile`, and which layers train."""
        flags = [layer.trainable for layer in self._flatten_layers(include_self=False)]
        return {**super().get_compile_config(), "trainable": flags}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as before saving, with the same layers trainable."""
        config = dict(config)
        flags = config.pop("trainable")
        for layer, flag in zip(self._flatten_layers(include_self=False), flags, strict=True):
            restore_flag(layer, flag)  # outer layers come first
        super().compile_from_config(config)

    def _has_own_losses(self) -> bool:
        """Whether the compiled losses are those of the tasks, with weights by name at most."""
        config = self._compile_config.config
        losses = config["loss"]
        losses = losses if isinstance(losses, Mapping) else dict.fromkeys(tasks(self), losses)
        return isinstance(config["loss_weights"] or {}, Mapping) and all(
            type(losses.get(name)) is type(task.loss()) for name, task in tasks(self).items()
        )

    def _checked(self, x: Any, y: Any) -> Any:
        if isinstance(x, tf.data.Dataset):
            return checks.checked_dataset(tasks(self), x)
        if y is not None:
            if isinstance(self.output, Mapping):
                checks.check_label_names(tasks(self), y)
            checks.check_examples(tasks(self), x, y)
        return x


def backbone_of(model: keras.Model) -> keras.Model | None:
    """Returns the backbone of a model that keras_lp built, else None."""
    if not heads(model):
        return None
    return next((layer for layer in model.layers if isinstance(layer, keras.Model)), None)


def input_structure(model: keras.Model) -> Any:
    """Returns the symbolic inputs of a model: a tensor, a dict, or a list of several."""
    structure = model.inputs if isinstance(model, keras.Sequential) else model.input
    alone = len(model.inputs) == 1 and not isinstance(structure, Mapping)
    return model.inputs[0] if alone else structure


def _mask_missing(
    model: keras.Model, y: Any, y_pred: Any, sample_weight: Any
) -> tuple[Any, Any, Any]:
    known = tasks(model)
    if y is None:
        raise ValueError(
            f"Training and evaluation need labels of the tasks {list(known)}. Received: y=None. "
            "Pass `fit(x, y)`, or a data set of pairs (x, y)."
        )
    if not isinstance(y_pred, Mapping):
        if isinstance(y, Mapping):
            raise ValueError(
                f"This model has one output, so its labels are an array. Received: y with the keys "
                f"{list(y)}."
            )
        (task,) = known.values()
        return task.mask_missing(y, y_pred, sample_weight)
    checks.check_label_names(known, y)
    labels, outputs, weights = {}, {}, {}
    for name, task in known.items():
        weight = sample_weight.get(name) if isinstance(sample_weight, Mapping) else sample_weight
        labels[name], outputs[name], weights[name] = task.mask_missing(
            y.get(name), y_pred[name], weight
        )
    return labels, outputs, weights
