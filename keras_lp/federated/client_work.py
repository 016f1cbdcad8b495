"""What clients do in a round, as TensorFlow functions without state.

The client's work is Keras's own: the model's forward pass, its compiled loss, metrics and
optimizer, traced without state into one loop over batches.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_lp import features
from keras_lp.federated.files import read_tensor, write_tensor
from keras_lp.federated.optimizers import stateless_optimizer

Tensors = tuple[tf.Tensor, ...]
_EVALUATION_BATCH = 256


@dataclasses.dataclass(frozen=True)
class LocalTraining:
    """How each client trains in a round.

    Attributes:
        epochs: passes over the client's data.
        batch_size: examples a step; None takes all of a client's at once.
        proximal_strength: the factor mu of FedProx's term mu / 2 * |w - w_start|^2.
    """

    epochs: int = 1
    batch_size: int | None = 20
    proximal_strength: float = 0.0


class StatelessModel:
    """A compiled model whose variables are arguments.

    Args:
        model: a compiled model whose metrics are built.
        folder: where `write_frozen` puts the weights that do not train.
        on_features: whether the inputs are features of the frozen backbone.
    """

    def __init__(self, model: keras.Model, folder: Path, on_features: bool) -> None:
        self.model = model
        self._random = [v for v in model.non_trainable_variables if _is_random(v)]
        below = features.feature_model(model).variables if on_features else []
        unused = {id(variable) for variable in (*below, *self._random)}
        self._frozen = [v for v in model.non_trainable_variables if id(v) not in unused]
        self._folder = folder
        self.metrics_start = [tf.zeros(v.shape, v.dtype).numpy() for v in model.metrics_variables]

    def write_frozen(self) -> None:
        """Writes the weights that do not train to files, where clients read them.

        So they stay out of the messages of every round.
        """
        for i, variable in enumerate(self._frozen):
            write_tensor(self._folder / f"{i}.frozen", variable)

    def read_frozen(self) -> Tensors:
        """Returns, in a graph, what `write_frozen` wrote."""
        return tuple(
            read_tensor(
                str(self._folder / f"{i}.frozen"), tf.TensorSpec(variable.shape, variable.dtype)
            )
            for i, variable in enumerate(self._frozen)
        )

    def random_start(self, seed: tf.Tensor) -> Tensors:
        """Returns the states of the seed generators (Dropout, augmentation) for a client."""
        return tuple(
            tf.cast(seed, v.dtype) + tf.cast([0, i], v.dtype) for i, v in enumerate(self._random)
        )

    def forward(
        self, weights: Tensors, frozen: Tensors, random: Tensors, metrics: Tensors,
        data: Tensors, training: bool,
    ) -> tuple[tf.Tensor, Tensors, Tensors]:  # fmt: skip
        """Keras's step without the gradients: returns the loss, the states, the metrics."""
        model = self.model
        x, y, sample_weight = (*data, None)[:3]
        mapping = [
            *zip(model.trainable_variables, weights, strict=True),
            *zip(self._frozen, frozen, strict=True),
            *zip(self._random, random, strict=True),
            *zip(model.metrics_variables, metrics, strict=True),
        ]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            before = [scope.get_current_value(v) for v in self._frozen]
            y_pred = model(x, training=training)
            loss = model.compute_loss(x, y, y_pred, sample_weight, training=training)
            model._loss_tracker.update_state(loss, sample_weight=_count(data))
            model.compute_metrics(x, y, y_pred, sample_weight)
            self._check_still(before, scope)
        states = tuple(scope.get_current_value(v) for v in self._random)
        return loss, states, tuple(scope.get_current_value(v) for v in model.metrics_variables)

    def results(self, metrics: Sequence[Any]) -> dict[str, Any]:
        """Returns the model's logs for given values of its metrics' variables."""
        values = zip(self.model.metrics_variables, map(tf.convert_to_tensor, metrics), strict=True)
        with keras.StatelessScope(state_mapping=list(values)):
            return dict(self.model.get_metrics_result())

    def _check_still(self, before: Sequence[Any], scope: Any) -> None:
        """Refuses state that changes in training but is neither averaged nor a seed."""
        changed = [
            variable.path
            for variable, value in zip(self._frozen, before, strict=True)
            if scope.get_current_value(variable) is not value
        ]
        if changed:
            raise ValueError(
                "Clients can train weights only: other state that changes in training would be "
                f"lost with each client. Received: a model that changes {changed[:5]}. Freeze or "
                "replace the layers that hold it (stateful recurrence, SpectralNormalization, "
                "...)."
            )


def train_block(
    stateless: StatelessModel,
    local: LocalTraining,
    groups: Sequence[int],
    count: int,
    read_rows: Callable[[tf.Tensor], Any],
) -> Callable[[Tensors, Any], Any]:
    """Returns what trains the clients of a block: `(weights, block) -> result`.

    The result has `update`, the sum over the block's clients of their updates (weights sent minus
    weights trained) times their share; `shares`, the sum of the shares; `metrics`, the sum of the
    metrics' variables; and `dropped`, `(count,)`, 1 for each client whose update was not finite:
    its update, share and metrics are left out.

    Args:
        stateless: the model.
        local: how a client trains.
        groups: the group of shares of each weight.
        count: how many clients there are in the round.
        read_rows: what `blocks.rows_reader` returned.
    """
    train = _client_training(stateless, local)

    def train_all(start: Tensors, block: Any) -> Any:
        frozen, rows_of_all = stateless.read_frozen(), read_rows(block["number"])
        ends = tf.cumsum(block["examples"])

        def train_next(i: tf.Tensor, sums: Any) -> Any:
            data = tf.nest.map_structure(
                lambda rows: rows[ends[i] - block["examples"][i] : ends[i]], rows_of_all
            )
            weights, metrics = train(start, frozen, data, block["seeds"][i], block["learning_rate"])
            updates = [before - after for before, after in zip(start, weights, strict=True)]
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(u)) for u in updates])
            share = tf.where(finite, block["shares"][i], 0.0)
            result = collections.OrderedDict(
                update=tuple(
                    tf.cast(share[group], u.dtype) * _where(finite, u)
                    for group, u in zip(groups, updates, strict=True)
                ),
                shares=share,
                metrics=tuple(_where(finite, value) for value in metrics),
                dropped=tf.one_hot(block["positions"][i], count, dtype=tf.int32)
                * tf.cast(~finite, tf.int32),
            )
            return i + 1, tf.nest.map_structure(tf.add, sums, result)

        nothing = collections.OrderedDict(
            update=tuple(tf.zeros_like(value) for value in start),
            shares=tf.zeros_like(block["shares"][0]),
            metrics=tuple(tf.constant(value) for value in stateless.metrics_start),
            dropped=tf.zeros([count], tf.int32),
        )
        clients = tf.shape(ends)[0]
        return tf.while_loop(lambda i, _: i < clients, train_next, (tf.constant(0), nothing))[1]

    return _without_captures(train_all)


def evaluate_block(
    stateless: StatelessModel, count: int, read_rows: Callable[[tf.Tensor], Any]
) -> Callable[[Tensors, Any], Any]:
    """Returns what evaluates the clients of a block: `(weights, block) -> result`.

    The result has `metrics`, the sum of the metrics' variables, and `clients`,
    `(count, results)`, the scalar results of each client of the block, in the order of their
    names, and 0 elsewhere.
    """

    def evaluate(weights: Tensors, frozen: Tensors, data: Any, seed: tf.Tensor) -> Any:
        random = stateless.random_start(seed)
        examples = _count(data)

        def step(first: tf.Tensor, metrics: Tensors) -> Any:
            last = tf.minimum(first + _EVALUATION_BATCH, examples)
            batch = tf.nest.map_structure(lambda rows: rows[first:last], data)
            *_, metrics = stateless.forward(weights, frozen, random, metrics, batch, False)
            return last, metrics

        start = tuple(tf.constant(value) for value in stateless.metrics_start)
        return tf.while_loop(lambda i, _: i < examples, step, (tf.constant(0), start))[1]

    def evaluate_all(weights: Tensors, block: Any) -> Any:
        frozen, rows_of_all = stateless.read_frozen(), read_rows(block["number"])
        ends = tf.cumsum(block["examples"])
        start = tuple(tf.constant(value) for value in stateless.metrics_start)
        names = len(scalars(stateless.results(start)))

        def evaluate_next(i: tf.Tensor, metrics: Tensors, clients: tf.Tensor) -> Any:
            data = tf.nest.map_structure(
                lambda rows: rows[ends[i] - block["examples"][i] : ends[i]], rows_of_all
            )
            own = evaluate(weights, frozen, data, block["seeds"][i])
            row = [tf.cast(v, tf.float32) for v in scalars(stateless.results(own)).values()]
            place = tf.one_hot(block["positions"][i], count)[:, None]
            metrics = tuple(a + b for a, b in zip(metrics, own, strict=True))
            return i + 1, metrics, tf.where(place > 0, tf.stack(row)[None], clients)

        state = (tf.constant(0), start, tf.zeros([count, names]))
        clients = tf.shape(ends)[0]
        _, metrics, table = tf.while_loop(lambda i, *_: i < clients, evaluate_next, state)
        return collections.OrderedDict(metrics=metrics, clients=table)

    return _without_captures(evaluate_all)


def scalars(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the results that are single numbers, sorted by name."""
    return {name: results[name] for name in sorted(results) if not tuple(results[name].shape)}


def _client_training(stateless: StatelessModel, local: LocalTraining) -> Callable[..., Any]:
    """Returns what trains one client: `(weights, frozen, data, seed, rate) -> (weights, metrics)`.

    The optimizer starts again, at the round's learning rate. Examples are shuffled and Dropout
    draws by the client's seed.
    """
    model = stateless.model
    optimizer = stateless_optimizer(model.optimizer, model.trainable_variables)
    optimizer_start = [variable.numpy() for variable in optimizer.variables]
    is_rate = [variable is optimizer._learning_rate for variable in optimizer.variables]

    def train(start: Tensors, frozen: Tensors, data: Any, seed: tf.Tensor, rate: tf.Tensor) -> Any:
        examples = _count(data)
        batch = examples if local.batch_size is None else tf.constant(local.batch_size)
        steps = -(-examples // batch)
        keys = tf.random.stateless_uniform([local.epochs, examples], seed)
        order = tf.argsort(keys, axis=-1)

        def step(i: tf.Tensor, weights: Tensors, slots: Tensors, *rest: Tensors) -> Any:
            random, metrics = rest
            xs = data
            if local.batch_size is not None:
                first = (i % steps) * batch
                chosen = order[i // steps, first : first + batch]
                xs = tf.nest.map_structure(lambda rows: tf.gather(rows, chosen), data)
            with tf.GradientTape() as tape:
                tape.watch(weights)
                loss, random, metrics = stateless.forward(
                    weights, frozen, random, metrics, xs, True
                )
            gradients = tape.gradient(
                loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            gradients = [tf.convert_to_tensor(g) for g in gradients]  # sparse ones (embeddings)
            if local.proximal_strength:
                gradients = [
                    g + tf.cast(local.proximal_strength, g.dtype) * (w - s)
                    for g, w, s in zip(gradients, weights, start, strict=True)
                ]
            weights, slots = optimizer.stateless_apply(list(slots), gradients, list(weights))
            return i + 1, tuple(weights), tuple(slots), random, metrics

        slots = tuple(
            tf.cast(rate, value.dtype) if own else tf.constant(value)
            for value, own in zip(optimizer_start, is_rate, strict=True)
        )
        metrics = tuple(tf.constant(value) for value in stateless.metrics_start)
        state = (tf.constant(0), start, slots, stateless.random_start(seed), metrics)
        total = steps * local.epochs
        _, weights, _, _, metrics = tf.while_loop(lambda i, *_: i < total, step, state)
        return weights, metrics

    return train


def _without_captures(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function to call in TFF's graphs.

    Layers may hold eager tensors (Normalization does); in TFF's graph they are constants.
    """
    traced = tf.function(function, autograph=False)

    def call(*arguments: Any) -> Any:
        specs = tf.nest.map_structure(lambda a: tf.TensorSpec(a.shape, a.dtype), arguments)
        concrete = traced.get_concrete_function(*specs)
        captured = [tf.constant(tensor.numpy()) for tensor in concrete.captured_inputs]
        return concrete._call_flat(tf.nest.flatten(arguments), captured)

    return call


def _where(finite: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    return tf.where(finite, value, tf.zeros_like(value))


def _count(data: Any) -> tf.Tensor:
    return tf.shape(tf.nest.flatten(data)[0])[0]


def _is_random(variable: keras.Variable) -> bool:
    """Whether it is the state of a seed generator (Dropout, augmentation)."""
    return variable.name == "seed_generator_state"
