"""How many rounds to a target accuracy on MNIST, against McMahan et al., 2017 (arXiv:1602.05629)?

    TFDS_DATA_DIR=... python benchmarks/mcmahan.py --cases 2nn_iid 2nn_shards cnn_iid

100 clients, a tenth of them in a round; the 2NN (199,210 parameters) to 97 % with E=1, the CNN
(1,663,370) to 99 % with E=5. `shards` gives each client two shards of the sorted examples. As in
the paper the count is where the best accuracy so far crosses the target, interpolated. The rate
is tuned on 5,000 training pictures that no client has, over a few rounds, or given by `--rates`.
Each round's accuracy is written to a file, and a case that was stopped continues. A result is added
to those that are there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from lib.arguments import parser
from lib.journal import Run
from lib.machine import machine
from lib.networks import classifier
from lib.problems import scaled
from lib.results import page, table, write
from lib.scores import unique

import keras_lp as lp

# case: (network, shards, epochs, batch, target, most rounds, published rounds)
CASES = {
    "2nn_iid": ("2nn", None, 1, 10, 0.97, 300, "87"),
    "2nn_iid_full_batch": ("2nn", None, 1, None, 0.97, 2000, "1,455"),
    "2nn_shards": ("2nn", 2, 1, 10, 0.97, 1500, "664"),
    "cnn_iid": ("cnn", None, 5, 10, 0.99, 60, "18 to 20"),
    "cnn_shards": ("cnn", 2, 5, 10, 0.99, 500, "206 to 229"),
}
RATES = {10: (0.03, 0.1, 0.2), None: (0.1, 0.3, 1.0)}  # by batch; all examples at once allow more


def network(kind: str, rate: float, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    dense, convolution = keras.layers.Dense, keras.layers.Conv2D
    pool = keras.layers.MaxPooling2D
    layers = {
        "2nn": lambda: [keras.layers.Flatten(), dense(200, "relu"), dense(200, "relu"), dense(10)],
        "cnn": lambda: [
            convolution(32, 5, padding="same", activation="relu"), pool(),
            convolution(64, 5, padding="same", activation="relu"), pool(),
            keras.layers.Flatten(), dense(512, "relu"), dense(10),
        ],
    }[kind]()  # fmt: skip
    return classifier((28, 28, 1), layers, keras.optimizers.SGD(rate))


def rounds_to(accuracies: list[float], target: float) -> float | None:
    """Returns where the best accuracy so far crosses the target; None if it never does."""
    best = np.maximum.accumulate(accuracies)
    reached = np.flatnonzero(best >= target)
    if not len(reached):
        return None
    last = reached[0]
    if last == 0:
        return 1.0
    return float(last + (target - best[last - 1]) / (best[last] - best[last - 1]))


class Log(keras.callbacks.Callback):
    """Writes each round's accuracy, and stops at the target."""

    def __init__(self, path: Path, target: float) -> None:
        super().__init__()
        self.path, self.target = path, target

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        with open(self.path, "a") as file:
            accuracy = logs["val_accuracy"]
            line = {"round": epoch + 1, "accuracy": accuracy, "seconds": logs["seconds"]}
            file.write(json.dumps(line) + "\n")
        self.model.stop_training = logs["val_accuracy"] >= self.target


def federation(case: str, rate: float, seed: int) -> lp.FederatedAveraging:
    kind, _, epochs, batch, *_ = CASES[case]
    return lp.FederatedAveraging(
        network(kind, rate, seed),
        clients_per_round=10, local_epochs=epochs, batch_size=batch, seed=seed,
    )  # fmt: skip


def tuned_rate(case: str, x: np.ndarray, y: np.ndarray, rounds: int) -> float:
    """Returns the rate with the best accuracy after a few rounds."""
    clients = lp.partition((x[5000:], y[5000:]), 100, shards=CASES[case][1])
    found = {}
    for rate in RATES[CASES[case][3]]:
        history = federation(case, rate, 0).fit(
            clients, rounds, validation_data=(x[:5000], y[:5000]), verbose=0
        )
        found[rate] = float(np.mean(history.history["val_accuracy"][-3:]))
        print(f"{case}: rate {rate}, accuracy {found[rate]:.4f} after {rounds} rounds", flush=True)
    return max(found, key=found.get)


def run(case: str, given: float | None, seed: int, folder: Path, tuning_rounds: int) -> Run:
    x, y = scaled("mnist")
    _, shards, *_, target, most, published = CASES[case]
    rate_file, name, rate = folder / f"{case}_rate.json", f"{case}_{seed}", given
    if given is None:
        if not rate_file.exists():
            rate_file.write_text(json.dumps(tuned_rate(case, x, y, tuning_rounds)))
        rate = json.loads(rate_file.read_text())
    else:
        name += f"_{given:g}"
    history = federation(case, rate, seed).fit(
        lp.partition((x, y), 100, shards=shards, seed=seed),
        most,
        validation_data=scaled("mnist", "test"),
        callbacks=Log(folder / f"{name}.jsonl", target),
        checkpoint_dir=folder / name,
    )
    accuracies = [float(value) for value in history.history["val_accuracy"]]
    return {
        "case": case, "seed": seed, "rate": rate, "tuned": given is None,
        "tuning rounds": tuning_rounds if given is None else None, "target": target,
        "published": published, "rounds": rounds_to(accuracies, target),
        "run": len(accuracies), "best": max(accuracies),
    }  # fmt: skip


def added(new: Run, path: Path) -> list[Run]:
    """Returns the results with a new one, which replaces that of the same settings."""
    settings = ("case", "rate", "tuned", "seed")
    known = json.loads(path.read_text())["results"] if path.exists() else []
    results = [old for old in known if any(old[name] != new[name] for name in settings)] + [new]
    return sorted(results, key=lambda r: (list(CASES).index(r["case"]), r["rate"], r["seed"]))


def report(results: dict[str, Any]) -> str:
    rows = []
    for r in results["results"]:
        tuned = f", tuned in {r['tuning rounds']} rounds" if r["tuned"] else ""
        rounds = f"{r['rounds']:.0f}" if r["rounds"] else f"not in {r['run']}"
        rows.append([r["case"], f"{r['rate']:g}{tuned}", f"{r['target']:.0%}", rounds,
                     r["published"], f"{r['best']:.2%}"])  # fmt: skip
    return page(
        "McMahan et al., 2017, on MNIST",
        results["command"],
        results["machine"],
        __doc__,
        f"Seeds: {', '.join(map(str, sorted(unique(results['results'], 'seed'))))}.",
        table(["case", "rate", "target", "rounds", "published", "best accuracy"], rows),
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    arguments.add_argument("--rates", nargs="+", type=float, help="default: the tuned one")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--tuning-rounds", type=int, default=10)
    given = arguments.parse_args()
    folder, stem = given.out / "mcmahan_runs", given.out / "mcmahan"
    folder.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/mcmahan.py --cases CASE --tuning-rounds ROUNDS  # or --rates RATE"
    results = {"command": command, "machine": machine("tensorflow-federated")}
    for case in given.cases:
        for rate in given.rates or [None]:
            new = run(case, rate, given.seed, folder, given.tuning_rounds)
            results["results"] = added(new, stem.with_suffix(".json"))
            write(stem, report(results), results)


if __name__ == "__main__":
    main()
