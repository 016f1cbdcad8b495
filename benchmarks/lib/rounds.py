"""Rounds of federated averaging by the package, by bare loops, and by TFF as in its tutorial."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_lp as lp
from keras_lp.federated import tff_runtime
from lib.networks import classifier
from lib.problems import Arrays
from lib.timing import seconds

BATCH, STEPS, RATE = 20, 9, 0.1
Clients = dict[str, Arrays]
Run = Callable[[int], list[float]]  # rounds to the seconds of each


def make_clients(data: Arrays, count: int) -> Clients:
    """Returns clients of 9 batches each, drawn with replacement."""
    x, y = data
    rng = np.random.default_rng(0)
    draw = rng.integers(len(x), size=(count, BATCH * STEPS))
    return {f"c{i:04}": (x[rows], y[rows]) for i, rows in enumerate(draw)}


def mlp(inputs: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    return classifier((inputs,), layers, keras.optimizers.SGD(RATE), metrics=None)


class Sampler:
    """Samples the clients of each round; without a number, all of them."""

    def __init__(self, clients: Clients, sampled: int | None) -> None:
        self.names, self.sampled = list(clients), sampled
        self.rng = np.random.default_rng(0)

    def __call__(self) -> list[str]:
        if self.sampled is None:
            return self.names
        return list(self.rng.choice(self.names, self.sampled, replace=False))


def timed(one: Callable[[], None]) -> Run:
    return lambda rounds: [seconds(one).clock for _ in range(rounds)]


def keras_lp_rounds(clients: Clients, sampled: int | None, inputs: int) -> Run:
    federated = lp.FederatedAveraging(mlp(inputs), clients_per_round=sampled)

    def run(rounds: int) -> list[float]:
        return federated.fit(clients, rounds, verbose=0).history["seconds"]

    return run


def local_sgd(model: keras.Model, start: Any, x: tf.Tensor, y: tf.Tensor) -> Any:
    """Takes nine steps of SGD over a client's tensors; returns what they changed."""

    def step(i: tf.Tensor, weights: Any) -> Any:
        rows = slice(i * BATCH, (i + 1) * BATCH)
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits = model.stateless_call(list(weights), [], x[rows], training=True)[0]
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y[rows], logits=logits)
            )
        gradients = tape.gradient(loss, weights)
        return i + 1, tuple(w - RATE * g for w, g in zip(weights, gradients, strict=True))

    _, trained = tf.while_loop(lambda i, _: i < STEPS, step, (tf.constant(0), start))
    return tuple(new - old for new, old in zip(trained, start, strict=True))


def bare_rounds(clients: Clients, sampled: int | None, inputs: int) -> Run:
    model = mlp(inputs)
    tensors = {name: (tf.constant(x), tf.constant(y)) for name, (x, y) in clients.items()}
    state = {"weights": tuple(tf.constant(v.numpy()) for v in model.trainable_variables)}
    sample = Sampler(clients, sampled)
    client = tf.function(lambda weights, x, y: local_sgd(model, weights, x, y))

    def one() -> None:
        names = sample()
        updates = [client(state["weights"], *tensors[name]) for name in names]
        mean = [tf.add_n(parts) / len(names) for parts in zip(*updates, strict=True)]
        state["weights"] = tuple(w + u for w, u in zip(state["weights"], mean, strict=True))

    return timed(one)


def limit_rounds(clients: Clients, sampled: int | None, inputs: int) -> Run:
    model = mlp(inputs)
    xs, ys = (tf.constant(np.stack(part)) for part in zip(*clients.values(), strict=True))
    state = {"weights": tuple(tf.constant(v.numpy()) for v in model.trainable_variables)}
    positions, sample = {name: i for i, name in enumerate(clients)}, Sampler(clients, sampled)

    @tf.function
    def round_of(start: Any, rows: tf.Tensor) -> Any:
        def add(i: tf.Tensor, sums: Any) -> Any:
            update = local_sgd(model, start, xs[rows[i]], ys[rows[i]])
            return i + 1, tuple(a + b for a, b in zip(sums, update, strict=True))

        count = tf.shape(rows)[0]
        zeros = tuple(tf.zeros_like(w) for w in start)
        _, sums = tf.while_loop(lambda i, _: i < count, add, (tf.constant(0), zeros))
        return tuple(w + s / tf.cast(count, s.dtype) for w, s in zip(start, sums, strict=True))

    def one() -> None:
        rows = tf.constant([positions[name] for name in sample()])
        state["weights"] = round_of(state["weights"], rows)
        state["weights"][0].numpy()

    return timed(one)


def tff_rounds(clients: Clients, sampled: int | None, inputs: int) -> Run:
    process, data = tutorial(mlp(inputs), clients)
    state, sample = {"now": process.initialize()}, Sampler(clients, sampled)

    def one() -> None:
        state["now"] = process.next(state["now"], [data[name] for name in sample()]).state

    return timed(one)


def tutorial(
    model: keras.Model, clients: Clients, batch: int = BATCH, rate: float = RATE
) -> tuple[Any, dict]:
    """Returns TFF's process and data sets as its tutorial makes them."""
    tff = tff_runtime.load_tff()
    x, y = next(iter(clients.values()))
    spec = (
        tf.TensorSpec((None, *x.shape[1:]), x.dtype),
        tf.TensorSpec((None,), y.dtype),
    )

    @tf.function
    def predict(weights: Any, inputs: Any, training: bool = True) -> Any:
        return model.stateless_call(list(weights[0]), list(weights[1]), inputs, training=training)[
            0
        ]

    @tf.function
    def loss(output: Any, label: Any, sample_weight: Any = None) -> Any:
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=label, logits=output)
        return tf.reduce_mean(each)

    @tf.function
    def start() -> Any:
        return collections.OrderedDict(loss=tf.constant(0.0))

    @tf.function
    def update(state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
        return collections.OrderedDict(loss=state["loss"] + batch_output.loss)

    functional = tff.learning.models.FunctionalModel(
        initial_weights=(
            tuple(v.numpy() for v in model.trainable_variables),
            tuple(v.numpy() for v in model.non_trainable_variables),
        ),
        predict_on_batch_fn=predict,
        loss_fn=loss,
        metrics_fns=(start, update, tf.function(lambda state: state)),
        input_spec=spec,
    )
    process = tff.learning.algorithms.build_weighted_fed_avg(
        functional, tff.learning.optimizers.build_sgdm(rate)
    )
    data = {
        name: tf.data.Dataset.from_tensor_slices(part).batch(batch)
        for name, part in clients.items()
    }
    return process, data
