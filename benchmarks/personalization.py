r"""When are personal models better than the global model of a federation?

    TFDS_DATA_DIR=... python benchmarks/personalization.py

The first 12,000 examples of fashion_mnist on 60 clients: two labels per client, Dirichlet 0.5, or
equal parts. A quarter of the examples of each client is held out. A small convolutional network
from scratch, 15 clients per round, 40 rounds, SGD with learning rate 0.1. Then the global model is
fine-tuned on each client, `lp.personalize` with 2 epochs; or the heads stay on the clients from the
beginning, `personal_layers="head"`. Accuracy on the held-out examples, mean over clients and worst
tenth. The verdict is that of `lp.personalize`. A seed changes the clients, the initial weights and
the sample.
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
from lib.scores import mean_and_deviation, select
from lib.seeds import run_seeds

import keras_lp as lp

EXAMPLES, CLIENTS, PER_ROUND, ROUNDS, EPOCHS, RATE = 12_000, 60, 15, 40, 2, 0.1
PARTS: dict[str, dict[str, Any]] = {
    "two labels": {"shards": 2},
    "Dirichlet 0.5": {"alpha": 0.5},
    "equal parts": {},
}


def worst(values: dict[str, float]) -> float:
    ranked = np.sort(list(values.values()))
    return float(ranked[: len(ranked) // 10].mean())


def federation(seed: int, **arguments: Any) -> lp.FederatedAveraging:
    keras.utils.set_random_seed(seed)
    model = lp.transfer_model(
        conv_net(), 10, pretrained=False, trainable="all", optimizer="sgd", learning_rate=RATE
    )
    return lp.FederatedAveraging(model, clients_per_round=PER_ROUND, seed=seed, **arguments)


def learn(name: str, seed: int) -> Run:
    x, y = scaled("fashion_mnist", f"train[:{EXAMPLES}]")
    clients = lp.partition((x, y), clients=CLIENTS, seed=seed, **PARTS[name])
    train, held_out = lp.split_clients(clients, seed=seed)
    federated = federation(seed)
    federated.fit(train, ROUNDS, verbose=0)
    personal = lp.personalize(federated, train, held_out, epochs=EPOCHS, seed=seed, verbose=0)
    heads = federation(seed, personal_layers="head")
    heads.fit(train, ROUNDS, verbose=0)
    own = heads.evaluate(held_out, verbose=0)
    return {
        "verdict": personal.verdict,
        "better": int((personal.change > 0).sum()),
        **{
            kind: {"mean": float(np.mean(list(values.values()))), "worst": worst(values)}
            for kind, values in (("global", personal.before), ("personal", personal.after))
        },
        "heads": {"mean": own["mean_accuracy"], "worst": own["worst_decile_accuracy"]},
    }


def report(results: dict[str, Any]) -> str:
    rows = []
    for name in PARTS:
        found = select(results["runs"], name=name)
        figures = [
            mean_and_deviation([100 * run[kind][what] for run in found])
            for what in ("mean", "worst")
            for kind in ("global", "personal", "heads")
        ]
        verdicts = ", ".join(run["verdict"] for run in found)
        rows.append([name, *figures, verdicts])
    header = [
        "clients", "global, mean", "fine-tuned, mean", "own heads, mean", "global, worst tenth",
        "fine-tuned, worst tenth", "own heads, worst tenth", "verdict of each seed",
    ]  # fmt: skip
    return page(
        "Personal models", results["command"], results["machine"], __doc__, table(header, rows)
    )


def main() -> None:
    run_seeds(__file__, __doc__ or "", learn, PARTS, report)


if __name__ == "__main__":
    main()
