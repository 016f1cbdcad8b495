"""The only subclass of `keras.Model`, which the builders return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lp.backbones import features
from keras_lp.backbones.freezing import restore_flag, run_graph
from keras_lp.backbones.pixels import warn_of_scaled_images
from keras_lp.balancing.balanced_step import balanced_step
from keras_lp.balancing.ways import Balancing, balancing_of
from keras_lp.model import checks
from keras_lp.model.absent import unknown_as_nan, with_unknown_hidden
from keras_lp.model.adapters import revive_adapters
from keras_lp.model.caching import computed_once
from keras_lp.model.class_balance import balance_classes, with_class_weight
from keras_lp.model.compiled import has_own_losses, loss_weights
from keras_lp.model.data import as_numbers, as_weights, check_labels, checked
from keras_lp.model.linear_heads import can_be_solved
from keras_lp.model.scaling import scale_features
from keras_lp.model.short_runs import fast_statistics, steps_of, unfinished
from keras_lp.tasks.heads import heads, tasks
from keras_lp.tasks.regression import label_batches, standardize
from keras_lp.tasks.task import ClassWeight
from keras_lp.utils.arguments import Verbose
from keras_lp.utils.interop import plain, plain_parts
from keras_lp.utils.keras_internals import sublayers

Callbacks = (
    keras.callbacks.Callback | Sequence[keras.callbacks.Callback] | keras.callbacks.CallbackList
)


@keras.saving.register_keras_serializable("keras_lp")
class Model(keras.Model):
    """A compiled Functional model with a backbone and one head per task.

    It behaves like any Keras model, with these differences:

    - a missing label (-1 for `Classification` and the entries of `MultiLabel`, NaN for
      `Regression`, or a task's key absent from the dict of labels) does not count in the loss, in
      the metrics or in their denominators;
    - loss and metrics of a task without labels, in `evaluate`, in an epoch or in its validation,
      are NaN instead of 0; callbacks do not receive them, so EarlyStopping cannot take them for
      the best;
    - `fit` checks inputs and labels before it uses them (arrays and `tf.data.Dataset`s), and
      rejects a model whose `trainable` flags changed since `compile`;
    - `fit` computes the features of a frozen backbone once, see `lp.transfer_model`;
    - in runs of fewer than 1,000 steps, the moving averages of trainable BatchNormalization
      layers adapt faster than their momentum says, so that `evaluate` scores the network that was
      trained;
    - `fit` prints a line if the loss still fell by more than 5 % in the last epoch;
    - a `.keras` file also stores the `trainable` flags of nested layers, unlike in Keras.

    Pass your own metrics as `compile(weighted_metrics=...)`: Keras passes no weights to
    `metrics=`, so they would count missing labels.

    Built by `lp.transfer_model`, `lp.finetune_model` and `lp.multitask_model`.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
    >>> isinstance(lp.transfer_model(backbone, 2), lp.Model)
    True
    """

    @checks.plain_errors()
    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Verbose = "auto",
        callbacks: Callbacks | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: ClassWeight | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Sequence[int] = 1,
    ) -> keras.callbacks.History:
        """Trains like `keras.Model.fit`, after checking the data.

        If the backbone is fully frozen and nothing random precedes it, the features of the
        examples are computed once instead of in every epoch (`cache_features` of
        `lp.transfer_model`).

        Args:
            x: inputs: arrays, or a batched `tf.data.Dataset` or `PyDataset` of `(x, labels)` or
                `(x, labels, sample_weight)`, or a Grain loader of such batches. A pandas
                `DataFrame` is an array of its columns.
            y: labels: an array, or a dict of arrays by task if there are several, such as a pandas
                `DataFrame` with a column per task.
            batch_size: as in Keras.
            epochs: as in Keras.
            verbose: as in Keras.
            callbacks: as in Keras.
            validation_split: as in Keras.
            validation_data: as in Keras, checked like `x` and `y`.
            shuffle: as in Keras; a data set whose features are cached is shuffled too.
            class_weight: dict of weights by class number or name, or `"balanced"`, for a model
                with one task that has classes; as in Keras, it also weights the metrics.
            sample_weight: weights of the examples, 0 or more: an array, or a dict of arrays by
                task; tasks that are not in the dict get weights of 1.
            initial_epoch: as in Keras.
            steps_per_epoch: as in Keras.
            validation_steps: as in Keras.
            validation_batch_size: as in Keras.
            validation_freq: as in Keras.

        Returns:
            The `keras.callbacks.History`.

        Raises:
            ValueError: if `trainable` flags changed since `compile`, inputs are NaN, labels are
                absent, outside the classes, of another shape or of an unknown task, or weights are
                below 0 or not finite. In a `tf.data.Dataset`, an invalid value is found when its
                batch is reached.
            TypeError: if labels are not numbers.
        """
        checks.check_trainable_unchanged(self)
        revive_adapters(self)
        x, y, sample_weight = plain_parts(x, y, sample_weight)
        validation_data = plain(validation_data)
        if isinstance(x, tf.data.Dataset):
            x = checked(self, x)
        else:
            check_labels(self, x, y)
            if not features.are_features(x):
                warn_of_scaled_images(self, x)
            sample_weight = as_weights(self, y, sample_weight)
            y = as_numbers(self, y)
        validation_data = checked(self, validation_data, " of validation_data")
        arguments = {
            "x": x,
            "y": y,
            "batch_size": batch_size,
            "epochs": epochs,
            "verbose": verbose,
            "callbacks": callbacks,
            "validation_split": validation_split,
            "validation_data": validation_data,
            "shuffle": shuffle,
            "class_weight": None if heads(self) else class_weight,
            "sample_weight": sample_weight,
            "initial_epoch": initial_epoch,
            "steps_per_epoch": steps_per_epoch,
            "validation_steps": validation_steps,
            "validation_batch_size": validation_batch_size,
            "validation_freq": validation_freq,
        }
        if class_weight is not None and heads(self):
            arguments = with_class_weight(self, arguments, class_weight)
        standardize(heads(self), label_batches(arguments))
        balance_classes(heads(self), label_batches(arguments))
        if self._is_extended():
            return super().fit(**_with_own_callbacks(self, arguments))
        steps = steps_of(arguments)
        with fast_statistics(self, steps), computed_once(self, arguments) as arguments:
            scale_features(self, arguments["x"])
            history = super().fit(**_with_own_callbacks(self, arguments))
        line = unfinished(history, can_be_solved(self)) if verbose not in (0, False) else None
        if line is not None:
            print(line)
        return history

    @checks.plain_errors()
    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Verbose = "auto",
        sample_weight: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Evaluates like `keras.Model.evaluate`, after checking the data.

        Args:
            x: as in `fit`.
            y: as in `fit`.
            batch_size: as in Keras.
            verbose: as in Keras.
            sample_weight: as in `fit`.
            *args: as in Keras.
            **kwargs: as in Keras.

        Returns:
            The results as in Keras. Those of a task without labels are NaN.

        Raises:
            ValueError: as in `fit`.
            TypeError: as in `fit`.
        """
        if "_use_cached_eval_dataset" not in kwargs:  # `fit` has checked its data already
            x, y, sample_weight = plain_parts(x, y, sample_weight)
            if isinstance(x, tf.data.Dataset):
                x = checked(self, x)
            elif not features.are_features(x):
                check_labels(self, x, y)
            sample_weight = as_weights(self, y, sample_weight)
            y = as_numbers(self, y)
        return super().evaluate(x, y, batch_size, verbose, sample_weight, *args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Predicts like `keras.Model.predict`; a data set must be batched."""
        x, *_ = plain_parts(x)
        checks.check_batched(self, x)
        if not features.are_features(x):
            warn_of_scaled_images(self, x)
        return super().predict(x, *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Returns the outputs. Frozen layers run in inference mode: their Dropout is off."""
        if features.are_features(inputs):
            return features.run_above(self, inputs, training)
        if training and all(one is None for one in keras.tree.flatten(mask)):
            return run_graph(self, inputs, training)
        return super().call(inputs, training=training, mask=mask)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Returns the weighted sum of the tasks' losses, each a mean over the labels present."""
        if not has_own_losses(self):
            y, y_pred, sample_weight = _mask_missing(self, y, y_pred, sample_weight)
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        losses, _ = self.task_losses(y, y_pred, sample_weight)
        added = (self._aggregate_additional_loss(loss) for loss in self.losses)
        return sum([*losses.values(), *added])

    def task_losses(
        self, y: Any, y_pred: Any, sample_weight: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns each task's loss times its weight, and the sum of the weights of its labels.

        Both are by task, in the order of the outputs, which may differ from that of the tasks. A
        task of weight 0 counts like one without labels.

        Args:
            y: labels: an array, or a dict by task.
            y_pred: outputs of the same form.
            sample_weight: None, weights, or a dict of weights.
        """
        losses, counts = {}, {}
        factors = loss_weights(self)
        for name, head, *example in by_task(self, y, y_pred, sample_weight):
            loss = self.loss[name] if isinstance(self.loss, Mapping) else self.loss
            value, count = head.compute_loss(loss, *example)
            losses[name] = value * factors[name]
            counts[name] = count if factors[name] else tf.zeros_like(count)
        return losses, counts

    def train_step(self, data: Any) -> dict[str, Any]:
        """Trains on a batch; balanced tasks are weighted by their `lp.Balancing`."""
        balancing = balancing_of(self)
        if balancing is None or len(tasks(self)) < 2:
            return super().train_step(data)
        if not has_own_losses(self):
            raise ValueError(
                "Balancing needs the tasks' own losses. Received: a model compiled with "
                f"loss={self.loss!r}. Leave `loss` as the builder set it (model.loss), or build "
                'with balancing="equal".'
            )
        return balanced_step(self, balancing, data)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Updates the metrics with the labels present and returns all results."""
        masked = _mask_missing(self, y, y_pred, sample_weight, for_metrics=True)
        return super().compute_metrics(x, *masked)

    def get_metrics_result(self) -> dict[str, Any]:
        """Returns all results; the tasks' losses are means over labels, not over batches."""
        logs = super().get_metrics_result()
        exact = {name: logs.pop(head.loss_mean.name) for name, head in heads(self).items()}
        if not has_own_losses(self):
            return logs
        if isinstance(self.output, Mapping) and len(exact) > 1:
            logs.update({f"{name}_loss": value for name, value in exact.items()})
        if not self.losses:  # a penalty has no label count: Keras's mean over batches is kept
            factors = loss_weights(self)
            logs["loss"] = sum(factors[name] * value for name, value in exact.items())
        return unknown_as_nan(self, logs)

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile` and the `trainable` flags of the layers."""
        layers = [layer.trainable for layer in sublayers(self, include_self=False)]
        weights = [weight.trainable for weight in self.weights]
        flags = {"layers": layers, "weights": weights}
        return {**super().get_compile_config(), "trainable": flags}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as before saving, with the same trainable layers."""
        config = dict(config)
        flags = config.pop("trainable")
        layers = sublayers(self, include_self=False)
        for layer, flag in zip(layers, flags["layers"], strict=True):
            restore_flag(layer, flag)  # outer layers come first
        for weight, flag in zip(self.weights, flags["weights"], strict=True):
            weight.trainable = flag
        super().compile_from_config(config)

    def _assert_input_compatibility(self, *args: Any) -> None:
        if not features.are_features(args[0]):
            super()._assert_input_compatibility(*args)

    def _is_extended(self) -> bool:
        """Whether a user's subclass (or instance) has its own steps, which need the inputs."""
        steps = (
            *("call", "train_step", "test_step", "compute_loss", "compute_metrics"),
            *("evaluate", "make_train_function", "make_test_function"),
        )
        return any(
            name in vars(self) or getattr(type(self), name) is not getattr(Model, name)
            for name in steps
        )


def input_structure(model: keras.Model) -> Any:
    """Returns the symbolic inputs of a model: a tensor, a dict, or a list of several."""
    structure = model.inputs if isinstance(model, keras.Sequential) else model.input
    alone = len(model.inputs) == 1 and not isinstance(structure, Mapping)
    return model.inputs[0] if alone else structure


class _EpochEnd(keras.callbacks.Callback):
    """Passes the tasks' losses of each epoch to the balancing of a model."""

    def __init__(self, balancing: Balancing) -> None:
        super().__init__()
        self._balancing = balancing

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        losses = {task: (logs or {}).get(f"{task}_loss") for task in self._balancing.tasks}
        self._balancing.end_epoch({task: loss for task, loss in losses.items() if loss})


def _with_own_callbacks(model: keras.Model, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `fit` with the callbacks of this package around the user's."""
    balancing, callbacks = balancing_of(model), arguments["callbacks"]
    first = []
    if balancing is not None and type(balancing).end_epoch is not Balancing.end_epoch:
        first = [_EpochEnd(balancing)]  # first, so that a model saved after an epoch includes it
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        given = keras.tree.flatten(callbacks or [])
        return {**arguments, "callbacks": with_unknown_hidden([*first, *given])}
    given = [one for one in callbacks.callbacks if not isinstance(one, keras.callbacks.History)]
    after = [one for one in callbacks.callbacks if isinstance(one, keras.callbacks.History)]
    callbacks.callbacks = [*with_unknown_hidden([*first, *given]), *after]
    callbacks.set_model(model)
    return arguments


def by_task(model: keras.Model, y: Any, y_pred: Any, sample_weight: Any) -> list[tuple[Any, ...]]:
    """Returns `(name, head, y, y_pred, sample_weight)` of each task."""
    known = heads(model)
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
        ((name, head),) = known.items()
        return [(name, head, y, y_pred, sample_weight)]
    checks.check_label_names(tasks(model), y)
    weights = sample_weight if isinstance(sample_weight, Mapping) else None
    return [
        (name, head, y.get(name), y_pred[name], weights.get(name) if weights else sample_weight)
        for name, head in known.items()
    ]


def _mask_missing(
    model: keras.Model, y: Any, y_pred: Any, sample_weight: Any, for_metrics: bool = False
) -> tuple[Any, Any, Any]:
    masked = {}
    for name, head, *example in by_task(model, y, y_pred, sample_weight):
        masked[name] = head.task.mask_missing(*example)
        if for_metrics:
            masked[name] = head.task.for_metrics(*masked[name])
    if not isinstance(y_pred, Mapping):
        return next(iter(masked.values()))
    y, y_pred, weight = ({name: parts[i] for name, parts in masked.items()} for i in range(3))
    return y, y_pred, weight
