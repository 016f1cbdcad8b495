r"""Should the adapters of clients be averaged exactly?

    TFDS_DATA_DIR=... python benchmarks/federated_lora.py

A small convolutional network learns 20,000 examples of mnist. Then 6,000 examples of fashion_mnist
on 30 clients of two labels each train it further: adapters of rank 4 and the head, 10 clients per
round, 40 rounds of five local epochs, SGD with learning rate 0.05. A and B are averaged separately,
or their product exactly, also if half of the clients have rank 1; for comparison, all layers train
without adapters. Test accuracy after the last round, and bytes that a client sends and receives. A
seed changes the pretrained weights, the clients and the sample. Learning settings are the same for
all.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from lib.journal import Run
from lib.networks import conv_net
from lib.problems import scaled
from lib.results import page, table
from lib.scores import VERDICTS, select
from lib.seeds import accuracies, change, run_seeds

import keras_lp as lp

EXAMPLES, CLIENTS, PER_ROUND, ROUNDS, EPOCHS, RATE, RANK = 6_000, 30, 10, 40, 5, 0.05, 4
SEPARATE, EXACT, RANKS, ALL = "separate", "exact", "exact, half of rank 1", "all layers"


def pretrained(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = lp.transfer_model(conv_net(), 10, pretrained=False, trainable="all")
    model.fit(*scaled("mnist", "train[:20000]"), batch_size=64, epochs=2, verbose=0)
    return model


def learn(name: str, seed: int) -> Run:
    clients = lp.partition(
        scaled("fashion_mnist", f"train[:{EXAMPLES}]"), clients=CLIENTS, shards=2, seed=seed
    )
    model = lp.transfer_model(pretrained(seed), 10)
    options: dict[str, Any] = {} if name == ALL else {"lora": lp.LoRA(rank=RANK)}
    model = lp.finetune_model(
        model, layer_decay=1.0, optimizer="sgd", learning_rate=RATE, **options
    )
    arguments: dict[str, Any] = {} if name == ALL else {"lora_averaging": name.split(",")[0]}
    if name == RANKS:
        arguments["lora_ranks"] = dict.fromkeys(list(clients)[::2], 1)
    federated = lp.FederatedAveraging(
        model, clients_per_round=PER_ROUND, local_epochs=EPOCHS, seed=seed, **arguments
    )
    history = federated.fit(clients, ROUNDS, verbose=0).history
    test = scaled("fashion_mnist", "test")
    return {
        "accuracy": float(model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]),
        "up": sum(history["bytes_up"]) / ROUNDS / PER_ROUND,
        "down": sum(history["bytes_down"]) / ROUNDS / PER_ROUND,
    }


def report(results: dict[str, Any]) -> str:
    runs = results["runs"]
    rows, separate = [], select(runs, name=SEPARATE)
    for name in (SEPARATE, EXACT, RANKS, ALL):
        found = select(runs, name=name)
        told = "" if name == SEPARATE else change(found, separate)
        sizes = (f"{sum(run[way] for run in found) / len(found):,.0f}" for way in ("up", "down"))
        rows.append([name, accuracies(found), told, *sizes])
    header = ["averaging", "accuracy, %", "change", "bytes sent", "bytes received"]
    return page(
        "Averages of adapters",
        results["command"],
        results["machine"],
        __doc__,
        table(header, rows),
        VERDICTS,
    )


def main() -> None:
    names = [SEPARATE, EXACT, RANKS, ALL]
    run_seeds(__file__, __doc__ or "", learn, names, report)


if __name__ == "__main__":
    main()
