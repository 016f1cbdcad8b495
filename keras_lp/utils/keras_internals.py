"""Private names of Keras, each behind one function.

No public name of Keras does the same. They were seen in Keras 3.15.
`tests/test_keras_internals.py` tells which of them an update has taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.losses.loss import unscale_loss_for_distribution
from keras.src.models.functional import Functional
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.utils.naming import to_snake_case

__all__ = [
    "BaseOptimizer",  # the optimizer without what the backend adds
    "Functional",  # the class of models with a graph
    "get_keras_mask",
    "set_keras_mask",
    "to_snake_case",  # how Keras names a layer after its class
    "train_validation_split",  # how `fit` splits arrays
    "unscale_loss_for_distribution",  # undoes the scaling of losses by replicas
]


# Layers


def sublayers(layer: keras.Layer, include_self: bool = True) -> list[keras.Layer]:
    """Returns all layers in a layer at any depth, outer layers first."""
    return list(layer._flatten_layers(include_self=include_self))


def direct_sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the layers that a layer holds itself; `layers` exists for models only."""
    return list(layer._layers)


def own_trainable_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the trainable variables that belong to a layer itself, also if it is frozen."""
    return list(layer._trainable_variables)


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the variables that belong to a layer itself."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def untrack_variable(layer: keras.Layer, variable: keras.Variable) -> None:
    """Removes a variable from a layer."""
    layer._untrack_variable(variable)


def draws_random_numbers(layer: keras.Layer) -> bool:
    """Whether a layer itself has a random generator, as Dropout has."""
    return bool(layer._seed_generators)


def takes_training(layer: keras.Layer) -> bool:
    """Whether the `call` of a layer has a `training` argument."""
    return bool(layer._call_has_training_arg)


# Graphs


def graph_of(model: Any) -> Any:
    """Returns the Functional model inside a Sequential model; anything else as it is."""
    return model._functional if isinstance(model, keras.Sequential) else model


def producer(tensor: Any) -> Any:
    """Returns the operation or layer that computes a symbolic tensor."""
    return tensor._keras_history.operation


def inputs_of_call(tensor: Any) -> list[Any]:
    """Returns the tensors from which the producer of a symbolic tensor computes it."""
    history = tensor._keras_history
    return list(history.operation._inbound_nodes[history.node_index].input_tensors)


def input_tensors_of_calls(operation: Any) -> list[list[Any]]:
    """Returns the input tensors of each symbolic call of an operation."""
    return [list(node.input_tensors) for node in operation._inbound_nodes]


def run_through_graph(
    model: Functional, inputs: Any, operation_fn: Callable[[Any], Callable[..., Any]]
) -> Any:
    """Runs the graph of a model with another function instead of each operation."""
    return model._run_through_graph(inputs, operation_fn=operation_fn)


def standardize_inputs(model: Functional, inputs: Any) -> Any:
    """Returns inputs as a Functional model takes them: a flat list with ranks and dtypes fitted."""
    return model._standardize_inputs(inputs)


def has_masks(tensors: Sequence[Any]) -> bool:
    """Whether all tensors carry a mask."""
    return all(get_keras_mask(tensor) is not None for tensor in tensors)


# Compiled models


def compile_config(model: keras.Model) -> Any:
    """Returns the arguments of the last `compile`; each `compile` makes a new object."""
    return model._compile_config


def set_compile_config(model: keras.Model, config: Any) -> None:
    """Sets the arguments of the last `compile`."""
    model._compile_config = config


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Returns the arguments of the last `compile` by name."""
    return model._compile_config.config or {}


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """Returns the metric that averages the loss of a compiled model."""
    tracker: Any = model._loss_tracker
    return tracker


def loss_metrics(model: keras.Model) -> list[keras.metrics.Mean]:
    """Returns the metrics that average the losses of a compiled model by output."""
    loss: Any = model._compile_loss
    return list(loss.metrics)


def flags_at_compile(model: keras.Model) -> dict[keras.Layer, bool]:
    """Returns the `trainable` flag of each layer at the last `compile`."""
    return dict(getattr(model, "_compiled_trainable_state", {}))


def is_distributed(model: keras.Model) -> bool:
    """Whether a model was built under a `tf.distribute` strategy."""
    return model._distribute_strategy is not None


def metric_direction(metric: Any) -> str | None:
    """Returns `"up"` if a larger value of a metric is better, `"down"`, or None if unknown."""
    return getattr(metric, "_direction", None)


# Optimizers


def rate_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """Returns the learning rate of an optimizer: its variable or its schedule."""
    return optimizer._learning_rate


def decays(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Whether weight decay of an optimizer applies to a variable."""
    return bool(optimizer._use_weight_decay(variable))
