"""How long does a round of federated averaging take, and how many bytes with a frozen backbone?

    TFDS_DATA_DIR=... python benchmarks/federated_rounds.py

An MLP (64 units, 10 classes) on the digits and on fashion_mnist, 9 steps of 20 examples per client,
10 to 1,000 clients. The contenders take turns, a few rounds each; seconds per round are medians:

- `lp.FederatedAveraging`;
- a bare loop in this process: one `tf.function` call per client over tensors already in memory,
  updates averaged in TensorFlow; no shuffling, no metrics, no other process;
- TFF as its tutorial has it: `build_weighted_fed_avg` over batched data sets;
- the limit: all clients in one `tf.function` of this process;
- Flower's simulation, Keras's `fit` on each client, where `flwr[simulation]` is installed. As each
  of its starts takes seconds, it has one turn, at the end.

Then the messages between this process and TFF's, of a round of 8 clients with 20 pictures of 96x96
each and a frozen MobileNetV2 (random weights): features computed once per client, backbone read
from files, and TFF as its tutorial has it, all weights in every message. keras_lp puts the clients'
pictures into files, TFF into its messages.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from lib import rounds
from lib.arguments import command, parser
from lib.flower import flower_rounds
from lib.machine import machine
from lib.networks import SIZE
from lib.problems import Arrays, scaled
from lib.results import page, table, write
from lib.timing import seconds

import keras_lp as lp
from keras_lp.federated.engine import worker as worker_module

GOALS = {"bare loop": 0.7, "TFF": 5.0}  # at 100 clients
CONTENDERS = {
    "keras_lp": rounds.keras_lp_rounds,
    "bare loop": rounds.bare_rounds,
    "TFF": rounds.tff_rounds,
    "limit": rounds.limit_rounds,
}


def load(name: str) -> Arrays:
    x, y = scaled(name)
    return x.reshape(len(x), -1), y


def measure(data: Any, count: int, sampled: int | None, repeats: int) -> dict[str, float]:
    """Returns the medians of seconds per round, without the first rounds, which trace."""
    clients = rounds.make_clients(data, count)
    runs = {
        name: make(clients, sampled, data[0].shape[1])
        for name, make in CONTENDERS.items()
        if name != "TFF" or (sampled or count) <= 100  # minutes, where it would be linear
    }
    for run in runs.values():
        run(2)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name] += run(1 if name == "TFF" else 3)
    if importlib.util.find_spec("flwr") is not None and (sampled or count) <= 100:
        make = functools.partial(rounds.mlp, data[0].shape[1])
        flower = flower_rounds(list(clients.values()), sampled, make, rounds.BATCH)
        times["Flower"] = flower(repeats).seconds
    return {name: statistics.median(values) for name, values in times.items()}


def wire(pictures: int = 20) -> dict[str, list[float]]:
    """Returns megabytes to the worker and from it, and seconds, of a round of 8 clients."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8 * pictures, SIZE, SIZE, 3)).astype("float32")
    y = rng.integers(10, size=8 * pictures).astype("int32")
    clients = lp.partition((x, y), 8)
    results = {}
    for name, cache in {"features computed once": "auto", "backbone from files": False}.items():
        model = frozen_mobilenet(cache)
        federated = lp.FederatedAveraging(model)
        results[name] = messages(lambda f=federated: f.fit(clients, 1, verbose=0))
    process, data = rounds.tutorial(frozen_mobilenet(False), clients)
    state, sets = process.initialize(), [data[name] for name in clients]
    results["TFF as its tutorial has it"] = messages(lambda: process.next(state, sets))
    pictures_mb = x.nbytes / 1e6
    return {**results, "of these, the clients' pictures": [pictures_mb, 0.0, 0.0]}


def frozen_mobilenet(cache: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    network = keras.applications.MobileNetV2(
        input_shape=(SIZE, SIZE, 3), include_top=False, weights=None
    )
    options = {"optimizer": "sgd", "learning_rate": rounds.RATE}
    return lp.transfer_model(network, 10, cache_features=cache, **options)


def messages(run: Callable[[], Any]) -> list[float]:
    run()
    worker = worker_module.load_worker()
    sent, received = worker.bytes_sent, worker.bytes_received
    spent = seconds(run).clock
    return [(worker.bytes_sent - sent) / 1e6, (worker.bytes_received - received) / 1e6, spent]


def report(results: dict[str, Any]) -> str:
    body, names = [], list(CONTENDERS)
    if any("Flower" in row["seconds"] for row in results["rows"]):
        names.append("Flower")
    for row in results["rows"]:
        times = row["seconds"]
        cells = [f"{times[name]:.3f}" if name in times else "-" for name in names]
        ratios = [f"{times['keras_lp'] / times['bare loop']:.2f}"]
        ratios.append(f"{times['TFF'] / times['keras_lp']:.1f}" if "TFF" in times else "-")
        body.append([row["data"], str(row["clients"]), str(row["sampled"]), *cells, *ratios])
    header = ["data", "clients", "in a round", *names, "of the bare loop", "TFF takes, times"]
    lines = [[name, *(f"{v:.2f}" for v in found)] for name, found in results["wire"].items()]
    return page(
        "Rounds of federated averaging",
        results["command"],
        results["machine"],
        __doc__,
        f"Seconds per round. Goals at 100 clients: at most {GOALS['bare loop']:g} times the bare "
        f"loop, TFF at least {GOALS['TFF']:g} times:",
        table(header, body),
        "Messages of a round:",
        table(["", "MB up", "MB down", "seconds"], lines),
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", nargs="+", default=["digits", "fashion_mnist"])
    arguments.add_argument("--clients", nargs="+", type=int, default=[10, 100, 1000])
    arguments.add_argument("--repeats", type=int, default=3, help="turns of each contender")
    given = arguments.parse_args()
    rows = []
    for name in given.data:
        data = load(name)
        cases = [(count, None) for count in given.clients]
        cases += [(count, count // 10) for count in given.clients if count >= 100]
        for count, sampled in cases:
            found = measure(data, count, sampled, given.repeats)
            case = {"data": name, "clients": count, "sampled": sampled or count}
            rows.append({**case, "seconds": found})
            print(rows[-1], flush=True)
    flower = ["flwr"] if any("Flower" in row["seconds"] for row in rows) else []
    results = {
        "command": command(__file__, given, "data", "clients", "repeats"),
        "machine": machine("tensorflow-federated", *flower),
        "rows": rows,
        "wire": wire(),
    }
    write(given.out / "federated_rounds", report(results), results)


if __name__ == "__main__":
    main()
