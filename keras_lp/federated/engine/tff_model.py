"""TFF computations for a compiled Keras model.

The process around the client work (broadcast, sum, server optimizer) is composed from templates of
TFF. Clients are grouped into blocks. Each block is a data set with one element, so the worker needs
no input pipeline (the default loop of TFF is several times slower).
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.federated.engine.robust import robust_mean
from keras_lp.federated.engine.server_step import ServerStep, mean_update, noised_mean
from keras_lp.utils.robust import Aggregation


def build_process(
    tff: Any,
    variables: Sequence[keras.Variable],
    block_spec: Any,
    train: Callable[..., Any],
    groups: Sequence[int],
    server_optimizer: keras.optimizers.Optimizer,
    private: bool = False,
    aggregation: Aggregation = "mean",
    count: int = 0,
) -> Any:
    """Returns a `tff.learning.templates.LearningProcess` of federated averaging.

    The measurements of its client work are those results of `client_work.train_block` that are not
    averaged; that of its finalizer is the L2 norm of the mean update.

    Args:
        tff: the module.
        variables: the shared trainable variables, the model weights of the process.
        block_spec: the `tf.TensorSpec`s of a block.
        train: the result of `client_work.train_block`.
        groups: the index of the group of each variable.
        server_optimizer: the optimizer that applies the mean update.
        private: whether the mean is the sum plus noise, divided by a fixed number of clients. Both
            are the state of the aggregator. Defaults to False.
        aggregation: how updates are combined. Others than `"mean"` need `separate` updates of
            `train_block`. Defaults to `"mean"`.
        count: number of clients of a round, for separate updates.
    """
    learning = tff.learning
    initial_weights, weights_type = _weights(tff, variables)
    data_type = _data_type(tff, block_spec)
    group_count = block_spec["shares"].shape[-1]

    @tff.tensorflow.computation(weights_type, data_type)
    def train_clients(weights: Any, data: tf.data.Dataset) -> Any:
        result = train(tuple(weights.trainable), data.get_single_element())
        names = ("metrics", "dropped", "within", "personal", "adapters")
        measured = collections.OrderedDict((name, result[name]) for name in names)
        return learning.templates.ClientResult(result["update"], result["shares"]), measured

    no_state = _no_state(tff)

    @tff.federated_computation(
        no_state.type_signature.result,
        tff.FederatedType(weights_type, tff.CLIENTS),
        tff.FederatedType(data_type, tff.CLIENTS),
    )
    def client_work(state: Any, weights: Any, data: Any) -> Any:
        result, measured = tff.federated_map(train_clients, (weights, data))
        return tff.templates.MeasuredProcessOutput(state, result, tff.federated_sum(measured))

    trainable = weights_type.trainable
    if private:
        aggregator = _private_mean(tff, trainable, group_count)
    elif aggregation != "mean":
        aggregator = _robust_mean(tff, variables, count, aggregation)
    else:
        aggregator = _mean(tff, trainable, groups, group_count)
    return learning.templates.compose_learning_process(
        initial_weights,
        learning.templates.build_broadcast_process(weights_type),
        learning.templates.ClientWorkProcess(no_state, client_work),
        aggregator,
        _server_step(tff, server_optimizer, variables, weights_type),
    )


def build_sum(
    tff: Any, weights_spec: Sequence[tf.TensorSpec], block_spec: Any, function: Callable[..., Any]
) -> Any:
    """Returns the TFF computation `(weights, blocks) -> result`, summed over the blocks.

    Args:
        tff: the module.
        weights_spec: the `tf.TensorSpec`s of the weights that are sent to the clients.
        block_spec: the `tf.TensorSpec`s of a block.
        function: `(weights, block) -> result`, for example from `client_work.evaluate_block`.
    """
    weights_type = tff.to_type(tuple(_tensor_type(tff, spec) for spec in weights_spec))
    data_type = _data_type(tff, block_spec)

    @tff.tensorflow.computation(weights_type, data_type)
    def work(weights: Any, data: tf.data.Dataset) -> Any:
        return function(tuple(weights), data.get_single_element())

    @tff.federated_computation(
        tff.FederatedType(weights_type, tff.SERVER), tff.FederatedType(data_type, tff.CLIENTS)
    )
    def add_up(weights: Any, data: Any) -> Any:
        at_clients = tff.federated_broadcast(weights)
        return tff.federated_sum(tff.federated_map(work, (at_clients, data)))

    return add_up


def _weights(tff: Any, variables: Sequence[keras.Variable]) -> tuple[Any, Any]:
    values = tuple(variable.numpy() for variable in variables)

    @tff.tensorflow.computation
    def initial_weights() -> Any:
        trainable = tuple(tf.constant(value) for value in values)
        return tff.learning.models.ModelWeights(trainable, ())

    return initial_weights, initial_weights.type_signature.result


def _data_type(tff: Any, block_spec: Any) -> Any:
    return tff.SequenceType(tf.nest.map_structure(lambda spec: _tensor_type(tff, spec), block_spec))


def _tensor_type(tff: Any, spec: tf.TensorSpec) -> Any:
    return tff.TensorType(spec.dtype.as_numpy_dtype, spec.shape)


def _no_state(tff: Any) -> Any:
    @tff.federated_computation
    def no_state() -> Any:
        return tff.federated_value((), tff.SERVER)

    return no_state


def _mean(tff: Any, update_type: Any, groups: Sequence[int], group_count: int) -> Any:
    """Returns the TFF aggregation of `mean_update`."""
    shares_type = tff.TensorType(np.float32, (group_count,))

    @tff.tensorflow.computation(update_type, shares_type)
    def divide(total: Any, shares: Any) -> Any:
        return mean_update(list(total), shares, groups)

    return _of_sums(tff, update_type, shares_type, divide)


def _private_mean(tff: Any, update_type: Any, group_count: int) -> Any:
    """Returns the TFF aggregation: the sum of updates plus noise, divided by a fixed number.

    Its state is `(noise, number)`, which the caller sets before each round.
    """
    shares_type = tff.TensorType(np.float32, (group_count,))
    shapes = [tuple(one.shape) for one in update_type]

    @tff.tensorflow.computation
    def nothing() -> Any:
        return tuple(tf.zeros(shape) for shape in shapes), tf.constant(1.0)

    state_type = nothing.type_signature.result

    @tff.tensorflow.computation(update_type, state_type)
    def add_noise(total: Any, state: Any) -> Any:
        noise, count = state
        return noised_mean(list(total), list(noise), count)

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_eval(nothing, tff.SERVER)

    @tff.federated_computation(
        tff.FederatedType(state_type, tff.SERVER),
        tff.FederatedType(update_type, tff.CLIENTS),
        tff.FederatedType(shares_type, tff.CLIENTS),
    )
    def aggregate(state: Any, updates: Any, shares: Any) -> Any:
        mean = tff.federated_map(add_noise, (tff.federated_sum(updates), state))
        unmeasured = tff.federated_value((), tff.SERVER)
        return tff.templates.MeasuredProcessOutput(state, mean, unmeasured)

    return tff.templates.AggregationProcess(initialize, aggregate)


def _robust_mean(
    tff: Any, variables: Sequence[keras.Variable], count: int, aggregation: Aggregation
) -> Any:
    """Returns the TFF aggregation: a robust mean of the separate updates of the clients."""
    update_type = tff.to_type(
        tuple(tff.TensorType(np.dtype(v.dtype).type, (count, *v.shape)) for v in variables)
    )
    present_type = tff.TensorType(np.float32, (count,))

    @tff.tensorflow.computation(update_type, present_type)
    def combine(updates: Any, present: Any) -> Any:
        return tuple(robust_mean(list(updates), present > 0, aggregation))

    return _of_sums(tff, update_type, present_type, combine)


def _of_sums(tff: Any, update_type: Any, shares_type: Any, function: Any) -> Any:
    """Returns the TFF aggregation that applies a function to the sums of updates and shares."""
    no_state = _no_state(tff)

    @tff.federated_computation(
        no_state.type_signature.result,
        tff.FederatedType(update_type, tff.CLIENTS),
        tff.FederatedType(shares_type, tff.CLIENTS),
    )
    def aggregate(state: Any, updates: Any, shares: Any) -> Any:
        sums = tff.federated_sum(updates), tff.federated_sum(shares)
        nothing = tff.federated_value((), tff.SERVER)
        mean = tff.federated_map(function, sums)
        return tff.templates.MeasuredProcessOutput(state, mean, nothing)

    return tff.templates.AggregationProcess(no_state, aggregate)


def _server_step(
    tff: Any,
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    weights_type: Any,
) -> Any:
    """Returns the TFF finalizer: a `ServerStep`."""
    server = ServerStep(optimizer, variables)

    @tff.tensorflow.computation
    def initial_state() -> Any:
        return tuple(tf.constant(value) for value in server.start)

    state_type = initial_state.type_signature.result

    @tff.tensorflow.computation(state_type, weights_type, weights_type.trainable)
    def apply(state: Any, weights: Any, update: Any) -> Any:
        slots, new, norm = server.apply(state, weights.trainable, update)
        return slots, tff.learning.models.ModelWeights(new, ()), norm

    @tff.federated_computation
    def initialize() -> Any:
        return tff.federated_eval(initial_state, tff.SERVER)

    @tff.federated_computation(
        *(
            tff.FederatedType(one, tff.SERVER)
            for one in (state_type, weights_type, weights_type.trainable)
        )
    )
    def step(state: Any, weights: Any, update: Any) -> Any:
        slots, new, norm = tff.federated_map(apply, (state, weights, update))
        return tff.templates.MeasuredProcessOutput(slots, new, norm)

    return tff.learning.templates.FinalizerProcess(initialize, step)
