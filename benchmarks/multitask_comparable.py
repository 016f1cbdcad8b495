"""Does a task keep what it has alone? The plain sum of mean losses, and the default.

    TFDS_DATA_DIR=... python benchmarks/multitask_comparable.py

Six mixes of tasks: few and many classes, rare and common labels, few and many numbers.

- alone: a model of each task by `lp.transfer_model`, with the same labels (missing ones too), the
  same steps and batches.
- plain sum: `balancing="sum"`, which adds up the mean losses.
- default: `balancing="equal"`, where the mean loss of `MultiLabel` counts once for each label. In a
  mix without `MultiLabel` it is the plain sum.
- by constants: each loss is divided by that of the best constant prediction, which the training
  labels give (a dict as `balancing`). Not in the library: what the default was chosen over.

All models of a mix have the same batches of the same examples. Networks, untrained: one dense layer
of 64; for texts the mean of embeddings (32 wide) and a dense layer of 128. Adam, its rate falling
to zero along a cosine. The rate is one of three, the best with the first seed on validation
examples: for a model of one task by its metric, for one of several by the mean gain of its tasks
over those. A seed changes the initial weights and the order. The test split chooses nothing.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from lib.arguments import command, parser
from lib.journal import Journal, Run
from lib.machine import machine, one_thread
from lib.mixes import MIXES, Mix, constant_loss, counts, metric, sign
from lib.multitask import Part, Restarted, cosine, model_of
from lib.results import page, table, write
from lib.scores import deviation, mean_and_deviation, select, tuned, verdict

NAME = "multitask_comparable"
ALONE, PLAIN, DEFAULT, CONSTANTS = "alone", "plain sum", "default", "by constants"


def study(name: str, mix: Mix, journal: Journal, seeds: int) -> None:
    best: dict[str, float] = {}  # of each task alone, on validation examples

    def alone(run: Run) -> float:
        ((task, value),) = run["val"].items()
        return sign(mix, task) * value

    def together(run: Run) -> float:
        gains = [
            sign(mix, task) * (value - best[task]) / best[task]
            for task, value in run["val"].items()
        ]
        return float(np.mean(gains))

    ways = [(ALONE, [task]) for task in mix.tasks]
    for way, tasks in [*ways, *((way, list(mix.tasks)) for way in ways_of(mix))]:
        restart = Restarted(partial(build, mix, way, tasks), -(-len(mix.parts[0][0]) // mix.batch))
        key = {"mix": name, "way": way, "tasks": tasks}
        score = alone if way == ALONE else together
        runs = tuned(journal, partial(learn, restart, mix, tasks), mix.rates, seeds, score, **key)
        if way == ALONE:
            best |= select(runs, chosen=True, seed=0)[0]["val"]


def ways_of(mix: Mix) -> list[str]:
    """Without `MultiLabel` the default is the plain sum."""
    same = set(counts(mix).values()) == {1}
    return [PLAIN, CONSTANTS] if same else [PLAIN, DEFAULT, CONSTANTS]


def build(mix: Mix, way: str, tasks: list[str]) -> keras.Model:
    chosen = {task: mix.tasks[task] for task in tasks}
    return model_of(mix.network, chosen, balancing=balancing(mix, way))


def balancing(mix: Mix, way: str) -> str | dict[str, float]:
    """Returns the argument of `lp.multitask_model`."""
    if way != CONSTANTS:
        return "sum" if way == PLAIN else "equal"
    return {task: 1 / (constant_loss(mix, task) * counts(mix)[task]) for task in mix.tasks}


def learn(restart: Restarted, mix: Mix, tasks: list[str], seed: int, rate: float) -> Run:
    model = restart(seed)
    x, y = mix.parts[0]
    start = time.perf_counter()
    falling = keras.callbacks.LearningRateScheduler(lambda i: cosine(rate, i / mix.epochs))
    y = y if len(tasks) > 1 else y[tasks[0]]
    model.fit(x, y, batch_size=mix.batch, epochs=mix.epochs, callbacks=[falling], verbose=0)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "val": metrics(model, mix, mix.parts[1], tasks),
        "test": metrics(model, mix, mix.parts[2], tasks),
    }


def metrics(model: keras.Model, mix: Mix, part: Part, tasks: list[str]) -> dict[str, float]:
    """Returns the first metric of each task."""
    x, y = part
    alone = len(tasks) == 1
    logs = model.evaluate(
        x, y[tasks[0]] if alone else y, batch_size=500, verbose=0, return_dict=True
    )
    return {
        task: round(float(logs[("" if alone else f"{task}_") + metric(mix, task)]), 5)
        for task in tasks
    }


# Results


def scores(runs: list[Run], name: str, way: str, task: str) -> np.ndarray:
    """Returns the metric on test examples, by seed."""
    of = select(runs, mix=name, way=way, chosen=True)
    of = sorted((run for run in of if task in run["tasks"]), key=lambda run: run["seed"])
    return np.array([run["test"][task] for run in of])


def mix_rows(runs: list[Run], name: str, mix: Mix) -> list[list[str]]:
    rows = []
    for task in mix.tasks:
        alone = scores(runs, name, ALONE, task)
        count = str(counts(mix)[task])
        row = [name, task, metric(mix, task), count, mean_and_deviation(alone, 4)]
        for way in (PLAIN, DEFAULT, CONSTANTS):
            found = scores(runs, name, way if way in ways_of(mix) else PLAIN, task)
            gain = sign(mix, task) * (found - alone)
            loses = gain.mean() < -max(deviation(alone), deviation(found))
            told = f"{'yes' if loses else 'no'}; {verdict(gain)}"
            row += [mean_and_deviation(found, 4), told]
        rows.append(row)
    return rows


def rate_row(runs: list[Run], name: str, mix: Mix) -> list[str]:
    of = select(runs, mix=name, chosen=True)
    found = {(run["way"], *run["tasks"]): f"{run['rate']:g}" for run in of}
    alone = ", ".join(f"{task} {found[ALONE, task]}" for task in mix.tasks)
    rates = {way: found[way, *mix.tasks] for way in ways_of(mix)}
    default = rates.get(DEFAULT, rates[PLAIN])
    return [name, mix.what, alone, rates[PLAIN], default, rates[CONSTANTS]]


def report(results: dict[str, Any], mixes: dict[str, Mix]) -> str:
    runs = results["runs"]
    header = ["mix", "task", "metric", "counts", ALONE]
    for way in (PLAIN, DEFAULT, CONSTANTS):
        header += [way, "loses"]
    mean = sum(run["seconds"] for run in runs) / len(runs)
    seeds = len({run["seed"] for run in runs})
    return page(
        "Losses that can be added up",
        results["command"],
        results["machine"],
        __doc__,
        f"Test metric, mean and standard deviation over {seeds} seeds, {len(runs)} trainings of "
        f"{mean:.0f} s on the mean; of `mae` less is better. Counts: how often the mean loss "
        "counts in the default sum. Loses: whether the mean is worse than alone by more than the "
        "seeds' deviation (the larger of the two); then, seed by seed, whether zero is outside the "
        "95 % interval of the mean difference (Student's t).",
        table(header, [row for name, mix in mixes.items() for row in mix_rows(runs, name, mix)]),
        "## Rates",
        table(
            ["mix", "what", "rate alone", PLAIN, DEFAULT, CONSTANTS],
            [rate_row(runs, name, mix) for name, mix in mixes.items()],
        ),
    )


def main() -> None:
    given = parser(__doc__, seeds=5, data_dir=True).parse_args()
    one_thread()
    runs, mixes = [], {}
    for name, make in MIXES.items():
        mix = mixes[name] = make(given.data_dir)
        settings = {"rates": list(mix.rates), "epochs": mix.epochs, "batch": mix.batch}
        path = given.out / "partial" / f"{NAME}_{name.replace(', ', '_')}.json"
        journal = Journal(path, settings)
        study(name, mix, journal, given.seeds)
        runs += journal.runs
    results = {
        "command": command(__file__, given, "seeds"),
        "machine": machine("scikit-learn"),
        "runs": runs,
    }
    write(given.out / NAME, report(results, mixes), results)


if __name__ == "__main__":
    main()
