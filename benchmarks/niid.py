"""FedAvg and FedProx on skewed labels, beside the figures of NIID-Bench as run with Flower.

    TFDS_DATA_DIR=... python benchmarks/niid.py --rounds 50 --epochs 10

10 clients, all of them in each round, on mnist and fashion_mnist: Dirichlet 0.5, and two labels
each (two shards of the sorted examples). The network is NIID-Bench's (Li et al., 2022,
arXiv:2102.02079): two convolutions, two dense layers, SGD of rate 0.01 and momentum 0.9, batches
of 64. Published after 50 rounds of 10 epochs, FedAvg: mnist 98.89 and 96.86, fashion_mnist 88.09
and 78.10. A case that was killed goes on.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from common import RESULTS, machine, table, write

import keras_lp as lp

SKEWS = {"Dirichlet 0.5": {"alpha": 0.5}, "two labels": {"shards": 2}}
PUBLISHED = {
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
    model = keras.Sequential([keras.Input((28, 28, 1)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, metrics=["accuracy"])
    return model


def accuracy(data: str, skew: str, proximal: float, seed: int, args: argparse.Namespace) -> float:
    x, y = lp.load_dataset(data, split="train", batch_size=-1)
    x_test, y_test = lp.load_dataset(data, split="test", batch_size=-1)
    clients = lp.partition((x, y.astype("int32")), 10, seed=seed, **SKEWS[skew])
    federated = lp.FederatedAveraging(
        network(seed),
        local_epochs=args.epochs, batch_size=64, proximal_strength=proximal, seed=seed,
    )  # fmt: skip
    name = f"{data}_{'_'.join(SKEWS[skew])}_{proximal:g}_{seed}"
    federated.fit(clients, args.rounds, checkpoint_dir=args.out / "niid_runs" / name)
    return 100 * federated.model.evaluate(x_test, y_test.astype("int32"), verbose=0)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion_mnist"])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--proximal", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = []
    for data in args.data:
        for skew in SKEWS:
            for name, proximal in {"FedAvg": 0.0, "FedProx": args.proximal}.items():
                found = [accuracy(data, skew, proximal, seed, args) for seed in range(args.seeds)]
                results.append({"data": data, "skew": skew, "name": name, "accuracy": found})
                save(results, args)


def save(results: list[dict], args: argparse.Namespace) -> None:
    rows = [
        [r["data"], r["skew"], r["name"],
         f"{np.mean(r['accuracy']):.2f} ± {np.std(r['accuracy']):.2f}",
         f"{PUBLISHED[r['data'], r['skew']]}" if r["name"] == "FedAvg" else "-"]
        for r in results
    ]  # fmt: skip
    header = ["data", "skew", "algorithm", "test accuracy, %", "published, 50 rounds of 10"]
    text = (
        f"# Skewed labels\n\n{machine('tensorflow-federated')}.\n\n`python benchmarks/niid.py "
        f"--rounds {args.rounds} --epochs {args.epochs} --seeds {args.seeds}`\n\n10 clients, "
        f"{args.rounds} rounds of {args.epochs} epochs, mean and deviation over {args.seeds} "
        f"seeds; FedProx with mu = {args.proximal:g}.\n\n{table(header, rows)}\n"
    )
    write(args.out / "niid", text, {"arguments": vars(args) | {"out": ""}, "results": results})


if __name__ == "__main__":
    main()
