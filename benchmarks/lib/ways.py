"""The ways to learn that `python -m benchmarks` compares.

All start from the same network, see the same examples in as many steps, and have the settings of
`examples/quickstart.py`, which were chosen on training examples of digits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

import keras_lp as lp
from keras_lp.tasks.heads import heads
from lib.cases import OTHER_LABELS, Case
from lib.problems import Arrays

BATCH, CLIENTS, LOCAL_BATCH = 20, 10, 5
EPOCH = 400  # fewer examples are repeated: an epoch costs more than its steps
TASK, SECOND = "class", "second"
RATES = (3e-4, 3e-3)  # of fine-tuning, besides 1e-3


class Learned(NamedTuple):
    """A trained model, and what a federation leaves to be measured when the clock has stopped."""

    model: keras.Model
    federation: Federation | None = None


class Federation(NamedTuple):
    """A federation that was trained: its clients, history, and the head after each round."""

    learning: lp.FederatedAveraging
    clients: dict[Any, Arrays]
    logs: dict[str, list[float]]
    heads: list[tuple[np.ndarray, np.ndarray]]


class Way(NamedTuple):
    """A way to learn.

    Attributes:
        learn: builds and trains a model.
        backbone: the share of the steps in which the network below the head is trained.
        second: whether it needs labels of a second task.
        rates: whether it is one of the rates that are compared.
    """

    learn: Callable[[Case], Learned]
    backbone: float = 0.0
    second: bool = False
    rates: bool = False


def repeated(data: Arrays) -> Arrays:
    """Returns the examples as often as they make an epoch."""
    copies = max(1, EPOCH // len(data[1]))
    return tuple(np.concatenate([part] * copies) for part in data)


def train(model: keras.Model, case: Case, share: float = 1.0) -> keras.Model:
    """Trains for a share of the steps."""
    x, y = repeated(case.train)
    epochs = max(1, round(share * case.seen / len(y)))
    model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0)
    return model


def head(case: Case) -> Learned:
    """Solves the head."""
    model = case.build(case.names)
    lp.fit_head(model, case.train, verbose=0)
    return Learned(model)


def fine_tuned(case: Case, rate: float = 1e-3, **arguments: Any) -> Learned:
    """Half of the steps train the head alone."""
    model = train(case.build(case.names), case, 0.5)
    return Learned(train(lp.finetune_model(model, learning_rate=rate, **arguments), case, 0.5))


def one_task(case: Case) -> Learned:
    model = case.build({TASK: case.names}, lp.multitask_model, learning_rate=5e-4)
    x, y = repeated(case.train)
    epochs = max(1, round(case.seen / len(y)))
    model.fit(x, {TASK: y}, batch_size=BATCH, epochs=epochs, verbose=0)
    return Learned(model)


def multitask(case: Case) -> Learned:
    """Half of each batch has a label of the task, the other half one of the second task."""
    count = max(OTHER_LABELS, len(case.train[1]))
    x, y = repeated(case.train)
    others = case.pool[0][:count], {SECOND: case.second[:count]}
    parts = {TASK: (x, {TASK: y}), SECOND: others}
    tasks = {TASK: case.names, SECOND: int(case.second.max()) + 1}
    kinds = {name: lp.Classification(classes) for name, classes in tasks.items()}
    data = lp.mix(parts, batch_size=BATCH, temperature=float("inf"), seed=case.seed, tasks=kinds)
    model = case.build(tasks, lp.multitask_model, learning_rate=5e-4)
    model.fit(data, epochs=max(1, round(case.seen / (len(y) + count))), shuffle=False, verbose=0)
    return Learned(model)


def clients_of(case: Case, shards: int | None = None) -> dict[Any, Arrays]:
    """Returns ten clients, whose examples are repeated as those of `repeated`."""
    parts = lp.partition(case.train, clients=CLIENTS, shards=shards, seed=case.seed)
    copies = max(1, EPOCH // len(case.train[1]))
    return {
        client: tuple(np.concatenate([part] * copies) for part in data)
        for client, data in parts.items()
    }


def rounds_of(clients: dict[Any, Arrays], case: Case) -> int:
    """Returns the rounds in which the clients see as many examples as the other ways."""
    return max(1, round(case.seen / sum(len(y) for _, y in clients.values())))


def federated(case: Case, shards: int | None = None, **arguments: Any) -> Learned:
    model = case.build(case.names, optimizer="sgd")
    clients = clients_of(case, shards)
    learning = lp.FederatedAveraging(model, batch_size=LOCAL_BATCH, seed=case.seed, **arguments)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    (layer,) = heads(model).values()
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: found.append(layer.raw_weights()))
    logs = learning.fit(clients, rounds_of(clients, case), callbacks=keep, verbose=0).history
    return Learned(model, Federation(learning, clients, logs, found))


def private(case: Case) -> Learned:
    privacy = lp.DifferentialPrivacy(epsilon=8, delta=1e-2, clip=1.0, seed=case.seed)
    return federated(case, privacy=privacy)


SCRATCH, HEAD, TRANSFER = "from scratch", "solved head", "transfer by gradient"
ONE_RATE, DECAY, LORA = "fine-tuning (one rate)", "fine-tuning (layer decay)", "LoRA"
ONE_TASK, MULTITASK = "one task", "multitask"
CENTRAL = "centralised"
EQUAL, SKEWED = "federated (equal parts)", "federated (two labels)"
PRIVATE = "federated (private)"


def at_rate(way: str, rate: float) -> str:
    """Returns the name of a way of fine-tuning at another rate."""
    return f"{way.removesuffix(')')}, {rate:g})"


DECAYS = {ONE_RATE: 1.0, DECAY: 0.7}
WAYS: dict[str, Way] = {
    SCRATCH: Way(lambda case: Learned(train(case.untrained(case.names), case)), backbone=1),
    HEAD: Way(head),
    TRANSFER: Way(lambda case: Learned(train(case.build(case.names), case))),
    **{
        way: Way(functools.partial(fine_tuned, layer_decay=decay), backbone=0.5)
        for way, decay in DECAYS.items()
    },
    LORA: Way(lambda case: fine_tuned(case, lora=lp.LoRA(rank=4)), backbone=0.5),
    ONE_TASK: Way(one_task, backbone=1, second=True),
    MULTITASK: Way(multitask, backbone=1, second=True),
    CENTRAL: Way(lambda case: Learned(train(case.build(case.names, optimizer="sgd"), case))),
    EQUAL: Way(federated),
    SKEWED: Way(functools.partial(federated, shards=2)),
    PRIVATE: Way(private),
    **{
        at_rate(way, rate): Way(
            functools.partial(fine_tuned, rate=rate, layer_decay=decay), backbone=0.5, rates=True
        )
        for way, decay in DECAYS.items()
        for rate in RATES
    },
}
