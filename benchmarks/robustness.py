r"""Which aggregation withstands bad clients?

    TFDS_DATA_DIR=... python benchmarks/robustness.py

6,000 examples of fashion_mnist on 50 clients of equal parts, of which all take part in each of 20
rounds of two local epochs, SGD with learning rate 0.1, a small convolutional network from scratch.
A fifth of the clients is bad: their labels are flipped (9 minus the class), or their images and
labels are noise of a thousand times the size, so that their updates are. Test accuracy after the
last round. A seed changes the clients, the initial weights and the noise. Learning settings are the
same for all.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from lib.journal import Run
from lib.networks import conv_net
from lib.problems import scaled
from lib.results import page, table
from lib.scores import select
from lib.seeds import accuracies, run_seeds

import keras_lp as lp

EXAMPLES, CLIENTS, BAD, ROUNDS, EPOCHS, RATE = 6_000, 50, 10, 20, 2, 0.1
CASES = ["all good", "flipped labels", "noise"]
WAYS = ["mean", "median", "trimmed_mean", "krum"]


def with_bad_clients(clients: dict[str, Any], case: str, seed: int) -> dict[str, Any]:
    rng, found = np.random.default_rng(seed), dict(clients)
    for name in list(clients)[:BAD]:
        x, y = clients[name]
        if case == "flipped labels":
            found[name] = x, 9 - y
        elif case == "noise":
            found[name] = (
                1000 * rng.normal(size=x.shape).astype("float32"),
                rng.integers(0, 10, len(y)),
            )
    return found


def learn(name: str, seed: int) -> Run:
    aggregation, case = name.split(", ")
    x, y = scaled("fashion_mnist", f"train[:{EXAMPLES}]")
    clients = with_bad_clients(lp.partition((x, y), clients=CLIENTS, seed=seed), case, seed)
    keras.utils.set_random_seed(seed)
    model = lp.transfer_model(
        conv_net(), 10, pretrained=False, trainable="all", optimizer="sgd", learning_rate=RATE
    )
    federated = lp.FederatedAveraging(
        model, local_epochs=EPOCHS, aggregation=aggregation, weighting="uniform", seed=seed
    )
    history = federated.fit(clients, ROUNDS, verbose=0).history
    test = scaled("fashion_mnist", "test")
    return {
        "accuracy": float(model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]),
        "seconds": float(np.median(history["seconds"])),
    }


def report(results: dict[str, Any]) -> str:
    runs = results["runs"]
    rows = []
    for way in WAYS:
        found = [select(runs, name=f"{way}, {case}") for case in CASES]
        seconds = np.median([run["seconds"] for run in found[0]])
        rows.append([way, *map(accuracies, found), f"{seconds:.2f}"])
    return page(
        "Bad clients",
        results["command"],
        results["machine"],
        __doc__,
        table(["accuracy, %", *CASES, "seconds per round"], rows),
    )


def main() -> None:
    names = [f"{way}, {case}" for case in CASES for way in WAYS]
    run_seeds(__file__, __doc__ or "", learn, names, report)


if __name__ == "__main__":
    main()
