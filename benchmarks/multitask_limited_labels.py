"""Does a second task help a task with few labels?

    TFDS_DATA_DIR=... python benchmarks/multitask_limited_labels.py

Task B has labels on 1, 5, 20 and 100 % of the training texts, task A on all of them. trec: A the
coarse and B the fine type of a question. clinc_oos: A the domain and B the intent of a request.

- single task: a model of B alone; its batches hold labelled texts only.
- multitask: `lp.multitask_model`; batches of all texts, the missing labels -1. The loss of B is
  the mean over the labels present.
- naive mask: the same network in plain Keras; the losses of B, those of missing labels times 0,
  are divided by the batch size.
- multitask, half of each batch labelled: as `lp.mix` of the labelled texts and of all texts does it
  with `temperature=float("inf")`.

All have the same steps and batch size. Learning rate (one of four, with the first seed) and when
to stop are chosen by the accuracy of B on validation texts, for each approach and share. A seed
changes the texts with labels, the initial weights and the order.

Writes tables (Markdown), all runs (JSON) and a plot (PNG). What is done is kept in
`partial/` beside them, so that a run can go on where it ended.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table
from multitask_common import (
    Journal,
    Problem,
    accuracies,
    cosine,
    restart,
    shuffled,
    take,
    text_encoder,
    texts,
)
from studies import Run, mean_and_spread, spread, unique, verdict

import keras_lp as lp

PROBLEMS = ("trec", "clinc_oos")
SHARES = (1, 5, 20, 100)  # % of the training texts
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
BATCH, STEPS, CHECKPOINTS = 64, 100, 6  # steps between two checkpoints
SINGLE, MULTI, NAIVE, HALF = (
    "single task",
    "multitask",
    "naive mask",
    "multitask, half of each batch labelled",
)
APPROACHES = (SINGLE, MULTI, NAIVE, HALF)
NAME = "multitask_limited_labels"


def builder(problem: Problem, approach: str):
    """Returns what builds and compiles the model of an approach."""
    options = {"pretrained": False, "pooling": None}

    def single() -> keras.Model:
        classes = list(problem.classes.values())[1]
        return lp.transfer_model(text_encoder(), classes, trainable="all", **options)

    def multitask() -> keras.Model:
        return lp.multitask_model(text_encoder(), problem.classes, **options)

    def naive() -> keras.Model:
        encoder = text_encoder()
        logits = {
            task: keras.layers.Dense(classes, name=task)(encoder.outputs[0])
            for task, classes in problem.classes.items()
        }
        model = keras.Model(encoder.inputs[0], logits)
        loss = keras.losses.SparseCategoricalCrossentropy  # its mean is over the whole batch
        model.compile("adam", {task: loss(from_logits=True) for task in problem.classes})
        return model

    return {SINGLE: single, NAIVE: naive}.get(approach, multitask)


class Learner:
    """Learns a problem; models are built once and used again for all runs."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.tasks = list(problem.classes)
        self._models: dict = {}

    def __call__(self, approach: str, share: int, seed: int, rate: float) -> dict:
        build = builder(self.problem, approach)
        if build.__name__ not in self._models:
            self._models[build.__name__] = build()
            self._models[build.__name__].steps_per_execution = STEPS
        model = self._models[build.__name__]
        restart(model, build, seed)
        count = len(self.problem.train[0])
        labelled = np.random.default_rng(seed).permutation(count)[: round(count * share / 100)]
        batches = self._batches(approach, labelled, seed)
        start = time.perf_counter()
        wanted = self.tasks[1:] if approach == SINGLE else self.tasks
        curve: list[float] = []  # accuracies of B on the validation texts
        for checkpoint in range(CHECKPOINTS):
            model.optimizer.learning_rate = cosine(rate, checkpoint / CHECKPOINTS)
            index = np.concatenate([next(batches) for _ in range(STEPS)])
            x, y, weights = self._labels(approach, index, labelled)
            model.fit(x, y, sample_weight=weights, batch_size=BATCH, shuffle=False, verbose=0)
            curve.append(accuracies(model, self.problem.val, wanted)[wanted[-1]])
            if curve[-1] > max(curve[:-1], default=-1):
                test = accuracies(model, self.problem.test, wanted)
        return {"seconds": round(time.perf_counter() - start, 1), "val": curve, "test": test}

    def _batches(self, approach: str, labelled: np.ndarray, seed: int):
        """Yields the numbers of the texts of each batch."""
        ours, everything = (
            shuffled(index, seed) for index in (labelled, np.arange(len(self.problem.train[0])))
        )
        of_labelled = {SINGLE: BATCH, HALF: BATCH // 2}.get(approach, 0)
        while True:
            batch = [next(ours) for _ in range(of_labelled)]
            yield np.array(batch + [next(everything) for _ in range(BATCH - of_labelled)])

    def _labels(self, approach: str, index: np.ndarray, labelled: np.ndarray) -> tuple:
        """Returns the texts, their labels, and weights for the naive mask."""
        x, y = take(self.problem.train, index)
        first, second = self.tasks
        known = np.isin(index, labelled)
        if approach == SINGLE:
            return x, y[second], None
        if approach == NAIVE:
            return x, y, {first: np.ones(len(x)), second: known.astype("float32")}
        return x, {first: y[first], second: np.where(known, y[second], -1)}, None


def study(learn: Learner, journal: Journal, seeds: int, approaches: Sequence[str]) -> None:
    for approach in approaches:
        for share in shares_of(approach):
            sweep(learn, journal, approach, share, seeds)


def sweep(learn: Learner, journal: Journal, approach: str, share: int, seeds: int) -> None:
    """Learns with all rates and the first seed, then with the best rate and the others."""
    key = {"problem": learn.problem.name, "approach": approach, "share": share}

    def learned(seed: int, rate: float) -> Run:
        return journal.run(lambda: learn(approach, share, seed, rate), **key, seed=seed, rate=rate)

    tried = [learned(0, rate) for rate in RATES]
    best = max(tried, key=lambda run: max(run["val"]))["rate"]
    for seed in range(1, seeds):
        learned(seed, best)
    found = mean_and_spread(scores(journal.runs, *key.values()), "accuracy")
    print(f"{', '.join(map(str, key.values()))} %: rate {best:g}, {found} %", flush=True)


# Results


def shares_of(approach: str) -> list[int]:
    """With all labels, two of the approaches are the multitask model."""
    return [share for share in SHARES if share < 100 or approach in (SINGLE, MULTI)]


def chosen(runs: list[Run], problem: str, approach: str, share: int) -> list[Run]:
    """The runs with the rate that was chosen, by seed."""
    wanted = (problem, approach, share)
    of = [r for r in runs if (r["problem"], r["approach"], r["share"]) == wanted]
    first = [run for run in of if run["seed"] == 0]
    rate = max(first, key=lambda run: max(run["val"]))["rate"]
    return sorted((run for run in of if run["rate"] == rate), key=lambda run: run["seed"])


def scores(runs: list[Run], problem: str, approach: str, share: int) -> np.ndarray:
    """Test accuracies of B in %, by seed."""
    of = chosen(runs, problem, approach, share)
    return np.array([100 * list(run["test"].values())[-1] for run in of])


def report(runs: list[Run], seeds: int, out: Path, sizes: dict[str, dict]) -> None:
    import json

    blocks = [
        "# A second task, and few labels",
        f"    python benchmarks/{NAME}.py --seeds {seeds}",
        f"Machine: {machine('scikit-learn')}. {len(runs)} trainings of "
        f"{sum(run['seconds'] for run in runs) / len(runs):.0f} s on the mean (the machine was "
        "busy with other work).",
        "Task B has labels on a share of the training texts, task A on all of them. Test accuracy "
        f"of B in %, mean and standard deviation over {seeds} seeds.",
        *(score_table(runs, problem, sizes) for problem in PROBLEMS),
        f"![Accuracy by share of labels]({NAME}.png)",
        "At 100 % no label is missing: the naive mask and the batches of halves are then the "
        "multitask model.",
        "## Against the single-task model",
        "Multitask minus single task, seed by seed. Better and worse: zero is outside the 95 % "
        "interval (Student's t) of the mean over the seeds. That covers the seeds; all of them "
        "share the test texts.",
        *(difference_table(runs, problem, SINGLE) for problem in PROBLEMS),
        "## Against the naive mask",
        *(difference_table(runs, problem, NAIVE) for problem in PROBLEMS),
        "## How",
        f"All approaches: {STEPS * CHECKPOINTS} steps of Adam on batches of {BATCH}, the rate "
        f"falling to zero along a cosine; a checkpoint each {STEPS} steps. The rate is one of "
        f"{', '.join(f'{rate:g}' for rate in RATES)}: the best with the first seed; each run stops "
        "at its best checkpoint; both by the accuracy of B on the validation texts, for each "
        "approach and share. The validation texts all have their labels, also where the training "
        "has few: more than one would have, for every approach alike. Encoder: the mean of "
        "embeddings (32 wide) of words and pairs of words, and a dense layer of 128; the "
        "vocabulary is of the training texts, with or without a label. A batch at 1 % has 0.6 "
        "labels of B on the mean; the single-task model sees 64 in each.",
        *(rate_table(runs, problem) for problem in PROBLEMS),
    ]
    text = "\n\n".join(blocks)
    (out / f"{NAME}.md").write_text(text + "\n")
    content = {"command": f"python benchmarks/{NAME}.py --seeds {seeds}",
               "machine": machine("scikit-learn"), "sizes": sizes, "runs": runs}  # fmt: skip
    (out / f"{NAME}.json").write_text(json.dumps(content) + "\n")
    print(text)


def score_table(runs: list[Run], problem: str, sizes: dict) -> str:
    labels = sizes[problem]["labels"]
    header = [f"{problem}: {sizes[problem]['tasks'][1]}"]
    rows = []
    for approach in unique(runs, "approach"):
        row = [approach]
        for share in SHARES:
            there = share in shares_of(approach)
            row.append(
                mean_and_spread(scores(runs, problem, approach, share), "accuracy") if there else ""
            )
        rows.append(row)
    return table(
        header + [f"{s} %: {n:,} labels" for s, n in zip(SHARES, labels, strict=True)], rows
    )


def difference_table(runs: list[Run], problem: str, baseline: str) -> str:
    approaches = [a for a in (MULTI, NAIVE, HALF) if a != baseline]
    rows = []
    for approach in approaches:
        row = [approach]
        for share in SHARES:
            if share not in shares_of(approach) or share not in shares_of(baseline):
                row.append("")
                continue
            change = scores(runs, problem, approach, share)
            change = change - scores(runs, problem, baseline, share)
            row.append(f"{change.mean():+.1f}, {verdict(change)}")
        rows.append(row)
    return table([f"{problem}, minus {baseline}", *(f"{s} %" for s in SHARES)], rows)


def rate_table(runs: list[Run], problem: str) -> str:
    rows = []
    for approach in unique(runs, "approach"):
        row = [approach]
        for share in SHARES:
            if share not in shares_of(approach):
                row.append("")
                continue
            of = chosen(runs, problem, approach, share)
            stops = [STEPS * (int(np.argmax(run["val"])) + 1) for run in of]
            row.append(f"{of[0]['rate']:g}, {np.median(stops):.0f}")
        rows.append(row)
    return table([f"{problem}: rate, steps (median)", *(f"{s} %" for s in SHARES)], rows)


def plot(runs: list[Run], out: Path, sizes: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = {SINGLE: ("#5f6368", "o-"), MULTI: ("#1a73e8", "s-"), NAIVE: ("#e8710a", "^--"),
              HALF: ("#12a594", "v:")}  # fmt: skip
    figure, axes = plt.subplots(1, len(PROBLEMS), figsize=(9.5, 4), layout="constrained")
    for axis, problem in zip(axes, PROBLEMS, strict=True):
        for approach, (colour, style) in styles.items():
            shares = shares_of(approach)
            found = [scores(runs, problem, approach, share) for share in shares]
            mean = np.array([one.mean() for one in found])
            band = np.array([spread(one) for one in found])
            axis.fill_between(shares, mean - band, mean + band, color=colour, alpha=0.15, lw=0)
            axis.plot(shares, mean, style, color=colour, label=approach, markersize=5)
        axis.set_xscale("log")
        axis.set_xticks(SHARES, [f"{share} %" for share in SHARES])
        axis.minorticks_off()
        first, second = sizes[problem]["tasks"]
        axis.set(title=f"{problem}: {second}, with {first}", xlabel=f"texts with {second} (log)",
                 ylabel=f"test accuracy of {second}, %")  # fmt: skip
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(loc="lower right", fontsize=9)
    figure.savefig(out / f"{NAME}.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, help="learn this one, write no report")
    parser.add_argument("--data-dir", help="where TFDS keeps its data (else TFDS_DATA_DIR)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    # The network is small: one thread is as fast, and two studies can run beside each other.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    runs, sizes = [], {}
    for name in [arguments.problem] if arguments.problem else PROBLEMS:
        problem = texts(name, arguments.data_dir)
        count = len(problem.train[0])
        sizes[name] = {"tasks": list(problem.classes), "train": count,
                       "labels": [round(count * share / 100) for share in SHARES]}  # fmt: skip
        settings = {"rates": list(RATES), "batch": BATCH, "steps": STEPS,
                    "checkpoints": CHECKPOINTS}  # fmt: skip
        journal = Journal(arguments.out / "partial" / f"{NAME}_{name}.json", settings)
        study(Learner(problem), journal, arguments.seeds, APPROACHES)
        runs += journal.runs
    if not arguments.problem:
        report(runs, arguments.seeds, arguments.out, sizes)
        plot(runs, arguments.out, sizes)


if __name__ == "__main__":
    main()
