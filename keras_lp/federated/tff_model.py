"""A compiled Keras model as a TFF learning process.

The client's work is Keras's own: the model's forward pass, its compiled loss, metrics and
optimizer, traced without state into one loop over batches. The process around it (broadcast,
client work, weighted mean, server optimizer) is composed from TFF's templates.

A client's data are one element of its data set, so a round costs the worker no input pipeline
(TFF's default loop costs several times more).
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.optimizers.base_optimizer import BaseOptimizer

Tensors = tuple[tf.Tensor, ...]


def build_process(
    tff: Any,
    model: keras.Model,
    element_spec: Any,
    *,
    frozen_dir: Path,
    local_epochs: int,
    batch_size: int | None,
    server_optimizer: keras.optimizers.Optimizer,
) -> Any:
    """Returns a `tff.learning.templates.LearningProcess` of federated averaging.

    Its model weights are the trainable variables. Its measurements are the metrics' variables
    summed over the clients.

    Args:
        tff: the module.
        model: a compiled model whose metrics are built.
        element_spec: `tf.TensorSpec`s of one client, from `element_spec`.
        frozen_dir: where `write_frozen` has put the other weights.
        local_epochs: passes over a client's data in a round.
        batch_size: examples a local step; None takes all of a client's at once.
        server_optimizer: applied to the mean update.
    """
    learning = tff.learning
    local_training = _local_training(model, frozen_dir, local_epochs, batch_size)
    trainable = tuple(variable.numpy() for variable in model.trainable_variables)

    @tff.tensorflow.computation
    def initial_weights() -> Any:
        return learning.models.ModelWeights(tuple(tf.constant(value) for value in trainable), ())

    weights_type = initial_weights.type_signature.result
    data_type = tff.SequenceType(
        tf.nest.map_structure(
            lambda spec: tff.TensorType(spec.dtype.as_numpy_dtype, spec.shape), element_spec
        )
    )

    @tff.tensorflow.computation(weights_type, data_type)
    def client_update(weights: Any, data: tf.data.Dataset) -> Any:
        start = tuple(weights.trainable)
        client = data.get_single_element()
        trained, metrics = local_training(start, client)
        update = tuple(before - after for before, after in zip(start, trained, strict=True))
        examples = tf.cast(_count(client["x"]), tf.float32)
        return learning.templates.ClientResult(update, examples), metrics

    @tff.federated_computation
    def no_state() -> Any:
        return tff.federated_value((), tff.SERVER)

    @tff.federated_computation(
        no_state.type_signature.result,
        tff.FederatedType(weights_type, tff.CLIENTS),
        tff.FederatedType(data_type, tff.CLIENTS),
    )
    def client_work(state: Any, weights: Any, data: Any) -> Any:
        result, metrics = tff.federated_map(client_update, (weights, data))
        return tff.templates.MeasuredProcessOutput(state, result, tff.federated_sum(metrics))

    update_type = weights_type.trainable
    return learning.templates.compose_learning_process(
        initial_weights,
        learning.templates.build_broadcast_process(weights_type),
        learning.templates.ClientWorkProcess(no_state, client_work),
        tff.aggregators.MeanFactory().create(update_type, tff.TensorType(np.float32)),
        _server_step(tff, server_optimizer, model.trainable_variables, weights_type),
    )


def write_frozen(model: keras.Model, directory: Path) -> None:
    """Writes the weights that do not train to files, where clients read them.

    So they stay out of the messages of every round.
    """
    for i, variable in enumerate(_frozen(model)):
        tensor = tf.io.serialize_tensor(tf.convert_to_tensor(variable))
        tf.io.write_file(str(directory / f"{i}.tensor"), tensor)


def metric_results(model: keras.Model, metrics: Sequence[Any]) -> dict[str, Any]:
    """Returns the model's logs for given values of its metrics' variables."""
    mapping = list(zip(model.metrics_variables, map(tf.convert_to_tensor, metrics), strict=True))
    with keras.StatelessScope(state_mapping=mapping):
        results = {name: np.asarray(value) for name, value in model.get_metrics_result().items()}
    return {name: float(value) if value.ndim == 0 else value for name, value in results.items()}


def _local_training(
    model: keras.Model, frozen_dir: Path, local_epochs: int, batch_size: int | None
) -> Any:
    """Returns `(weights, client) -> (weights, metrics)`: a client's work in one round.

    The optimizer starts afresh, at the round's learning rate. Examples are shuffled and Dropout
    draws by the client's seed.
    """
    optimizer = stateless_optimizer(model.optimizer, model.trainable_variables)
    optimizer_start = [variable.numpy() for variable in optimizer.variables]
    rate = [variable is optimizer._learning_rate for variable in optimizer.variables]
    metrics_start = [tf.zeros(v.shape, v.dtype).numpy() for v in model.metrics_variables]
    frozen, random = _frozen(model), _random_states(model)

    @tf.function
    def train(weights: Tensors, client: Any) -> tuple[Tensors, Any]:
        x, y, seed = client["x"], client["y"], client["seed"]
        examples = _count(x)
        batch = examples if batch_size is None else tf.constant(batch_size)
        steps = -(-examples // batch)
        fixed = _read_frozen(frozen, frozen_dir)

        def step(
            i: tf.Tensor, weights: Tensors, slots: Tensors, states: Tensors, metrics: Tensors
        ) -> Any:
            order = _shuffled(examples, seed, i // steps)
            chosen = order[(i % steps) * batch : (i % steps + 1) * batch]
            xs, ys = tf.nest.map_structure(lambda data: tf.gather(data, chosen), (x, y))
            with tf.GradientTape() as tape:
                tape.watch(weights)
                mapping = [
                    *zip(model.trainable_variables, weights, strict=True),
                    *zip(frozen, fixed, strict=True),
                    *zip(random, states, strict=True),
                    *zip(model.metrics_variables, metrics, strict=True),
                ]
                with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
                    before = [scope.get_current_value(v) for v in frozen]
                    loss = _forward(model, xs, ys)
                    _check_still(frozen, before, scope)
            gradients = [
                tf.convert_to_tensor(gradient)  # sparse ones (embeddings) too
                for gradient in tape.gradient(
                    loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO
                )
            ]
            states = tuple(scope.get_current_value(v) for v in random)
            metrics = tuple(scope.get_current_value(v) for v in model.metrics_variables)
            weights, slots = optimizer.stateless_apply(list(slots), gradients, list(weights))
            return i + 1, tuple(weights), tuple(slots), states, metrics

        state = (
            tf.constant(0),
            weights,
            tuple(
                tf.cast(client["learning_rate"], value.dtype) if is_rate else tf.constant(value)
                for value, is_rate in zip(optimizer_start, rate, strict=True)
            ),
            _seeded(random, seed),
            tuple(tf.constant(value) for value in metrics_start),
        )
        total = steps * local_epochs
        _, weights, _, _, metrics = tf.while_loop(lambda i, *_: i < total, step, state)
        return weights, metrics

    def call(*arguments: Any) -> Any:
        # Layers may hold eager tensors (Normalization does); in TFF's graph they are constants.
        specs = tf.nest.map_structure(lambda a: tf.TensorSpec(a.shape, a.dtype), arguments)
        concrete = train.get_concrete_function(*specs)
        captured = [tf.constant(tensor.numpy()) for tensor in concrete.captured_inputs]
        return concrete._call_flat(tf.nest.flatten(arguments), captured)

    return call


def _check_still(frozen: Sequence[keras.Variable], before: Sequence[Any], scope: Any) -> None:
    """Refuses state that changes in training but is neither averaged nor a seed."""
    changed = [
        variable.path
        for variable, value in zip(frozen, before, strict=True)
        if scope.get_current_value(variable) is not value
    ]
    if changed:
        raise ValueError(
            "Clients can train weights only: other state that changes in training would be lost "
            f"with each client. Received: a model that changes {changed[:5]}. Freeze or replace "
            "the layers that hold it (stateful recurrence, SpectralNormalization, ...)."
        )


def _forward(model: keras.Model, x: Any, y: Any) -> tf.Tensor:
    """Keras's training step without the gradients: output, loss, metrics."""
    y_pred = model(x, training=True)
    loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=None, training=True)
    model._loss_tracker.update_state(loss, sample_weight=_count(x))
    model.compute_metrics(x, y, y_pred, sample_weight=None)
    return loss


def stateless_optimizer(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> keras.optimizers.Optimizer:
    """Returns a fresh optimizer of the same settings whose `stateless_apply` works.

    Keras's TensorFlow optimizers overlay the stateless code of their base class with
    `tf.distribute`. The twin takes each overlaid method from that base class again, unless a
    class above (a layerwise optimizer) has its own.
    """
    cls = type(optimizer)
    overlay = next(base for base in cls.__mro__ if base.__name__ == "TFOptimizer")
    plain = {
        name: method
        for name, method in vars(BaseOptimizer).items()
        if name in vars(overlay) and getattr(cls, name) is vars(overlay)[name]
        if not name.startswith("__")
    }
    twin = type(cls.__name__, (cls,), plain).from_config(optimizer.get_config())
    if optimizer.weight_decay is not None:  # what is excluded from it is not in the config
        decays = optimizer._use_weight_decay
        twin.exclude_from_weight_decay(var_list=[v for v in variables if not decays(v)])
    twin.build(list(variables))
    return twin


def _server_step(
    tff: Any,
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    weights_type: Any,
) -> Any:
    """Returns TFF's finalizer: a Keras optimizer applies the mean update as its gradient.

    An update that is not finite leaves the weights as they were. (TFF's own finalizer does the
    same by AutoGraph, which does not work on every Python.)
    """
    twin = stateless_optimizer(optimizer, variables)
    start = [variable.numpy() for variable in twin.variables]

    @tff.tensorflow.computation
    def initial_state() -> Any:
        return tuple(tf.constant(value) for value in start)

    state_type = initial_state.type_signature.result

    @tff.tensorflow.computation(state_type, weights_type, weights_type.trainable)
    def apply(state: Any, weights: Any, update: Any) -> Any:
        old_slots, old, gradients = list(state), list(weights.trainable), list(update)
        new, slots = twin.stateless_apply(old_slots, gradients, old)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        slots = tuple(tf.where(finite, *pair) for pair in zip(slots, old_slots, strict=True))
        new = tuple(tf.where(finite, *pair) for pair in zip(new, old, strict=True))
        return slots, tff.learning.models.ModelWeights(new, ())

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
        result = tff.federated_map(apply, (state, weights, update))
        nothing = tff.federated_value((), tff.SERVER)
        return tff.templates.MeasuredProcessOutput(result[0], result[1], nothing)

    return tff.learning.templates.FinalizerProcess(initialize, step)


def _frozen(model: keras.Model) -> list[keras.Variable]:
    random = {id(variable) for variable in _random_states(model)}
    return [v for v in model.non_trainable_variables if id(v) not in random]


def _random_states(model: keras.Model) -> list[keras.Variable]:
    """The states of the seed generators (Dropout, augmentation)."""
    return [v for v in model.non_trainable_variables if v.name == "seed_generator_state"]


def _seeded(random: Sequence[keras.Variable], seed: tf.Tensor) -> Tensors:
    return tuple(tf.cast(seed, v.dtype) + tf.cast([0, i], v.dtype) for i, v in enumerate(random))


def _read_frozen(frozen: Sequence[keras.Variable], directory: Path) -> list[tf.Tensor]:
    values = []
    for i, variable in enumerate(frozen):
        content = tf.io.read_file(str(directory / f"{i}.tensor"))
        values.append(tf.ensure_shape(tf.io.parse_tensor(content, variable.dtype), variable.shape))
    return values


def _shuffled(examples: tf.Tensor, seed: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
    keys = tf.random.stateless_uniform([examples], seed + tf.stack([epoch, 0]))
    return tf.argsort(keys)


def _count(x: Any) -> tf.Tensor:
    return tf.shape(tf.nest.flatten(x)[0])[0]


def element_spec(x: Any, y: Any) -> Any:
    """Returns the specs of one client's element for its arrays.

    An OrderedDict of `x` and `y`, the client's `seed` and the round's `learning_rate`.
    """

    def spec(array: Any) -> tf.TensorSpec:
        return tf.TensorSpec((None, *array.shape[1:]), array.dtype)

    return collections.OrderedDict(
        x=tf.nest.map_structure(spec, x),
        y=tf.nest.map_structure(spec, y),
        seed=tf.TensorSpec((2,), tf.int32),
        learning_rate=tf.TensorSpec((), tf.float32),
    )
