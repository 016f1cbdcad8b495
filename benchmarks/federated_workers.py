"""What do rounds cost on workers of other machines?

    python benchmarks/federated_workers.py

A federation of 100 clients with 60 pictures of 28 x 28 each trains a small convolutional network,
two local epochs per round. The same rounds run on the worker of this process, and with
`lp.federated_workers` on 1, 2 and 4 workers, in turn; the first rounds, which compile, are left
out. All workers are on this machine and share its cores. So the ratio of one worker to this process
is the cost of sending, and more workers show what dividing the work costs, not what more machines
gain. The plan below is computed from these figures.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from lib.arguments import command, parser
from lib.machine import machine
from lib.networks import classifier
from lib.results import page, table

import keras_lp as lp

CLIENTS, EXAMPLES, SIDE = 100, 60, 28
WORKERS = (0, 1, 2, 4)  # 0: the worker of this process
PLANNED, MACHINES, NETWORK = 10_000, (1, 10, 50), 125e6  # clients, machines, bytes per second


def clients() -> dict[int, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    size = (EXAMPLES, SIDE, SIDE, 1)
    return {
        i: (rng.random(size, dtype="float32"), rng.integers(0, 10, EXAMPLES))
        for i in range(CLIENTS)
    }


def federation() -> lp.FederatedAveraging:
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
        keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]
    model = classifier((SIDE, SIDE, 1), layers, keras.optimizers.SGD(0.05))
    return lp.FederatedAveraging(model, local_epochs=2)


def start() -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_lp.federated.worker", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().split()[2]


def measure(repeats: int, rounds: int) -> tuple[dict[int, list[float]], float]:
    """Returns seconds per round by the number of workers, and the largest difference of weights."""
    data = clients()
    processes, addresses = zip(*(start() for _ in range(max(WORKERS))), strict=True)
    found: dict[int, list[float]] = {count: [] for count in WORKERS}
    weights = {}
    try:
        for count in WORKERS:
            federated = federation()
            with _on(addresses[:count]):
                federated.fit(data, rounds=1, verbose=0)  # compiles
                weights[count] = federated.model.get_weights()
        for repeat in range(repeats):
            for count in WORKERS if repeat % 2 == 0 else reversed(WORKERS):
                federated = federation()
                with _on(addresses[:count]):
                    federated.fit(data, rounds=1, verbose=0)  # compiles
                    begun = time.perf_counter()
                    federated.fit(data, rounds=rounds, verbose=0)
                    found[count].append((time.perf_counter() - begun) / rounds)
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    difference = max(
        float(np.abs(a - b).max())
        for count in WORKERS
        for a, b in zip(weights[0], weights[count], strict=True)
    )
    return found, difference


def _on(addresses: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
    return lp.federated_workers(addresses) if addresses else contextlib.nullcontext()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--rounds", type=int, default=5)
    given = arguments.parse_args()
    found, difference = measure(given.repeats, given.rounds)
    medians = {count: statistics.median(times) for count, times in found.items()}
    rows = [
        [
            "this process" if count == 0 else f"{count} on this machine",
            f"{medians[count]:.2f}",
            f"{min(found[count]):.2f} to {max(found[count]):.2f}",
            f"{medians[count] / medians[0]:.2f}",
        ]
        for count in WORKERS
    ]
    size = EXAMPLES * (SIDE**2 * 4 + 8)
    plan = []
    for machines in MACHINES:
        work = medians[1] / CLIENTS * PLANNED / machines
        sent = size * PLANNED / NETWORK
        plan.append([f"{machines}", f"{work:.0f}", f"{sent:.0f}", f"{work + sent:.0f}"])
    text = page(
        "Rounds on several workers",
        command(__file__, given, "repeats", "rounds"),
        machine("tensorflow-federated"),
        __doc__,
        table(["workers", "seconds per round, median", "range", "ratio"], rows),
        f"Largest difference of a weight after a round: {difference:.1e}.",
        f"A plan for {PLANNED:,} clients of this size in a round, on machines like this one: the "
        f"work of a client takes {1000 * medians[1] / CLIENTS:.1f} ms, its data have "
        f"{size / 1e3:.0f} kB, and the coordinator sends them one after another over a network of "
        f"{NETWORK * 8 / 1e9:.0f} Gbit/s. Only the work is divided, so beyond the number of "
        "machines where sending takes as long as the work, more do not help.",
        table(["machines", "work, s", "sending, s", "round, s"], plan),
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "federated_workers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
