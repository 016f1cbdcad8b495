"""Converts a model to Keras's own classes, so that it loads where keras_lp is not installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_lp.backbones.copying import finalize_normalization
from keras_lp.backbones.features import Features
from keras_lp.backbones.freezing import restore_flag
from keras_lp.backbones.images import Augmentation
from keras_lp.backbones.pooling import (
    MaskedAveragePooling1D,
    MaskedMaxPooling1D,
    TokenPooling,
    masks_steps,
)
from keras_lp.backbones.text import TextEmbedding
from keras_lp.balancing.ways import Balancing
from keras_lp.model.adapters import adapted_layers
from keras_lp.model.compiled import has_own_losses
from keras_lp.tasks.heads import Head, heads, tasks
from keras_lp.tasks.multi_label import MultiLabel
from keras_lp.tasks.regression import Regression
from keras_lp.tasks.task import ClassTask, Task
from keras_lp.utils.keras_internals import compile_arguments, run_through_graph, sublayers


def plain_model(model: keras.Model) -> keras.Model:
    """Returns a copy of a model in Keras's own classes, which does not need keras_lp.

    Its `.keras` file loads in any process with Keras 3: a server, a converter, a colleague's
    notebook. Outputs and weights are the same; the scaling of features and of regression labels is
    folded into the last `Dense` layers. Your own layers are unchanged.

    The copy lacks what Keras does not support: missing labels (train on complete labels), class
    weights, balancing, layer rates, class names (`lp.class_names(model)` returns them), the feature
    cache, and inference mode of frozen layers (their Dropout is on in `fit`). Keras averages a
    fully masked sequence to NaN. The loss is that of the task; for a `Regression` it is in squared
    units of the labels. Each output has one metric, `accuracy` or `mae`. The state of the optimizer
    is copied if it trains the same variables.

    Args:
        model: a model that keras_lp built.

    Returns:
        A `keras.Model`. It is compiled if `model` is compiled with the losses of its tasks.

    Raises:
        ValueError: if the model has no tasks, has adapters (merge them first), or pools with the
            maximum over masked steps.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu")])
    >>> model = lp.transfer_model(backbone, ["cat", "dog"])
    >>> plain = lp.plain_model(model)
    >>> type(plain).__module__.startswith("keras.")
    True
    >>> lp.class_names(model)
    {'predictions': ['cat', 'dog']}
    """
    known = heads(model)
    if not known:
        raise ValueError(
            "plain_model takes a model that keras_lp built. Received: model "
            f"{model.name!r} without a task head. Save it directly."
        )
    if adapted_layers(model):
        raise ValueError(
            "plain_model takes a model without adapters. Received: model "
            f"{model.name!r} with adapters. Call lp.merge_adapters(model) first."
        )
    layers = sublayers(model)
    if masks_steps(model) and any(isinstance(layer, MaskedMaxPooling1D) for layer in layers):
        raise ValueError(
            "plain_model needs layers that Keras has. Received: model "
            f'{model.name!r} with pooling="max" over steps that may be masked; Keras takes the '
            'maximum over all steps. Build it with pooling="avg".'
        )
    inputs = keras.tree.map_structure(
        lambda tensor: keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name),
        model.input,
    )
    copies: list[tuple[Any, keras.Layer]] = []
    made: dict[int, Callable[..., Any]] = {}

    def plain(operation: Any) -> Callable[..., Any]:
        if id(operation) not in made:
            made[id(operation)] = _plain(operation, copies)
        return made[id(operation)]

    outputs = run_through_graph(model, inputs, operation_fn=plain)
    result = keras.Model(inputs, outputs, name=model.name)
    for original, copy in copies:
        _copy_weights(original, copy)
    if getattr(model, "compiled", False) and has_own_losses(model):
        _compile(model, result)
    return result


def with_values(
    model: keras.Model,
    variables: Sequence[Any],
    values: Sequence[np.ndarray],
    copy: Callable[[keras.Model], keras.Model] = plain_model,
) -> keras.Model:
    """Returns a copy of a model in which some variables have other values."""
    before = [variable.numpy() for variable in variables]
    try:
        set_values(variables, values)
        return copy(model)
    finally:
        set_values(variables, before)


def set_values(variables: Sequence[Any], values: Sequence[Any]) -> None:
    """Sets variables to values."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def class_names(model: keras.Model) -> dict[str, list[str]]:
    """Returns the class names by task; `"0"`, `"1"`, ... for classes without names.

    Args:
        model: a model that keras_lp built.

    Returns:
        A dict of lists of names. Tasks without classes are not in it.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
    >>> lp.class_names(lp.multitask_model(backbone, {"age": 2, "mood": ["glad", "sad"]}))
    {'age': ['0', '1'], 'mood': ['glad', 'sad']}
    """
    return {
        name: list(task.class_names)
        for name, task in tasks(model).items()
        if isinstance(task, ClassTask)
    }


def _plain(operation: Any, copies: list[tuple[Any, keras.Layer]]) -> Callable[..., Any]:
    """Returns a function equivalent to an operation of a graph; records the copies of layers."""
    if isinstance(operation, (Features, Balancing)):
        return lambda x, **_: x
    if isinstance(operation, TokenPooling):
        return operation.call  # of Keras's operations, which become part of the graph
    if isinstance(operation, MaskedMaxPooling1D):
        pooling = keras.layers.GlobalMaxPooling1D.from_config(operation.get_config())
        return lambda x, **_: pooling(x)  # without a mask argument
    if isinstance(operation, MaskedAveragePooling1D):
        return keras.layers.GlobalAveragePooling1D.from_config(operation.get_config())
    if not isinstance(operation, keras.Layer):
        return operation
    if isinstance(operation, Augmentation):
        copy = _clone(operation.layer)
        copies.append((operation.layer, copy))
        return copy
    if isinstance(operation, Head):
        config = keras.layers.Dense.get_config(operation)
        copy = keras.layers.Dense.from_config({**config, "units": operation.units})
    else:
        copy = _clone(operation)
    copies.append((operation, copy))
    return copy


def _clone(layer: keras.Layer) -> keras.Layer:
    if isinstance(layer, keras.Model):
        return keras.models.clone_model(layer, clone_function=_clone)
    if isinstance(layer, TextEmbedding):
        config = keras.layers.Embedding.get_config(layer)
        return keras.layers.Embedding.from_config(config)
    return type(layer).from_config(layer.get_config())


def _copy_weights(original: keras.Layer, copy: keras.Layer) -> None:
    if isinstance(original, Head):
        kernel, bias = original.raw_weights()
        if isinstance(original.task, Regression):
            std, mean = np.asarray(original.std), np.asarray(original.mean)
            kernel, bias = kernel * std, bias * std + mean
        copy.set_weights([kernel, bias])
        return
    copy.set_weights(original.get_weights())
    finalize_normalization(copy)
    pairs = zip(sublayers(original), sublayers(copy), strict=True)
    for ours, other in pairs:  # outer layers come first
        restore_flag(other, ours.trainable)
    for ours, other in zip(original.weights, copy.weights, strict=True):
        other.trainable = ours.trainable


def _compile(model: keras.Model, plain: keras.Model) -> None:
    known = tasks(model)
    losses: Any = {name: task.make_loss() for name, task in known.items()}
    metrics: Any = {name: [_metric(task)] for name, task in known.items()}
    if not isinstance(model.output, Mapping):
        losses, metrics = (next(iter(part.values())) for part in (losses, metrics))
    optimizer = _plain_optimizer(model.optimizer)
    plain.compile(
        optimizer, losses, loss_weights=compile_arguments(model)["loss_weights"],
        weighted_metrics=metrics,
    )  # fmt: skip
    optimizer.build(plain.trainable_variables)
    own = [v for v in model.optimizer.variables if v.name != "multipliers"]
    other = optimizer.variables
    same = [tuple(v.shape) for v in own] == [tuple(v.shape) for v in other]
    if same and len(model.trainable_variables) == len(plain.trainable_variables):
        for ours, theirs in zip(own, other, strict=True):
            theirs.assign(ours)


def _metric(task: Task) -> keras.metrics.Metric:
    if isinstance(task, Regression):
        return keras.metrics.MeanAbsoluteError(name="mae")
    if isinstance(task, MultiLabel):
        return keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)
    return keras.metrics.SparseCategoricalAccuracy(name="accuracy")


def _plain_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Returns Keras's own optimizer with the same settings, without layer rates."""
    config = optimizer.get_config()
    config.pop("multipliers", None)
    kind: Any = next(c for c in type(optimizer).__mro__ if c.__module__.startswith("keras."))
    return kind.from_config(config)
