r"""Should normalization layers stay on the clients if their inputs look different?

    TFDS_DATA_DIR=... python benchmarks/personal_normalization.py

Handwritten digits of three scripts (cmaterdb: Bangla, Devanagari, Telugu): four clients of 100
images for each script, all in each of 30 rounds, SGD with learning rate 0.1. A small convolutional
network from scratch, whose BatchNormalization stays on the clients
(`personal_layers="normalization"`), or has GroupNormalization instead, which is shared or stays on
the clients. Accuracy on 500 test images of the client's script, mean over the clients. A seed
changes the clients and the initial weights. Learning settings are the same for all.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from lib.journal import Run
from lib.problems import scaled
from lib.results import page, table
from lib.scores import VERDICTS, select
from lib.seeds import accuracies, change, run_seeds

import keras_lp as lp

SCRIPTS = ["bangla", "devanagari", "telugu"]
EACH, IMAGES, TESTED, ROUNDS, RATE = 4, 100, 500, 30, 0.1
SHARED, GROUP, BATCH = "GroupNormalization, shared", "GroupNormalization", "BatchNormalization"


def network(name: str) -> keras.Model:
    layers = [keras.Input((32, 32, 3))]
    for i, filters in enumerate((16, 32, 32), 1):
        layers.append(keras.layers.Conv2D(filters, 3, 2, "same", name=f"conv{i}"))
        batch = keras.layers.BatchNormalization(name=f"norm{i}")
        group = keras.layers.GroupNormalization(8, name=f"norm{i}")
        layers += [batch if name == BATCH else group, keras.layers.ReLU()]
    return keras.Sequential([*layers, keras.layers.Flatten()])


def learn(name: str, seed: int) -> Run:
    clients, tests = {}, {}
    for script in SCRIPTS:
        x, y = scaled(f"cmaterdb/{script}", "train[:2000]")
        count = EACH * IMAGES
        own = lp.partition((x[:count], y[:count]), clients=EACH, seed=seed)
        test = scaled(f"cmaterdb/{script}", f"test[:{TESTED}]")
        clients |= {f"{script} {client}": data for client, data in own.items()}
        tests |= {f"{script} {client}": test for client in own}
    keras.utils.set_random_seed(seed)
    model = lp.transfer_model(
        network(name), 10, pretrained=False, trainable="all", pooling=None, optimizer="sgd",
        learning_rate=RATE,
    )  # fmt: skip
    personal = None if name == SHARED else "normalization"
    federated = lp.FederatedAveraging(model, personal_layers=personal, seed=seed)
    federated.fit(clients, ROUNDS, verbose=0)
    found = federated.evaluate(tests, verbose=0)
    return {"accuracy": found["mean_accuracy"], "worst": found["worst_decile_accuracy"]}


def report(results: dict[str, Any]) -> str:
    rows, shared = [], select(results["runs"], name=SHARED)
    for name in (SHARED, GROUP, BATCH):
        found = select(results["runs"], name=name)
        shown = name if name == SHARED else f"{name}, on the clients"
        rows.append([shown, accuracies(found), "" if name == SHARED else change(found, shared)])
    return page(
        "Personal normalization layers", results["command"], results["machine"], __doc__,
        table(["normalization", "accuracy, %", "change"], rows), VERDICTS,
    )  # fmt: skip


def main() -> None:
    run_seeds(__file__, __doc__ or "", learn, [SHARED, GROUP, BATCH], report)


if __name__ == "__main__":
    main()
