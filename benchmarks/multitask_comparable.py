"""Does a task keep what it has alone? The plain sum of mean losses, and the default.

    TFDS_DATA_DIR=... python benchmarks/multitask_comparable.py

Six mixes of tasks: few and many classes, rare and common labels, few and many numbers.

- alone: a model of each task by `lp.transfer_model`, with the same labels (missing ones too), the
  same steps and batches.
- plain sum: `balancing="sum"`, which adds up the mean losses.
- default: `balancing="equal"`, where the mean loss of `MultiLabel` counts once for each label.
- by constants: each loss is divided by that of the best constant prediction, which the training
  labels give (a dict as `balancing`). Not in the library: what the default was chosen over.

The learning rate (one of three, with the first seed) is chosen on validation examples: for a model
of one task by its metric, for one of several by the mean gain of its tasks over those. A seed
changes the initial weights and the order of the examples.

Writes a table (Markdown) and all runs (JSON). What is done is kept in `partial/` beside them, so
that a run can go on where it ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table, write
from multitask_common import Journal, Part, cosine, restart, take, text_encoder, texts
from scipy.special import entr
from studies import Run, spread, verdict

import keras_lp as lp
from keras_lp.tasks.classification import as_task
from keras_lp.tasks.task import Task, TaskLike

NAME = "multitask_comparable"
ALONE, PLAIN, DEFAULT, CONSTANTS = "alone", "plain sum", "default", "by constants"


@dataclasses.dataclass
class Mix:
    """Tasks on the same examples, and how they are trained."""

    tasks: dict[str, TaskLike]
    what: str
    parts: Sequence[Part]  # train, val, test
    network: Callable[[], keras.Model]
    epochs: int
    batch: int
    rates: tuple[float, ...]

    def counts(self) -> dict[str, int]:
        """How often the mean loss of a task counts in the default sum."""
        return {name: as_task(task).label_count for name, task in self.tasks.items()}


def network(inputs: int) -> Callable[[], keras.Model]:
    return lambda: keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(64, "relu")])


def divided(part: Part, train: int, val: int) -> list[Part]:
    order = np.random.default_rng(0).permutation(len(part[0]))
    return [take(part, index) for index in np.split(order, [train, train + val])]


def rare(data_dir: str | None) -> Mix:
    """Tasks that have nothing in common: random directions of the same random numbers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8000, 40)).astype("float32")
    labels = (x @ rng.normal(size=(40, 28)) / 40**0.5 > 2).astype("int32")
    topic = (x @ rng.normal(size=(40, 4))).argmax(1)
    return Mix(
        {"rare": lp.MultiLabel(28), "topic": 4},
        "random numbers; 28 labels, each on 1 to 5 % of the examples, and 4 classes",
        divided((x, {"rare": labels, "topic": topic}), 4000, 2000),
        network(40), 15, 32, (1e-3, 3e-3, 1e-2),
    )  # fmt: skip


def trec(data_dir: str | None) -> Mix:
    problem = texts("trec", data_dir)
    count = problem.classes["fine"]
    parts = [
        (x, {"coarse": y["coarse"], "fine": np.eye(count, dtype="int32")[y["fine"]]})
        for x, y in (problem.train, problem.val, problem.test)
    ]
    x, y = parts[0]
    y["fine"][np.random.default_rng(0).permutation(len(x))[: len(x) // 2]] = -1
    return Mix(
        {"coarse": problem.classes["coarse"], "fine": lp.MultiLabel(count)},
        f"questions; 6 coarse types as classes, {count} fine types as labels, half of them missing",
        parts, text_encoder, 8, 64, (3e-3, 1e-2, 3e-2),
    )  # fmt: skip


def clinc(data_dir: str | None) -> Mix:
    problem = texts("clinc_oos", data_dir)
    return Mix(
        dict(problem.classes), "requests; 10 domains and 150 intents, both as classes",
        [problem.train, problem.val, problem.test], text_encoder, 5, 64, (3e-3, 1e-2, 3e-2),
    )  # fmt: skip


def pictures() -> tuple[np.ndarray, np.ndarray]:
    loaded = [lp.load_dataset("digits", split=s, batch_size=-1) for s in ("train", "test")]
    x, y = (np.concatenate(arrays) for arrays in zip(*loaded, strict=True))
    return x.reshape(len(x), 64).astype("float32") / 255, y


def digits(data_dir: str | None) -> Mix:
    x, y = pictures()
    ink = x.reshape(-1, 8, 8) / x.sum(1)[:, None, None]
    centre = np.stack([(ink.sum(2) * range(8)).sum(1), (ink.sum(1) * range(8)).sum(1)], 1)
    traits = np.stack([y % 2, y > 4, np.isin(y, [0, 6, 8, 9]), np.isin(y, [2, 3, 5, 7])], 1)
    labels = {"digit": y, "centre": centre.astype("float32"), "traits": traits.astype("int32")}
    return Mix(
        {"digit": 10, "centre": lp.Regression(2), "traits": lp.MultiLabel(4)},
        "handwritten digits; the digit, the centre of the ink (2 numbers) and 4 common labels",
        divided((x, labels), 1000, 397), network(64), 30, 32, (1e-3, 3e-3, 1e-2),
    )  # fmt: skip


def below(data_dir: str | None, labels: bool = False) -> Mix:
    """What is below the upper half of a digit: numbers, or labels for black and white."""
    x, y = pictures()
    pixels = x[:, 32:]
    pixels = pixels[:, pixels.std(0) > 0.05]
    count = pixels.shape[1]
    kind = "labels, white on 40 % of the examples" if labels else "numbers"
    if labels:
        pixels = (pixels > 0.5).astype("int32")
    return Mix(
        {"digit": 10, "below": lp.MultiLabel(count) if labels else lp.Regression(count)},
        f"upper halves of handwritten digits; the digit, and {count} pixels below as {kind}",
        divided((x[:, :32], {"digit": y, "below": pixels}), 1000, 397),
        network(32), 30, 32, (1e-3, 3e-3, 1e-2),
    )  # fmt: skip


def below_labels(data_dir: str | None) -> Mix:
    return below(data_dir, labels=True)


MIXES = {"rare": rare, "trec": trec, "clinc_oos": clinc, "digits": digits,
         "below, numbers": below, "below, labels": below_labels}  # fmt: skip


# Learning


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

    for task in mix.tasks:
        run = sweep(name, mix, journal, ALONE, [task], seeds, alone)
        best[task] = run["val"][task]
    for way in ways(mix):
        sweep(name, mix, journal, way, list(mix.tasks), seeds, together)


def ways(mix: Mix) -> list[str]:
    """Without `MultiLabel` the default is the plain sum."""
    same = set(mix.counts().values()) == {1}
    return [PLAIN, CONSTANTS] if same else [PLAIN, DEFAULT, CONSTANTS]


def balancing(mix: Mix, way: str) -> str | dict[str, float]:
    """Returns the argument of `lp.multitask_model`."""
    if way != CONSTANTS:
        return {PLAIN: "sum", DEFAULT: "equal"}[way]
    y = mix.parts[0][1]
    return {
        name: 1 / (constant_loss(as_task(task), y[name]) * as_task(task).label_count)
        for name, task in mix.tasks.items()
    }


def constant_loss(task: Task, y: np.ndarray) -> float:
    """The mean loss of the best prediction that is the same for all examples."""
    if isinstance(task, lp.Regression):
        return 1.0  # squares in units of the deviation
    if isinstance(task, lp.MultiLabel):
        known = y >= 0
        share = (y * known).sum(0) / known.sum(0)
        return float(np.average(entr(share) + entr(1 - share), weights=known.sum(0)))
    return float(entr(np.bincount(y[y >= 0]) / (y >= 0).sum()).sum())


def sign(mix: Mix, task: str) -> int:
    return -1 if isinstance(as_task(mix.tasks[task]), lp.Regression) else 1


def sweep(
    name: str,
    mix: Mix,
    journal: Journal,
    way: str,
    tasks: list[str],
    seeds: int,
    score: Callable[[Run], float],
) -> Run:
    """Learns with all rates and the first seed, then with the best rate and the others."""
    models: list[keras.Model] = []

    def learned(seed: int, rate: float) -> Run:
        key = {"mix": name, "way": way, "tasks": tasks, "seed": seed, "rate": rate}
        return journal.run(lambda: learn(models, mix, way, tasks, seed, rate), **key)

    best = max((learned(0, rate) for rate in mix.rates), key=score)
    for run in [learned(seed, best["rate"]) for seed in range(seeds)]:
        run["chosen"] = True
    print(f"{name}, {way}, {', '.join(tasks)}: rate {best['rate']:g}, {best['test']}", flush=True)
    return best


def learn(
    models: list[keras.Model], mix: Mix, way: str, tasks: list[str], seed: int, rate: float
) -> Run:
    """Learns once; the model is built with the first run and used again for the others."""

    def build() -> keras.Model:
        options = {"pretrained": False, "pooling": None}
        if way == ALONE:
            task = mix.tasks[tasks[0]]
            return lp.transfer_model(mix.network(), task, trainable="all", **options)
        return lp.multitask_model(
            mix.network(), mix.tasks, balancing=balancing(mix, way), **options
        )

    x, y = mix.parts[0]
    if not models:
        models.append(build())
        models[0].steps_per_execution = -(-len(x) // mix.batch)
    (model,) = models
    restart(model, build, seed)
    start = time.perf_counter()
    falling = keras.callbacks.LearningRateScheduler(lambda i: cosine(rate, i / mix.epochs))
    y = y[tasks[0]] if way == ALONE else y
    model.fit(x, y, batch_size=mix.batch, epochs=mix.epochs, callbacks=[falling], verbose=0)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "val": metrics(model, mix, mix.parts[1], tasks),
        "test": metrics(model, mix, mix.parts[2], tasks),
    }


def metric(task: TaskLike) -> str:
    return as_task(task).make_metrics()[0].name


def metrics(model: keras.Model, mix: Mix, part: Part, tasks: list[str]) -> dict[str, float]:
    """The first metric of each task."""
    x, y = part
    alone = len(tasks) == 1
    logs = model.evaluate(
        x, y[tasks[0]] if alone else y, batch_size=500, verbose=0, return_dict=True
    )
    return {
        task: round(float(logs[("" if alone else f"{task}_") + metric(mix.tasks[task])]), 5)
        for task in tasks
    }


# Results


def scores(runs: list[Run], name: str, way: str, task: str) -> np.ndarray:
    """On test examples, by seed."""
    of = [run for run in runs if run.get("chosen") and (run["mix"], run["way"]) == (name, way)]
    of = sorted((run for run in of if task in run["tasks"]), key=lambda run: run["seed"])
    return np.array([run["test"][task] for run in of])


def rows_of(runs: list[Run], name: str, mix: Mix) -> list[list[str]]:
    rows = []
    for task, kind in mix.tasks.items():
        alone = scores(runs, name, ALONE, task)
        row = [name, task, metric(kind), str(mix.counts()[task]), shown(alone)]
        for way in (PLAIN, DEFAULT, CONSTANTS):
            found = scores(runs, name, way if way in ways(mix) else PLAIN, task)
            gain = sign(mix, task) * (found - alone)
            noise = max(spread(alone), spread(found))
            loses = "yes" if gain.mean() < -noise else "no"
            row += [shown(found), f"{loses}; {verdict(gain)}"]
        rows.append(row)
    return rows


def shown(found: np.ndarray) -> str:
    return f"{found.mean():.4f} ± {spread(found):.4f}"


def report(runs: list[Run], mixes: dict[str, Mix], seeds: int, out: Path) -> None:
    header = ["mix", "task", "metric", "counts", ALONE]
    for way in (PLAIN, DEFAULT, CONSTANTS):
        header += [way, "loses"]
    rows = [row for name, mix in mixes.items() for row in rows_of(runs, name, mix)]
    rates = []
    for name, mix in mixes.items():
        of = [run for run in runs if run["mix"] == name and run.get("chosen")]
        found = {(run["way"], *run["tasks"]): run["rate"] for run in of}
        alone = ", ".join(f"{task} {found[ALONE, task]:g}" for task in mix.tasks)
        rate = {way: f"{found[way, *mix.tasks]:g}" for way in ways(mix)}
        rate.setdefault(DEFAULT, rate[PLAIN])
        rates.append([name, mix.what, alone, rate[PLAIN], rate[DEFAULT], rate[CONSTANTS]])
    mean = sum(run["seconds"] for run in runs) / len(runs)
    command = f"python benchmarks/{NAME}.py --seeds {seeds}"
    blocks = [
        "# Losses that can be added up",
        f"    {command}",
        f"Machine: {machine('scikit-learn')}. {len(runs)} trainings of {mean:.0f} s on the mean "
        "(the machine was busy with other work).",
        f"Test metric, mean and standard deviation over {seeds} seeds; of `mae` less is better. "
        "Counts: how often the mean loss counts in the default sum. Where that is 1 for all tasks "
        "of a mix, the default is the plain sum. By constants: each loss divided by that of the "
        "best constant prediction. Loses: whether the mean is worse than alone by "
        "more than the seeds' deviation (the larger of the two); then, seed by seed, whether zero "
        "is outside the 95 % interval of the mean difference (Student's t).",
        table(header, rows),
        "## How",
        table(["mix", "what", "rate alone", PLAIN, DEFAULT, CONSTANTS], rates),
        "All models of a mix have the same batches of the same examples, with Adam, the rate "
        "falling to zero along a cosine. It is one of three, the best with the first seed on "
        "validation examples. Networks, from scratch: one dense layer of 64; for texts the mean of "
        "embeddings (32 wide) and a dense layer of 128.",
    ]
    numbers = {"command": command, "machine": machine("scikit-learn"), "runs": runs}
    write(out / NAME, "\n\n".join(blocks), numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mix", choices=MIXES, help="learn this one, write no report")
    parser.add_argument("--data-dir", help="where TFDS keeps its data (else TFDS_DATA_DIR)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    # The networks are small: one thread is as fast, and two studies can run beside each other.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    runs, mixes = [], {}
    for name in [arguments.mix] if arguments.mix else MIXES:
        mix = mixes[name] = MIXES[name](arguments.data_dir)
        settings = {"rates": list(mix.rates), "epochs": mix.epochs, "batch": mix.batch}
        journal = Journal(
            arguments.out / "partial" / f"{NAME}_{name.replace(', ', '_')}.json", settings
        )
        study(name, mix, journal, arguments.seeds)
        runs += journal.runs
    if not arguments.mix:
        report(runs, mixes, arguments.seeds, arguments.out)


if __name__ == "__main__":
    main()
