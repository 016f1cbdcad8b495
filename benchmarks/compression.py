r"""How much smaller can the updates of clients be, and what does it cost in accuracy?

    TFDS_DATA_DIR=... python benchmarks/compression.py

fashion_mnist on 100 clients of 600 examples, 20 per round, 30 rounds, one local epoch, SGD with
learning rate 0.1, a small convolutional network from scratch. Test accuracy after the last round,
and how many times smaller the packed update of a client is. A seed changes the clients, the initial
weights and the sample. Learning settings are the same for all.
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
from lib.scores import VERDICTS, mean_and_deviation, select, verdict
from lib.seeds import run_seeds

import keras_lp as lp

CLIENTS, PER_ROUND, ROUNDS, RATE = 100, 20, 30, 0.1
NONE = "none"
WAYS: dict[str, Any] = {
    NONE: None,
    "Quantize(8)": lp.Quantize(8),
    "Quantize(4)": lp.Quantize(4),
    "Quantize(1)": lp.Quantize(1),
    "TopK(0.1)": lp.TopK(0.1),
    "TopK(0.02)": lp.TopK(0.02),
    "TopK(0.01)": lp.TopK(0.01),
    "TopK(0.02), error feedback": lp.TopK(0.02, error_feedback=True),
    "TopK(0.01), error feedback": lp.TopK(0.01, error_feedback=True),
}


def learn(name: str, seed: int) -> Run:
    keras.utils.set_random_seed(seed)
    model = lp.transfer_model(
        conv_net(), 10, pretrained=False, trainable="all", optimizer="sgd", learning_rate=RATE
    )
    federated = lp.FederatedAveraging(
        model, clients_per_round=PER_ROUND, compression=WAYS[name], seed=seed
    )
    clients = lp.partition(scaled("fashion_mnist"), clients=CLIENTS, seed=seed)
    history = federated.fit(clients, ROUNDS, verbose=0).history
    test = scaled("fashion_mnist", "test")
    run = {
        "accuracy": float(model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]),
        "bytes": int(history["bytes_up"][-1]) // PER_ROUND,
        "seconds": float(np.median(history["seconds"])),
    }
    return run


def report(results: dict[str, Any]) -> str:
    runs, rows = results["runs"], []
    plain = select(runs, name=NONE)
    for name in WAYS:
        found = select(runs, name=name)
        accuracies = [100 * run["accuracy"] for run in found]
        change = np.subtract(accuracies, [100 * run["accuracy"] for run in plain])
        rows.append([
            name, mean_and_deviation(accuracies),
            "" if name == NONE else f"{np.mean(change):+.1f}, {verdict(change)}",
            f"{found[0]['bytes']:,}", f"{plain[0]['bytes'] / found[0]['bytes']:.1f}x",
            f"{np.median([run['seconds'] for run in found]):.2f}",
        ])  # fmt: skip
    header = ["compression", "accuracy, %", "change", "bytes", "smaller", "seconds per round"]
    return page(
        "Smaller updates",
        results["command"],
        results["machine"],
        __doc__,
        table(header, rows),
        VERDICTS,
    )


def main() -> None:
    run_seeds(__file__, __doc__ or "", learn, WAYS, report)


if __name__ == "__main__":
    main()
