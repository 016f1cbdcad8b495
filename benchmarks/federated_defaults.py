"""A federation with its defaults, compared with the same examples in one place.

    TFDS_DATA_DIR=... python benchmarks/federated_defaults.py

Four problems on frozen networks, 10 clients, 20 rounds: the pictures of the quickstart (100 digits
from 5 to 9, a network that knows 0 to 4), 2,000 of fashion_mnist in the same way, 500 digits of
cmaterdb/bangla on a network that learned mnist, and 1,000 questions of trec on one that learned
clinc_oos. Labels are skewed (a Dirichlet distribution of alpha 0.5), or each client has two shards
of the sorted examples, so mostly two labels.

- before: features as they are, a head trained by Adam of 1e-3 on the clients.
- Adam: `lp.transfer_model(...)` and `FederatedAveraging(model).fit(clients, 20)`, by default.
- SGD: the same, built with `optimizer="sgd"`.
- fit_head: `FederatedAveraging(model).fit_head(clients)`.
- central: `model.fit` by default over 20 epochs of all examples; central head: `lp.fit_head`.

Rates of SGD are compared on the validation split. A seed changes the examples, who has them, and
the sampling.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table, write
from defaults_cases import scripts_setting, text_settings
from studies import Problem, draw, mean_and_spread

import keras_lp as lp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import quickstart

CLIENTS, ROUNDS = 10, 20
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
SPREADS = {"alpha 0.5": {"alpha": 0.5}, "2 shards": {"shards": 2}}
KEYS = ("problem", "spread", "way", "seed")

Build = Callable[..., lp.Model]


def federated(build: Build, clients: Any, seed: int, **options: Any) -> lp.Model:
    model = build(**options)
    lp.FederatedAveraging(model, seed=seed).fit(clients, ROUNDS, verbose=0)
    return model


def solved(build: Build, clients: Any, seed: int) -> lp.Model:
    model = build()
    lp.FederatedAveraging(model).fit_head(clients, verbose=0)
    return model


def central(build: Build, data: Any) -> lp.Model:
    model = build()
    model.fit(*data, epochs=ROUNDS, verbose=0)
    return model


def central_head(build: Build, data: Any) -> lp.Model:
    model = build()
    lp.fit_head(model, data, verbose=0)
    return model


WAYS = {
    "before": lambda *case: federated(*case, cache_features=False, learning_rate=1e-3),
    "Adam": federated,
    "SGD": lambda *case: federated(*case, optimizer="sgd"),
    "fit_head": solved,
}
SWEEP = {
    f"SGD {rate:g}": functools.partial(federated, optimizer="sgd", learning_rate=rate)
    for rate in RATES
}
CENTRAL = {"central": central, "central head": central_head}


def problems(data_dir: str | None, folder: Path) -> list[tuple[Problem, int, Build]]:
    """Returns each problem, how many examples of it are used, and what builds the model."""
    found = []
    for name, count in (("digits", 100), ("fashion_mnist", 2000)):
        data = quickstart.problem(name, 0, data_dir)
        path = folder / f"{name}.keras"
        keras.utils.set_random_seed(0)
        quickstart.pretrain(data, path, 0)
        x, y = lp.load_dataset(name, split="train", batch_size=-1, data_dir=data_dir)
        half = len(data.names)
        val, train = draw((x[y >= half], y[y >= half] - half), 200, seed=0)
        problem = Problem(name, data.names, train, val, data.test)
        found.append((problem, count, functools.partial(lp.transfer_model, path, half)))
    for setting in (scripts_setting(data_dir, folder), text_settings(data_dir, folder)[0]):
        found.append((setting.problem, setting.sizes[-1], setting.build))
    return found


def accuracy(model: lp.Model, data: Any) -> float:
    logits = model.predict(data[0], batch_size=256, verbose=0)
    return float(np.mean(logits.argmax(-1) == data[1]))


def study(cases: list[tuple[Problem, int, Build]], seeds: int, partial: Path) -> list[Any]:
    """Runs what the file of runs does not have yet."""
    runs = json.loads(partial.read_text()) if partial.exists() else []
    done = {tuple(run[key] for key in KEYS) for run in runs}
    for (problem, count, build), seed in itertools.product(cases, range(seeds)):
        data, _ = draw(problem.train, count, seed)
        work = [("", way, functools.partial(learn, build, data)) for way, learn in CENTRAL.items()]
        for spread, options in SPREADS.items():
            clients = lp.partition(data, clients=CLIENTS, seed=seed, **options)
            ways = {**WAYS, **(SWEEP if seed == 0 else {})}
            work += [
                (spread, way, functools.partial(learn, build, clients, seed))
                for way, learn in ways.items()
            ]
        for spread, way, learn in work:
            key = problem.name, spread, way, seed
            if key in done:
                continue
            keras.backend.clear_session()
            keras.utils.set_random_seed(seed)
            model = learn()
            width = model.get_layer("features").output.shape[-1]
            scores = {part: accuracy(model, getattr(problem, part)) for part in ("val", "test")}
            runs.append({**dict(zip(KEYS, key, strict=True)), "features": width, **scores})
            partial.write_text(json.dumps(runs))
            print(runs[-1], flush=True)
    return runs


def select(runs: list[Any], way: str, problem: str, spread: str, part: str) -> np.ndarray:
    wanted = problem, ("" if way in CENTRAL else spread), way
    return np.array(
        [100 * run[part] for run in runs if (run["problem"], run["spread"], run["way"]) == wanted]
    )


def report(results: dict[str, Any]) -> str:
    runs = results["runs"]
    names = list(dict.fromkeys((run["problem"], run["features"]) for run in runs))
    cases = list(itertools.product(names, SPREADS))

    def rows(ways: list[str], part: str) -> str:
        cells = [
            [
                f"{name} ({width:,} features), {spread}",
                *(
                    mean_and_spread(select(runs, way, name, spread, part), "accuracy")
                    for way in ways
                ),
            ]
            for (name, width), spread in cases
        ]
        return table(["", *ways], cells)

    best = [
        [
            f"{name}, {spread}",
            *(f"{select(runs, way, name, spread, 'val')[0]:.1f}" for way in SWEEP),
        ]
        for (name, _), spread in cases
    ]
    parts = __doc__.split("\n\n")
    return "\n\n".join(
        [
            "# A federation with its defaults",
            f"    {results['command']}",
            f"Machine: {results['machine']}.",
            *(part.strip() for part in parts[2:]),
            f"Test accuracy in per cent, mean and deviation over "
            f"{len({run['seed'] for run in runs})} seeds:",
            rows([*WAYS, *CENTRAL], "test"),
            "Rates of SGD, validation accuracy, one seed:",
            table(["", *SWEEP], best),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "federated_defaults")
    arguments = parser.parse_args()
    tf.get_logger().setLevel("ERROR")
    with tempfile.TemporaryDirectory() as folder:
        cases = problems(arguments.data_dir, Path(folder))
        runs = study(cases, arguments.seeds, arguments.out.with_suffix(".partial.json"))
    results = {
        "command": f"python benchmarks/federated_defaults.py --seeds {arguments.seeds}",
        "machine": machine("tensorflow-federated"),
        "runs": runs,
    }
    write(arguments.out, report(results), results)


if __name__ == "__main__":
    main()
