"""Do memory and open files level off over thousands of rounds, and does a restart change a weight?

    python benchmarks/federated_soak.py --rounds 2000

The digits over 100 clients, 10 of them in a round. Every 50 rounds a line goes to the results:
resident memory of this process and of TFF's worker, open files, restarts, seconds per round. At the
end the weights are compared with those of the same rounds after a worker that was killed half way.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from lib.arguments import command, parser
from lib.machine import machine, memory
from lib.networks import classifier
from lib.problems import scaled
from lib.results import page, table

import keras_lp as lp
from keras_lp.federated.engine import worker as worker_module


class Watch(keras.callbacks.Callback):
    """Writes a line every so many rounds, and kills the worker at the end of one."""

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
            "this process, MB": memory(),
            "worker, MB": memory(pid=worker.process.pid),
            "open files": len(os.listdir("/proc/self/fd")),
            "restarts": worker.restarts,
            "seconds a round": (time.perf_counter() - self.start) / self.every,
        }
        self.start = time.perf_counter()
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def run(rounds: int, watch: Watch) -> list[np.ndarray]:
    x, y = scaled("digits")
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    model = classifier((64,), layers, keras.optimizers.SGD(0.05))
    federated = lp.FederatedAveraging(model, clients_per_round=10)
    clients = lp.partition((x.reshape(-1, 64), y), 100, alpha=0.5)
    federated.fit(clients, rounds, callbacks=watch, verbose=0)
    return model.get_weights()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=2000)
    arguments.add_argument("--every", type=int, default=50, help="rounds between two lines")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "federated_soak.jsonl"
    path.unlink(missing_ok=True)
    watch = Watch(path, given.every)
    whole = run(given.rounds, watch)
    again = Watch(path, given.every, kill_at=given.rounds // 2)
    killed = run(given.rounds, again)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(whole, killed, strict=True))
    rows = watch.rows[:: max(1, len(watch.rows) // 10)]
    restarts = watch.rows[-1]["restarts"]
    text = page(
        f"{given.rounds:,} rounds in one process",
        command(__file__, given, "rounds"),
        machine("tensorflow-federated"),
        __doc__,
        table(list(rows[0]), [[f"{value:,.4g}" for value in row.values()] for row in rows]),
        f"Restarts in these rounds: {restarts}. The same rounds with the worker killed after "
        f"{given.rounds // 2}: {again.rows[-1]['restarts'] - restarts} restarts, the weights "
        f"differ by {difference:.1e} at most.",
    )
    (given.out / "federated_soak.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
