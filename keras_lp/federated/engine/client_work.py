"""The work of clients in a round as stateless TensorFlow functions.

Clients use the forward pass, compiled loss, metrics and optimizer of the Keras model, traced
without state into one loop over batches.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_lp.backbones import features
from keras_lp.federated.engine.adapters import Adapters
from keras_lp.federated.engine.compression import Compression, unflatten
from keras_lp.federated.engine.done import ClientsDone
from keras_lp.federated.engine.files import read_tensor, write_tensor
from keras_lp.federated.engine.merging import Merging
from keras_lp.federated.engine.optimizers import stateless_optimizer
from keras_lp.federated.engine.personal import Personal, flat
from keras_lp.federated.engine.workers import on_worker
from keras_lp.model.absent import seen
from keras_lp.utils.keras_internals import loss_metrics, loss_tracker, rate_of, sublayers

Tensors = tuple[tf.Tensor, ...]
_EVALUATION_BATCH = 256
_BELOW = 1 - 1e-6  # of the clipping norm, so that float32 does not round beyond it


@dataclasses.dataclass(frozen=True)
class LocalTraining:
    """Settings of the local training in a round.

    Attributes:
        epochs: number of passes over the data of a client.
        batch_size: number of examples per step; None uses all examples of a client in one step.
        proximal_strength: the factor mu of the FedProx term mu / 2 * |w - w_start|^2.
    """

    epochs: int = 1
    batch_size: int | None = 20
    proximal_strength: float = 0.0


class StatelessModel:
    """A compiled model whose variables are passed as arguments.

    Args:
        model: a compiled model whose metrics are built.
        folder: the folder in which `write_frozen` stores the non-trainable weights.
        on_features: whether the inputs are features of the frozen backbone.
        merging: merges the metric states of several clients.
        personal: which variables stay on the clients.
    """

    def __init__(
        self,
        model: keras.Model,
        folder: Path,
        on_features: bool,
        merging: Merging,
        personal: Personal,
    ) -> None:
        self.model = model
        self.personal = personal
        self.adapters = Adapters(model, personal)
        self._random = [v for v in model.non_trainable_variables if _is_random(v)]
        below = features.feature_model(model).variables if on_features else []
        self._states = [*self._random, *personal.states]
        unused = {id(variable) for variable in (*below, *self._states)}
        self._frozen = [v for v in model.non_trainable_variables if id(v) not in unused]
        self._folder = folder
        self.merging = merging

    def write_frozen(self) -> None:
        """Writes the non-trainable weights to files that clients read.

        They are therefore not part of the messages of each round.
        """
        for i, variable in enumerate(self._frozen):
            write_tensor(self._folder / f"{i}.frozen", variable)

    def read_frozen(self) -> Tensors:
        """Reads the weights of `write_frozen` in a graph."""
        folder = on_worker(self._folder)
        return tuple(
            read_tensor(f"{folder}/{i}.frozen", tf.TensorSpec(variable.shape, variable.dtype))
            for i, variable in enumerate(self._frozen)
        )

    def start(self, shared: Tensors, own: tf.Tensor, seed: tf.Tensor) -> tuple[Tensors, Tensors]:
        """Returns the trainable weights of a client, and the states that its training changes.

        Args:
            shared: the weights that the server sent.
            own: the values of the personal variables, `(known,)`.
            seed: two integers for the seed generators (Dropout, augmentation).
        """
        parts = unflatten(own, self.personal.variables)
        trained = len(self.personal.trainable)
        random = [
            tf.cast(seed, v.dtype) + tf.cast([0, i], v.dtype) for i, v in enumerate(self._random)
        ]
        return self.personal.merge(shared, parts[:trained]), (*random, *parts[trained:])

    def end(self, weights: Tensors, states: Tensors) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Returns the shared weights and the personal values of a client, as `start` takes them."""
        shared, own = self.personal.split(weights)
        return shared, flat([*own, *states[len(self._random) :]])

    def forward(
        self, weights: Tensors, frozen: Tensors, states: Tensors, metrics: Tensors,
        data: Tensors, training: bool,
    ) -> tuple[tf.Tensor, Tensors, Tensors]:  # fmt: skip
        """Runs a Keras training step without gradients; returns loss, new states and metrics."""
        model: Any = self.model
        x, y, sample_weight = (*data, None)[:3]
        mapping = [
            *zip(model.trainable_variables, weights, strict=True),
            *zip(self._frozen, frozen, strict=True),
            *zip(self._states, states, strict=True),
            *zip(model.metrics_variables, metrics, strict=True),
        ]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            before = [scope.get_current_value(v) for v in self._frozen]
            y_pred = model(x, training=training)
            with _over_examples(model, _count(data)):
                loss = model.compute_loss(x, y, y_pred, sample_weight, training=training)
            loss_tracker(model).update_state(loss, sample_weight=_count(data))
            model.compute_metrics(x, y, y_pred, sample_weight)
            self._check_still(before, scope)
        states = tuple(scope.get_current_value(v) for v in self._states)
        return loss, states, tuple(scope.get_current_value(v) for v in model.metrics_variables)

    def results(self, metrics: Sequence[Any]) -> dict[str, Any]:
        """Returns the logs of the model for given values of the metric variables."""
        with self._scope(metrics):
            results = self.model.get_metrics_result()
            # A metric may return its variable, which has the value only in this scope.
            return {name: tf.convert_to_tensor(value) for name, value in results.items()}

    def seen(self, metrics: Sequence[Any]) -> dict[str, Any]:
        """Returns for each of `results` whether it is based on a label."""
        with self._scope(metrics):
            return seen(self.model, self.model.get_metrics_result())

    def _scope(self, metrics: Sequence[Any]) -> keras.StatelessScope:
        values = zip(self.model.metrics_variables, map(tf.convert_to_tensor, metrics), strict=True)
        return keras.StatelessScope(state_mapping=list(values))

    def _check_still(self, before: Sequence[Any], scope: Any) -> None:
        """Raises if other state than trainable weights and seeds changes in training."""
        changed = [
            variable.path
            for variable, value in zip(self._frozen, before, strict=True)
            if scope.get_current_value(variable) is not value
        ]
        if changed:
            raise ValueError(
                "Clients can train only trainable weights; other state that changes in training "
                f"would be lost. Received: a model that changes {changed[:5]}. Freeze or replace "
                "the layers that have this state (stateful RNN, SpectralNormalization, ...)."
            )


def train_block(
    stateless: StatelessModel,
    local: LocalTraining,
    groups: Sequence[int],
    count: int,
    read_rows: Callable[[tf.Tensor], Any],
    done: ClientsDone,
    compression: Compression | None = None,
    separate: bool = False,
    exact: bool = False,
) -> Callable[[Tensors, Any], Any]:
    """Returns a function that trains the clients of a block: `(weights, block) -> result`.

    The result has `update`, the sum of the updates (weights sent minus weights trained) times the
    shares of the clients; `shares`, the sum of the shares; `metrics`, the sum of `Merging.part`;
    and `dropped` `(count,)`, 1 for each client whose update or its norm is not finite (the norm
    overflows at 1.8e19). The update, shares and metrics of these clients are left out. `personal`
    `(count, size)` has the personal values of the clients, those of others are 0. `within` is
    the number of clients whose update was at most as long as the clipping norm of the block; longer
    ones are shortened to it.

    Args:
        stateless: the model.
        local: the settings of local training.
        groups: the index of the group of each weight.
        count: number of clients in the round.
        read_rows: the result of `blocks.rows_reader`.
        done: counts the clients that are done.
        compression: how updates are compressed. Defaults to None: they are sent as they are.
        separate: whether `update` has the update of each client, `(count, ...)`, and `shares` is 1
            for each client that has one, `(count,)`. Defaults to False.
        exact: whether the result also has `adapters`, the sums of `Adapters.part`. Defaults to
            False.
    """
    train, merging = _client_training(stateless, local), stateless.merging

    def train_all(start: Tensors, block: Any) -> Any:
        frozen, rows_of_all = stateless.read_frozen(), read_rows(block["number"])
        ends = tf.cumsum(block["examples"])

        def train_next(i: tf.Tensor, last: tf.Tensor, own: tf.TensorArray, sums: Any) -> Any:
            data = tf.nest.map_structure(
                lambda rows: rows[ends[i] - block["examples"][i] : ends[i]], rows_of_all
            )
            seed, before = block["seeds"][i], block["personal"][i]
            known = before[: stateless.personal.known]
            weights, values, metrics = train(
                start, known, frozen, data, seed, block["learning_rate"], block["ranks"][i]
            )
            updates = [sent - trained for sent, trained in zip(start, weights, strict=True)]
            if compression is not None and compression.error_feedback:
                kept = unflatten(before[stateless.personal.known :], updates)
                whole = [u + k for u, k in zip(updates, kept, strict=True)]
                updates = compression.restored(whole, seed)
                lost = [w - u for w, u in zip(whole, updates, strict=True)]
                values = tf.concat([values, flat(lost)], 0)
            elif compression is not None:
                updates = compression.restored(updates, seed)
            own_shares = [block["shares"][i][group] for group in groups]
            adapters = ()
            if exact:
                read = [sent - update for sent, update in zip(start, updates, strict=True)]
                adapters = stateless.adapters.part(read, own_shares)
            updates = [
                tf.cast(share, u.dtype) * u for share, u in zip(own_shares, updates, strict=True)
            ]
            norm = tf.linalg.global_norm([tf.cast(u, tf.float32) for u in updates])
            finite = tf.reduce_all(tf.math.is_finite(tf.concat([norm[None], values], 0)))
            own = own.write(i, tf.where(finite, values, before))
            limit = _BELOW * block["clip"]
            within = norm <= limit
            factor = tf.where(within, 1.0, limit / norm)
            updates = [tf.cast(factor, u.dtype) * u for u in updates]
            with tf.control_dependencies([norm]):
                last = done.write(block["number"], i + 1, last)
            place = tf.one_hot(block["positions"][i], count, on_value=True, off_value=False)
            counted = tuple(tf.where(finite, u, tf.zeros_like(u)) for u in updates)
            shares = tf.where(finite, block["shares"][i], 0.0)
            if separate:
                row = tf.cast(place & finite, tf.float32)
                counted = tuple(_in_row(row, u) for u in counted)
                shares = row
            result = collections.OrderedDict(
                update=counted,
                shares=shares,
                metrics=merging.part(metrics, place & finite),
                dropped=tf.cast(place & ~finite, tf.int32),
                within=tf.cast(within & (block["shares"][i][0] > 0), tf.int32),
                adapters=tf.nest.map_structure(
                    lambda one: tf.where(finite, one, tf.zeros_like(one)), adapters
                ),
            )
            return i + 1, last, own, tf.nest.map_structure(tf.add, sums, result)

        rows = [count] if separate else []
        nothing = collections.OrderedDict(
            update=tuple(tf.zeros([*rows, *value.shape], value.dtype) for value in start),
            shares=tf.zeros(rows or block["shares"].shape[1:]),
            metrics=merging.nothing(count),
            dropped=tf.zeros([count], tf.int32),
            within=tf.constant(0),
            adapters=tf.nest.map_structure(
                tf.zeros_like,
                stateless.adapters.part(start, [tf.constant(0.0)] * len(start)) if exact else (),
            ),
        )
        clients, size = tf.shape(ends)[0], block["personal"].shape[1]
        own = tf.TensorArray(tf.float32, clients, element_shape=[size])
        start_of_loop = (tf.constant(0), tf.timestamp(), own, nothing)
        *_, own, sums = tf.while_loop(lambda i, *_: i < clients, train_next, start_of_loop)
        first = block["positions"][0]  # they are consecutive
        sums["personal"] = tf.pad(own.stack(), [[first, count - first - clients], [0, 0]])
        sums["personal"].set_shape([count, size])
        return sums

    return _without_captures(train_all, stateless.model)


def evaluate_block(
    stateless: StatelessModel,
    count: int,
    read_rows: Callable[[tf.Tensor], Any],
    done: ClientsDone,
) -> Callable[[Tensors, Any], Any]:
    """Returns a function that evaluates the clients of a block: `(weights, block) -> result`.

    The result has `metrics`, the sum of `Merging.part`; `clients` `(count, results)`, the scalar
    results of each client of the block, sorted by name, and 0 for other clients; and `seen`, an
    array of the same shape with 1 for each result that is based on a label.
    """
    merging = stateless.merging

    def evaluate(weights: Tensors, states: Tensors, frozen: Tensors, data: Any) -> Any:
        examples = _count(data)

        def step(first: tf.Tensor, metrics: Tensors) -> Any:
            last = tf.minimum(first + _EVALUATION_BATCH, examples)
            batch = tf.nest.map_structure(lambda rows: rows[first:last], data)
            *_, metrics = stateless.forward(weights, frozen, states, metrics, batch, False)
            return last, metrics

        return tf.while_loop(lambda i, _: i < examples, step, (tf.constant(0), merging.start()))[1]

    def evaluate_all(weights: Tensors, block: Any) -> Any:
        frozen, rows_of_all = stateless.read_frozen(), read_rows(block["number"])
        ends = tf.cumsum(block["examples"])
        names = list(scalars(stateless.results(merging.start())))

        def evaluate_next(i: tf.Tensor, last: tf.Tensor, sums: Any) -> Any:
            data = tf.nest.map_structure(
                lambda rows: rows[ends[i] - block["examples"][i] : ends[i]], rows_of_all
            )
            start = stateless.start(weights, block["personal"][i], block["seeds"][i])
            own = evaluate(*start, frozen, data)
            results, labels = stateless.results(own), stateless.seen(own)
            place = tf.one_hot(block["positions"][i], count, on_value=True, off_value=False)
            weighed = _any_weight(data)
            rows = (
                tf.stack([tf.cast(results[name], tf.float32) for name in names]),
                tf.stack([tf.cast(labels[name] & weighed, tf.float32) for name in names]),
            )
            with tf.control_dependencies(rows):
                last = done.write(block["number"], i + 1, last)
            clients, seen = (tf.where(place[:, None], row, 0.0) for row in rows)
            result = collections.OrderedDict(
                metrics=merging.part(own, place), clients=clients, seen=seen
            )
            return i + 1, last, tf.nest.map_structure(tf.add, sums, result)

        table = tf.zeros([count, len(names)])
        nothing = collections.OrderedDict(metrics=merging.nothing(count), clients=table, seen=table)
        clients = tf.shape(ends)[0]
        start_of_loop = (tf.constant(0), tf.timestamp(), nothing)
        return tf.while_loop(lambda i, *_: i < clients, evaluate_next, start_of_loop)[-1]

    return _without_captures(evaluate_all, stateless.model)


def _in_row(row: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """Returns zeros `(rows, ...)` with a value in the row that is 1."""
    places = tf.cast(tf.reshape(row, [-1, *[1] * len(value.shape)]), value.dtype)
    return places * value[None]


def scalars(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the scalar results, sorted by name."""
    return {name: results[name] for name in sorted(results) if not tuple(results[name].shape)}


def _client_training(stateless: StatelessModel, local: LocalTraining) -> Callable[..., Any]:
    """Returns a function that trains a client.

    Its form is `(shared, own, frozen, data, seed, rate, rank) -> (shared, own, metrics)`, with
    shared weights and personal values as in `StatelessModel.start`. The optimizer restarts with the
    learning rate of the round. The seed determines shuffling and Dropout. Adapters train up to the
    rank.
    """
    model = stateless.model
    optimizer = stateless_optimizer(model.optimizer, model.trainable_variables)
    optimizer_start = [variable.numpy() for variable in optimizer.variables]
    is_rate = [variable is rate_of(optimizer) for variable in optimizer.variables]

    def train(
        shared: Tensors, own: tf.Tensor, frozen: Tensors, data: Any, seed: tf.Tensor, rate: Any,
        rank: tf.Tensor,
    ) -> Any:  # fmt: skip
        start, states = stateless.start(shared, own, seed)
        examples = _count(data)
        batch = examples if local.batch_size is None else tf.constant(local.batch_size)
        steps = -(-examples // batch)
        keys = tf.random.stateless_uniform([local.epochs, examples], seed)
        order = tf.argsort(keys, axis=-1)

        def step(i: tf.Tensor, weights: Tensors, slots: Tensors, *rest: Tensors) -> Any:
            states, metrics = rest
            xs = data
            if local.batch_size is not None:
                first = (i % steps) * batch
                chosen = order[i // steps, first : first + batch]
                xs = tf.nest.map_structure(lambda rows: tf.gather(rows, chosen), data)
            with tf.GradientTape() as tape:
                tape.watch(weights)
                loss, states, metrics = stateless.forward(
                    weights, frozen, states, metrics, xs, True
                )
            gradients = tape.gradient(
                loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            gradients = [tf.convert_to_tensor(g) for g in gradients]  # may be sparse (embeddings)
            if local.proximal_strength:
                gradients = [
                    g if own else g + tf.cast(local.proximal_strength, g.dtype) * (w - s)
                    for g, w, s, own in zip(
                        gradients, weights, start, stateless.personal.is_own, strict=True
                    )
                ]
            trained, slots = optimizer.stateless_apply(list(slots), gradients, list(weights))
            variables = model.trainable_variables
            kept = stateless.adapters.within_rank(variables, start, trained, rank)
            return i + 1, tuple(kept), tuple(slots), states, metrics

        slots = tuple(
            tf.cast(rate, value.dtype) if own else tf.constant(value)
            for value, own in zip(optimizer_start, is_rate, strict=True)
        )
        metrics = stateless.merging.start()
        state = (tf.constant(0), start, slots, states, metrics)
        total = steps * local.epochs
        _, weights, _, states, metrics = tf.while_loop(lambda i, *_: i < total, step, state)
        return *stateless.end(weights, states), metrics

    return train


def _without_captures(function: Callable[..., Any], model: keras.Model) -> Callable[..., Any]:
    """Returns a function that can be called in TFF graphs.

    Eager tensors of layers (such as Normalization) become constants. Lookup tables and variables
    that are not weights of the model cannot become constants, so they raise an error.
    """
    traced = tf.function(function, autograph=False)

    def call(*arguments: Any) -> Any:
        specs = tf.nest.map_structure(lambda a: tf.TensorSpec(a.shape, a.dtype), arguments)
        concrete = traced.get_concrete_function(*specs)
        if any(tensor.dtype == tf.resource for tensor in concrete.captured_inputs):
            raise ValueError(_state_outside(model))
        captured = [tf.constant(tensor.numpy()) for tensor in concrete.captured_inputs]
        return concrete._call_flat(tf.nest.flatten(arguments), captured)

    return call


def _state_outside(model: keras.Model) -> str:
    lookups = (
        keras.layers.TextVectorization,
        keras.layers.StringLookup,
        keras.layers.IntegerLookup,
    )
    found = [layer.name for layer in sublayers(model) if isinstance(layer, lookups)]
    rule = "Models on clients must have no lookup table and no variable that is not a weight. "
    if found:
        return (
            f"{rule}Received: model {model.name!r} with the layers {found[:5]}, which use a "
            "table. Apply them to the data first, `x = layer(x)`, and train a model without them; "
            "or use keras.layers.Hashing."
        )
    return (
        f"{rule}Received: model {model.name!r}, whose loss, metrics or layers use one. Replace it "
        "by a number or by a weight of a layer (`add_weight`)."
    )


@contextlib.contextmanager
def _over_examples(model: keras.Model, count: tf.Tensor) -> Iterator[None]:
    """Makes the Keras losses per output means over examples instead of means over batches."""
    means = loss_metrics(model)
    before = [(mean.total + 0.0, mean.count + 0.0) for mean in means]
    for mean in means:
        mean.reset_state()
    yield
    for mean, (total, weight) in zip(means, before, strict=True):
        own = tf.cast(count, total.dtype)
        mean.total.assign(total + mean.result() * own)
        mean.count.assign(weight + own)


def _any_weight(data: Any) -> tf.Tensor:
    """Whether any example has a weight above 0."""
    weights = tf.nest.flatten(data[2:])
    return tf.reduce_any([tf.reduce_any(weight > 0) for weight in weights] or [True])


def _count(data: Any) -> tf.Tensor:
    return tf.shape(tf.nest.flatten(data)[0])[0]


def _is_random(variable: keras.Variable) -> bool:
    """Whether a variable is the state of a seed generator (Dropout, augmentation)."""
    return variable.name == "seed_generator_state"
