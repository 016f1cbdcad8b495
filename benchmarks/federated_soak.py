"""Thousands of rounds in one process: memory, open files and worker restarts.

    python benchmarks/federated_soak.py --rounds 2000

The digits over 100 clients, 10 a round. Every 50 rounds a line goes to the results: resident
memory of this process and of TFF's worker, open files, restarts, seconds a round. At the end the
weights are compared with those of the same rounds after a worker that was killed half way.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from common import RESULTS, machine, table

import keras_lp as lp
from keras_lp.federated.engine import worker as worker_module


def resident_mb(pid: int | str) -> float:
    """Of a process; 0 of one that has died."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


class Watch(keras.callbacks.Callback):
    """Writes a line every so many rounds, and may kill the worker once."""

    def __init__(self, path: Path, every: int, kill_at: int | None = None) -> None:
        super().__init__()
        self.path, self.every, self.kill_at = path, every, kill_at
        self.rows: list[dict[str, float]] = []
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        worker = worker_module.load_worker()
        if epoch + 1 == self.kill_at:
            worker.process.kill()
        if (epoch + 1) % self.every:
            return
        row = {
            "round": epoch + 1,
            "this process, MB": resident_mb("self"),
            "worker, MB": resident_mb(worker.process.pid),
            "open files": len(os.listdir("/proc/self/fd")),
            "restarts": worker.restarts,
            "seconds a round": (time.perf_counter() - self.start) / self.every,
        }
        self.start = time.perf_counter()
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def run(rounds: int, watch: Watch) -> list[np.ndarray]:
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    x, y = x.reshape(-1, 64).astype("float32") / 255, y.astype("int32")
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05), loss, metrics=["accuracy"])
    federated = lp.FederatedAveraging(model, clients_per_round=10)
    federated.fit(lp.partition((x, y), 100, alpha=0.5), rounds, callbacks=watch, verbose=0)
    return model.get_weights()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "federated_soak.jsonl"
    path.unlink(missing_ok=True)
    watch = Watch(path, arguments.every)
    whole = run(arguments.rounds, watch)
    again = Watch(path, arguments.every, kill_at=arguments.rounds // 2)
    killed = run(arguments.rounds, again)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(whole, killed, strict=True))
    step = max(1, len(watch.rows) // 10)
    shown = watch.rows[::step]
    rows = [[f"{value:,.4g}" for value in row.values()] for row in shown]
    text = (
        f"# {arguments.rounds:,} rounds in one process\n\n{machine('tensorflow-federated')}.\n\n"
        f"`python benchmarks/federated_soak.py --rounds {arguments.rounds}`\n\n"
        f"{table(list(watch.rows[0]), rows)}\n\nRestarts in these rounds: "
        f"{watch.rows[-1]['restarts']}. The same rounds with the worker killed after "
        f"{arguments.rounds // 2}: {again.rows[-1]['restarts'] - watch.rows[-1]['restarts']} "
        f"restarts, the weights differ by {difference:.1e} at most.\n"
    )
    (arguments.out / "federated_soak.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
