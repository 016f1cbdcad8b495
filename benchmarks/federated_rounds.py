"""Seconds a round of federated averaging, and bytes of a round with a frozen backbone.

    TFDS_DATA_DIR=... python benchmarks/federated_rounds.py

An MLP (64 units, 10 classes) on the digits and on fashion_mnist, 9 steps of 20 examples a client,
10 to 1,000 clients. The contenders take turns, a few rounds each, and the medians are compared:

- `lp.FederatedAveraging`;
- a bare loop in this process: one `tf.function` call a client over tensors already in memory,
  updates averaged in TensorFlow; no shuffling, no metrics, no other process;
- TFF as its tutorial has it: `build_weighted_fed_avg` over batched data sets;
- the limit: all clients in one `tf.function` of this process;
- Flower's simulation, Keras's `fit` on each client, where `flwr[simulation]` is installed. As each
  of its starts takes seconds, it has one turn, at the end.

Then the messages of a round of 8 clients with a frozen MobileNetV2: features computed once a
client, backbone read from files, and TFF as its tutorial has it, all weights in every message.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table, write
from flower import flower_rounds

import keras_lp as lp
from keras_lp.federated import tff_runtime
from keras_lp.federated.engine import worker as worker_module

BATCH, STEPS, RATE = 20, 9, 0.1
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
GOALS = {"bare loop": 1.3, "bare loop, in blocks": 0.7, "TFF": 5.0}
Clients = dict[str, tuple[np.ndarray, np.ndarray]]


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = lp.load_dataset(name, split="train", batch_size=-1)
    return x.reshape(len(x), -1).astype("float32") / 255, y.astype("int32")


def make_clients(data: tuple[np.ndarray, np.ndarray], count: int) -> Clients:
    """Each client has 9 batches, drawn with replacement where the data are fewer."""
    x, y = data
    rng = np.random.default_rng(0)
    draw = rng.integers(len(x), size=(count, BATCH * STEPS))
    return {f"c{i:04}": (x[rows], y[rows]) for i, rows in enumerate(draw)}


def mlp(inputs: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((inputs,)), *layers])
    model.compile(keras.optimizers.SGD(RATE), LOSS)
    return model


class Sampler:
    """The same number of clients in each round, sampled anew; without a number, all of them."""

    def __init__(self, clients: Clients, sampled: int | None) -> None:
        self.names, self.sampled = list(clients), sampled
        self.rng = np.random.default_rng(0)

    def __call__(self) -> list[str]:
        if self.sampled is None:
            return self.names
        return list(self.rng.choice(self.names, self.sampled, replace=False))


def keras_lp_rounds(clients: Clients, sampled: int | None, inputs: int) -> Callable[[int], list]:
    federated = lp.FederatedAveraging(mlp(inputs), clients_per_round=sampled)

    def run(rounds: int) -> list[float]:
        return federated.fit(clients, rounds, verbose=0).history["seconds"]

    return run


def local_sgd(model: keras.Model, start: Any, x: tf.Tensor, y: tf.Tensor) -> Any:
    """Nine steps of SGD over a client's tensors, and what they changed."""

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


def bare_rounds(clients: Clients, sampled: int | None, inputs: int) -> Callable[[int], list]:
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


def limit_rounds(clients: Clients, sampled: int | None, inputs: int) -> Callable[[int], list]:
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


def tutorial(model: keras.Model, clients: Clients, batch: int = BATCH) -> tuple[Any, dict]:
    """TFF's process and data sets as its tutorial makes them, on Keras 3's stateless call."""
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
        functional, tff.learning.optimizers.build_sgdm(RATE)
    )
    data = {
        name: tf.data.Dataset.from_tensor_slices(part).batch(batch)
        for name, part in clients.items()
    }
    return process, data


def tff_rounds(clients: Clients, sampled: int | None, inputs: int) -> Callable[[int], list]:
    process, data = tutorial(mlp(inputs), clients)
    state, sample = {"now": process.initialize()}, Sampler(clients, sampled)

    def one() -> None:
        state["now"] = process.next(state["now"], [data[name] for name in sample()]).state

    return timed(one)


def timed(one: Callable[[], None]) -> Callable[[int], list[float]]:
    def run(rounds: int) -> list[float]:
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            one()
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


CONTENDERS = {
    "keras_lp": keras_lp_rounds,
    "bare loop": bare_rounds,
    "TFF": tff_rounds,
    "limit": limit_rounds,
}


def measure(data: Any, count: int, sampled: int | None, repeats: int) -> dict[str, float]:
    """Medians of seconds a round; the first rounds, which trace, are left out."""
    clients = make_clients(data, count)
    runs = {
        name: make(clients, sampled, data[0].shape[1])
        for name, make in CONTENDERS.items()
        if name != "TFF" or (sampled or count) <= 100  # minutes, where it would be linear
    }
    for run in runs.values():
        run(2)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name] += run(1 if name == "TFF" else 3)
    if importlib.util.find_spec("flwr") is not None and (sampled or count) <= 100:
        make = functools.partial(mlp, data[0].shape[1])
        flower = flower_rounds(list(clients.values()), sampled, make, BATCH)
        seconds["Flower"] = flower(repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def wire(pictures: int = 20, side: int = 96) -> dict[str, list[float]]:
    """Megabytes to the worker and from it, and seconds, of a round of 8 clients."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8 * pictures, side, side, 3)).astype("float32")
    y = rng.integers(10, size=8 * pictures).astype("int32")
    clients = lp.partition((x, y), 8)
    results = {}
    for name, cache in {"features computed once": "auto", "backbone from files": False}.items():
        model = frozen_mobilenet(side, cache)
        federated = lp.FederatedAveraging(model)
        results[name] = messages(lambda f=federated: f.fit(clients, 1, verbose=0))
    process, data = tutorial(frozen_mobilenet(side, False), clients)
    state, sets = process.initialize(), [data[name] for name in clients]
    results["TFF as its tutorial has it"] = messages(lambda: process.next(state, sets))
    pictures_mb = x.nbytes / 1e6
    return {**results, "of these, the clients' pictures": [pictures_mb, 0.0, 0.0]}


def frozen_mobilenet(side: int, cache: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    network = keras.applications.MobileNetV2(
        input_shape=(side, side, 3), include_top=False, weights=None
    )
    return lp.transfer_model(network, 10, cache_features=cache, optimizer="sgd", learning_rate=RATE)


def messages(run: Callable[[], Any]) -> list[float]:
    run()
    worker = worker_module.load_worker()
    sent, received, start = worker.bytes_sent, worker.bytes_received, time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return [(worker.bytes_sent - sent) / 1e6, (worker.bytes_received - received) / 1e6, seconds]


def report(rows: list[dict[str, Any]], bytes_of: dict[str, list[float]], command: str) -> str:
    body, names = [], [*CONTENDERS, "Flower"]
    flower = ["flwr"] if any("Flower" in row["seconds"] for row in rows) else []
    for row in rows:
        ours, bare = row["seconds"]["keras_lp"], row["seconds"]["bare loop"]
        tff = row["seconds"].get("TFF")
        cells = [f"{row['seconds'][n]:.3f}" if n in row["seconds"] else "-" for n in names]
        ratios = [f"{ours / bare:.2f}", f"{tff / ours:.1f}" if tff else "-"]
        body.append([row["data"], str(row["clients"]), str(row["sampled"]), *cells, *ratios])
    header = ["data", "clients", "in a round", *names, "of the bare loop", "TFF takes, times"]
    lines = [[name, *(f"{v:.2f}" for v in values)] for name, values in bytes_of.items()]
    return (
        f"# Rounds of federated averaging\n\n{machine('tensorflow-federated', *flower)}.\n\n"
        f"`{command}`\n\nSeconds a round, medians in turn; 9 steps of 20 examples a client. Goals "
        "at 100 clients: at most 1.3 times the bare loop (0.7 in blocks, which are always on "
        f"here), TFF at least 5 times.\n\n{table(header, body)}\n\n"
        "A round of 8 clients, 20 pictures of 96x96 each, with a frozen MobileNetV2 (random "
        "weights): all messages between this process and TFF's. keras_lp puts the clients' "
        "pictures into files, TFF into its messages.\n\n"
        f"{table(['', 'MB up', 'MB down', 'seconds'], lines)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["digits", "fashion_mnist"])
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.data:
        data = load(name)
        cases = [(count, None) for count in arguments.clients]
        cases += [(count, count // 10) for count in arguments.clients if count >= 100]
        for count, sampled in cases:
            seconds = measure(data, count, sampled, arguments.repeats)
            case = {"data": name, "clients": count, "sampled": sampled or count}
            rows.append({**case, "seconds": seconds})
            print(rows[-1], flush=True)
    bytes_of = wire()
    command = (
        f"python benchmarks/federated_rounds.py --data {' '.join(arguments.data)} "
        f"--clients {' '.join(map(str, arguments.clients))} --repeats {arguments.repeats}"
    )
    write(
        arguments.out / "federated_rounds",
        report(rows, bytes_of, command),
        {"rows": rows, "wire": bytes_of},
    )


if __name__ == "__main__":
    main()
