"""Do FedAvg and FedProx on skewed labels reach the accuracy of NIID-Bench, as run with Flower?

    TFDS_DATA_DIR=... python benchmarks/niid.py
    TFDS_DATA_DIR=... python benchmarks/niid.py --published --skews "two labels"

10 clients, all of them in each round, on mnist and fashion_mnist: Dirichlet 0.5, and two labels
each (two shards of the sorted examples). The network is that of NIID-Bench (Li et al., 2022,
arXiv:2102.02079): two convolutions, two dense layers, SGD of rate 0.01 and momentum 0.9, batches
of 64. The published setting is 50 rounds of 10 epochs; without `--published` a 25th of it. A case
that was stopped continues.
"""

from __future__ import annotations

import itertools
import os
from argparse import Namespace
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from lib.arguments import command, parser
from lib.machine import machine
from lib.networks import classifier
from lib.results import page, table, write
from lib.scores import mean_and_deviation

import keras_lp as lp

SKEWS = {"Dirichlet 0.5": {"alpha": 0.5}, "two labels": {"shards": 2}}
PUBLISHED = {  # of FedAvg after 50 rounds of 10 epochs
    ("mnist", "Dirichlet 0.5"): 98.89, ("mnist", "two labels"): 96.86,
    ("fashion_mnist", "Dirichlet 0.5"): 88.09, ("fashion_mnist", "two labels"): 78.10,
}  # fmt: skip


def network(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Rescaling(1 / 255),
        keras.layers.Conv2D(6, 5, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(16, 5, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(120, "relu"),
        keras.layers.Dense(84, "relu"),
        keras.layers.Dense(10),
    ]
    return classifier((28, 28, 1), layers, keras.optimizers.SGD(0.01, momentum=0.9))


def accuracy(data: str, skew: str, proximal: float, seed: int, given: Namespace) -> float:
    x, y = lp.load_dataset(data, split="train", batch_size=-1)
    x_test, y_test = lp.load_dataset(data, split="test", batch_size=-1)
    clients = lp.partition((x, y.astype("int32")), 10, seed=seed, **SKEWS[skew])
    federated = lp.FederatedAveraging(
        network(seed),
        local_epochs=given.epochs, batch_size=64, proximal_strength=proximal, seed=seed,
    )  # fmt: skip
    budget = f"{given.rounds}x{given.epochs}"
    name = f"{data}_{'_'.join(SKEWS[skew])}_{proximal:g}_{budget}_{seed}"
    federated.fit(clients, given.rounds, checkpoint_dir=given.out / "niid_runs" / name)
    return 100 * federated.model.evaluate(x_test, y_test.astype("int32"), verbose=0)[1]


def report(results: dict[str, Any]) -> str:
    given, rows = results["arguments"], []
    for r in results["results"]:
        found = mean_and_deviation(r["accuracy"], 2)
        published = f"{PUBLISHED[r['data'], r['skew']]}" if r["name"] == "FedAvg" else "-"
        rows.append([r["data"], r["skew"], r["name"], found, published])
    header = ["data", "skew", "algorithm", "test accuracy, %", "published, 50 rounds of 10"]
    return page(
        "Skewed labels",
        results["command"],
        results["machine"],
        __doc__,
        f"{given['rounds']} rounds of {given['epochs']} epochs, mean and standard deviation over "
        f"{given['seeds']} seeds; FedProx with mu = {given['proximal']:g}.",
        table(header, rows),
    )


def main() -> None:
    arguments = parser(__doc__, seeds=3)
    known = list(dict.fromkeys(data for data, _ in PUBLISHED))
    arguments.add_argument("--data", nargs="+", default=known, choices=known)
    arguments.add_argument("--skews", nargs="+", default=list(SKEWS), choices=list(SKEWS))
    arguments.add_argument("--rounds", type=int, help="default: 10")
    arguments.add_argument("--epochs", type=int, help="default: 2")
    arguments.add_argument("--published", action="store_true", help="50 rounds of 10 epochs")
    arguments.add_argument("--proximal", type=float, default=0.01)
    given = arguments.parse_args()
    if given.published and (given.rounds or given.epochs):
        arguments.error("--published has 50 rounds of 10 epochs; leave out --rounds and --epochs.")
    usual = (50, 10) if given.published else (10, 2)
    given.rounds, given.epochs = given.rounds or usual[0], given.epochs or usual[1]
    stem = "niid_published" if given.published else "niid"
    budget = () if given.published else ("rounds", "epochs")
    results: dict[str, Any] = {
        "command": command(__file__, given, "data", "skews", *budget, "proximal", "seeds")
        + " --published" * given.published,
        "machine": machine("tensorflow-federated"),
        "arguments": vars(given) | {"out": ""},
        "results": [],
    }
    strengths = {"FedAvg": 0.0, "FedProx": given.proximal}
    for data, skew, (name, proximal) in itertools.product(
        given.data, given.skews, strengths.items()
    ):
        found = [accuracy(data, skew, proximal, seed, given) for seed in range(given.seeds)]
        results["results"].append({"data": data, "skew": skew, "name": name, "accuracy": found})
        write(given.out / stem, report(results), results)


if __name__ == "__main__":
    main()
