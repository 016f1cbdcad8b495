"""The losses and metrics with which a model was compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import keras

from keras_lp.tasks.heads import tasks


def has_own_losses(model: keras.Model) -> bool:
    """Whether the compiled losses are those of the tasks, optionally with weights by name."""
    weights, losses = _config(model)["loss_weights"], cast(Any, model.loss)
    losses = losses if isinstance(losses, Mapping) else dict.fromkeys(tasks(model), losses)
    return (weights is None or isinstance(weights, (Mapping, int, float))) and all(
        type(losses.get(name)) is type(task.make_loss()) for name, task in tasks(model).items()
    )


def loss_weights(model: keras.Model) -> dict[str, float]:
    """Returns the factor of each task's loss in the sum."""
    weights = _config(model)["loss_weights"]
    if not isinstance(weights, Mapping):
        return dict.fromkeys(tasks(model), 1.0 if weights is None else weights)
    return {name: weights.get(name, 1.0) for name in tasks(model)}


def metrics_of(model: keras.Model, name: str) -> list[Any]:
    """Returns the compiled metrics of one task."""
    found = []
    for argument in ("metrics", "weighted_metrics"):
        given = _config(model).get(argument)
        if isinstance(given, Mapping):
            given = given.get(name)
        elif len(tasks(model)) > 1:  # a list with one entry per output
            by_output = dict(zip(model.output_names, given or (), strict=False))
            given = by_output.get(name)
        found += keras.tree.flatten(given)
    return found


def trace_again(model: keras.Model) -> None:
    """Makes a compiled model trace its steps again, because old metrics are constants in them.

    Like `compile`, but keeps the optimizer's state and the trainable layers. The functions are
    replaced at once, so a `fit` whose callback calls this uses the new ones.
    """
    if model.train_function is not None:
        model.make_train_function(force=True)
    if model.test_function is not None:
        model.make_test_function(force=True)
    model.__dict__.pop("_several_steps", None)  # set by `caching` in the last `fit`
    compiled = model._compile_config  # a federation checks whether this object is new
    model._compile_config = type(compiled)(**compiled.config)


def _config(model: keras.Model) -> dict[str, Any]:
    return model._compile_config.config
