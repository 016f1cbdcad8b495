"""What does a federation with its defaults lose against the same examples in one place?

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

Rates of SGD are compared on the validation split. A seed changes the examples, which client has
them, and the sampling.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from lib.arguments import command, parser
from lib.journal import Journal, Run
from lib.machine import machine
from lib.networks import Build, accuracy, script_setting, text_settings
from lib.problems import Problem, draw
from lib.results import RESULTS, page, table, write
from lib.scores import mean_and_deviation, select, unique

import keras_lp as lp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import quickstart

CLIENTS, ROUNDS = 10, 20
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
SPREADS = {"alpha 0.5": {"alpha": 0.5}, "2 shards": {"shards": 2}}


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
    "before": functools.partial(federated, cache_features=False, learning_rate=1e-3),
    "Adam": federated,
    "SGD": functools.partial(federated, optimizer="sgd"),
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
    for setting in (script_setting(data_dir, folder), text_settings(data_dir, folder)[0]):
        found.append((setting.problem, setting.sizes[-1], setting.build))
    return found


def learn(problem: Problem, seed: int, fit: Callable[[], lp.Model]) -> Run:
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    model = fit()
    run = {
        "features": model.get_layer("features").output.shape[-1],
        "val": accuracy(model, problem.val),
        "test": accuracy(model, problem.test),
    }
    print(problem.name, seed, run, flush=True)
    return run


def study(cases: list[tuple[Problem, int, Build]], seeds: int, journal: Journal) -> None:
    for (problem, count, build), seed in itertools.product(cases, range(seeds)):
        data, _ = draw(problem.train, count, seed)
        work = [("", way, functools.partial(fit, build, data)) for way, fit in CENTRAL.items()]
        for spread, options in SPREADS.items():
            clients = lp.partition(data, clients=CLIENTS, seed=seed, **options)
            work += [
                (spread, way, functools.partial(fit, build, clients, seed))
                for way, fit in {**WAYS, **(SWEEP if seed == 0 else {})}.items()
            ]
        for spread, way, fit in work:
            key = {"problem": problem.name, "spread": spread, "way": way, "seed": seed}
            journal.run(functools.partial(learn, problem, seed, fit), **key)


def report(results: dict[str, Any]) -> str:
    runs = results["runs"]
    cases = list(itertools.product(unique(runs, "problem", "features"), SPREADS))

    def values(way: str, problem: str, spread: str, part: str) -> list[float]:
        of = select(runs, problem=problem, way=way, spread="" if way in CENTRAL else spread)
        return [100 * run[part] for run in of]

    scores, rates = [], []
    for (name, width), spread in cases:
        found = [values(way, name, spread, "test") for way in (*WAYS, *CENTRAL)]
        title = f"{name} ({width:,} features), {spread}"
        scores.append([title, *(mean_and_deviation(one) for one in found)])
        found = [values(way, name, spread, "val") for way in SWEEP]
        rates.append([f"{name}, {spread}", *(f"{one[0]:.1f}" for one in found)])
    return page(
        "A federation with its defaults",
        results["command"],
        results["machine"],
        __doc__,
        "Test accuracy in per cent, mean and standard deviation over "
        f"{len(unique(runs, 'seed'))} seeds:",
        table(["", *WAYS, *CENTRAL], scores),
        "Rates of SGD, validation accuracy, one seed:",
        table(["", *SWEEP], rates),
    )


def main() -> None:
    arguments = parser(__doc__, seeds=3, data_dir=True, out=RESULTS / "federated_defaults")
    given = arguments.parse_args()
    tf.get_logger().setLevel("ERROR")
    journal = Journal(given.out.with_suffix(".partial.json"))
    with tempfile.TemporaryDirectory() as folder:
        study(problems(given.data_dir, Path(folder)), given.seeds, journal)
    results = {
        "command": command(__file__, given, "seeds"),
        "machine": machine("tensorflow-federated"),
        "runs": journal.runs,
    }
    write(given.out, report(results), results)


if __name__ == "__main__":
    main()
