"""What a model was compiled with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import keras

from keras_lp.tasks.heads import tasks


def has_own_losses(model: keras.Model) -> bool:
    """Whether the compiled losses are those of the tasks, with weights by name at most."""
    weights, losses = _config(model)["loss_weights"], cast(Any, model.loss)
    losses = losses if isinstance(losses, Mapping) else dict.fromkeys(tasks(model), losses)
    return (weights is None or isinstance(weights, (Mapping, int, float))) and all(
        type(losses.get(name)) is type(task.make_loss()) for name, task in tasks(model).items()
    )


def loss_weights(model: keras.Model) -> dict[str, float]:
    """Returns what the loss of each task is multiplied by in the sum."""
    weights = _config(model)["loss_weights"]
    if not isinstance(weights, Mapping):
        return dict.fromkeys(tasks(model), 1.0 if weights is None else weights)
    return {name: weights.get(name, 1.0) for name in tasks(model)}


def metrics_of(model: keras.Model, name: str) -> list[Any]:
    """Returns what a model was compiled with as metrics of one task."""
    found = []
    for argument in ("metrics", "weighted_metrics"):
        given = _config(model).get(argument)
        if isinstance(given, Mapping):
            given = given.get(name)
        elif len(tasks(model)) > 1:  # a list with one entry for each output
            by_output = dict(zip(model.output_names, given or (), strict=False))
            given = by_output.get(name)
        found += keras.tree.flatten(given)
    return found


def trace_again(model: keras.Model) -> None:
    """Makes a compiled model trace its steps again, in which old metrics are constants.

    As `compile` would, but the optimizer's state and what trains stay as they are. The functions
    are replaced at once: a `fit` that a callback was called from goes on with them.
    """
    if model.train_function is not None:
        model.make_train_function(force=True)
    if model.test_function is not None:
        model.make_test_function(force=True)
    model.__dict__.pop("_several_steps", None)  # of `caching`, from the last `fit`
    compiled = model._compile_config  # a federation looks whether it is a new one
    model._compile_config = type(compiled)(**compiled.config)


def _config(model: keras.Model) -> dict[str, Any]:
    return model._compile_config.config
