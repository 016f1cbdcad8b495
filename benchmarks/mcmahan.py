"""The rounds of McMahan et al., 2017 (arXiv:1602.05629) to a target accuracy on MNIST.

    TFDS_DATA_DIR=... python benchmarks/mcmahan.py --cases 2nn_iid 2nn_shards cnn_iid

100 clients, a tenth of them a round; the 2NN (199,210 parameters) to 97 % with E=1, the CNN
(1,663,370) to 99 % with E=5. `shards` deals each client two shards of the sorted examples. As in
the paper the count is where the best accuracy so far crosses the target, interpolated. The rate
is tuned on 5,000 training pictures that no client has, over a few rounds, or given by `--rates`.
Each round's accuracy is written to a file, and each case goes on where it was killed. Results are
added to those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from common import RESULTS, machine, table, write

import keras_lp as lp

# case: (network, shards, epochs, batch, target, most rounds, published rounds)
CASES = {
    "2nn_iid": ("2nn", None, 1, 10, 0.97, 300, "87"),
    "2nn_iid_full_batch": ("2nn", None, 1, None, 0.97, 2000, "1,455"),
    "2nn_shards": ("2nn", 2, 1, 10, 0.97, 1500, "664"),
    "cnn_iid": ("cnn", None, 5, 10, 0.99, 60, "18 to 20"),
    "cnn_shards": ("cnn", 2, 5, 10, 0.99, 500, "206 to 229"),
}
RATES = {10: (0.03, 0.1, 0.2), None: (0.1, 0.3, 1.0)}  # by batch; all at once bears more


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
    model = keras.Sequential([keras.Input((28, 28, 1)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate), loss, metrics=["accuracy"])
    return model


def rounds_to(accuracies: list[float], target: float) -> float | None:
    """Where the best accuracy so far crosses the target, interpolated; None if it never does."""
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
    """The rate with the best accuracy after a few rounds, on pictures that no client has."""
    clients = lp.partition((x[5000:], y[5000:]), 100, shards=CASES[case][1])
    found = {}
    for rate in RATES[CASES[case][3]]:
        history = federation(case, rate, 0).fit(
            clients, rounds, validation_data=(x[:5000], y[:5000]), verbose=0
        )
        found[rate] = float(np.mean(history.history["val_accuracy"][-3:]))
        print(f"{case}: rate {rate}, accuracy {found[rate]:.4f} after {rounds} rounds", flush=True)
    return max(found, key=found.get)


def run(case: str, given: float | None, seed: int, folder: Path, tuning_rounds: int) -> dict:
    (x, y), test = (
        lp.load_dataset("mnist", split=split, batch_size=-1) for split in ("train", "test")
    )
    x, x_test = (part.astype("float32") / 255 for part in (x, test[0]))
    y, y_test = (part.astype("int32") for part in (y, test[1]))
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
        validation_data=(x_test, y_test),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rates", nargs="+", type=float, help="in place of the tuned one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuning-rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = arguments.out / "mcmahan_runs"
    folder.mkdir(parents=True, exist_ok=True)
    for case in arguments.cases:
        for rate in arguments.rates or [None]:
            new = run(case, rate, arguments.seed, folder, arguments.tuning_rounds)
            save(new, arguments.out)


def tuning_of(result: dict) -> str:
    tried = f", tuned in {result['tuning rounds']} rounds" if result["tuned"] else ""
    return f"{result['rate']:g}{tried}"


def save(new: dict, out: Path) -> None:
    """Adds a result, in the place of one of the same settings."""
    settings = ("case", "rate", "tuned", "seed")
    file = out / "mcmahan.json"
    known = json.loads(file.read_text())["results"] if file.exists() else []
    results = [old for old in known if any(old[name] != new[name] for name in settings)] + [new]
    results.sort(key=lambda r: (list(CASES).index(r["case"]), r["rate"], r["seed"]))
    rows = [
        [r["case"], tuning_of(r), f"{r['target']:.0%}",
         f"{r['rounds']:.0f}" if r["rounds"] else f"not in {r['run']}",
         r["published"], f"{r['best']:.2%}"]
        for r in results
    ]  # fmt: skip
    seeds = sorted({result["seed"] for result in results})
    header = ["case", "rate", "target", "rounds", "published", "best accuracy"]
    text = (
        f"# McMahan et al., 2017, on MNIST\n\n{machine('tensorflow-federated')}.\n\n"
        "`python benchmarks/mcmahan.py --cases CASE --tuning-rounds ROUNDS`, or `--rates RATE` "
        f"where the rate was not tuned. Seeds: {', '.join(map(str, seeds))}.\n\n"
        f"{table(header, rows)}\n"
    )
    write(out / "mcmahan", text, {"results": results})


if __name__ == "__main__":
    main()
