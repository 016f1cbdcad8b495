"""Rounds of federated averaging in Flower's simulation: Keras's `fit` on each client.

Flower's clients are processes that import this file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np

Part = tuple[np.ndarray, np.ndarray]


class Simulated(NamedTuple):
    """The seconds of each round but the first, and the weights after the last."""

    seconds: list[float]
    weights: list[np.ndarray]


_MODELS: list[keras.Model] = []  # the one of this process


def _own_model(make: Callable[[], keras.Model]) -> keras.Model:
    if not _MODELS:
        _MODELS.append(make())
    return _MODELS[0]


def flower_rounds(
    parts: Sequence[Part], sampled: int | None, make_model: Callable[[], keras.Model], batch: int
) -> Callable[[int], Simulated]:
    """Returns what simulates some rounds, and one before, in which the clients trace.

    A simulation is started each time, with one client at a time on each core.
    """
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    share = 1.0 if sampled is None else sampled / len(parts)
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        model, (x, y) = _own_model(make_model), parts[context.node_config["partition-id"]]
        model.set_weights(message.content["arrays"].to_numpy_ndarrays())
        model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
        arrays = ArrayRecord(model.get_weights())
        metrics = MetricRecord({"num-examples": len(x), "steps": -(-len(x) // batch)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    def run(rounds: int) -> Simulated:
        ends, answered, weights = [], [], []
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            strategy = FedAvg(fraction_train=share, fraction_evaluate=0.0)
            result = strategy.start(
                grid,
                ArrayRecord(make_model().get_weights()),
                num_rounds=rounds + 1,
                evaluate_fn=lambda *_: ends.append(time.perf_counter()),
            )
            answered.extend(result.train_metrics_clientapp)
            weights.extend(result.arrays.to_numpy_ndarrays())

        cores = {"client_resources": {"num_cpus": 1}}
        run_simulation(server, client, num_supernodes=len(parts), backend_config=cores)
        if len(answered) != rounds + 1:
            raise RuntimeError(f"Flower's clients failed: {len(answered)} of {rounds + 1} rounds.")
        return Simulated(np.diff(ends[1:]).tolist(), weights)  # the first end is the start

    return run
