"""Which way of fine-tuning gives the best network? Six of them with the same budget.

    TFDS_DATA_DIR=... python benchmarks/finetune_quality.py \\
        --weights mobilenet_2_5_224_tf_no_top.h5 --cifar10 cifar10_subset.npz

MobileNet with alpha 0.25 and ImageNet weights, pictures enlarged to 96 by 96: cifar10_subset with
1,000 and 8,000 pictures, pneumonia_mnist with 200 and 1,000. The ways: the head only; the top
blocks; all layers at one rate; all layers with layer decay; gradual unfreezing; from scratch.

All of them get the same pictures, batches and number of steps, and AdamW with a warm-up and a
cosine. The rate is chosen on validation pictures with the first seed: one of four for one rate and
for layer decay, of three for the others. A seed changes the training pictures (where there are more
than are used), the initial head and the order. A test split never chooses anything.

What was forgotten: networks that learned cifar10_subset go on to pneumonia_mnist; then the head
for cifar10_subset is asked again.

Runs are added to a log as they come, and one that is in the log is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table, write
from finetune_ways import (
    BATCH,
    HEAD_RATE,
    LAYERED,
    ONE,
    RATES,
    SCRATCH,
    SIZE,
    STAGES,
    TOP,
    approaches,
)
from studies import (
    METRICS,
    Case,
    Problem,
    Run,
    difference,
    draw,
    learn,
    mean_and_spread,
    rate_table,
    score_table,
    scores,
    spread,
    sweep,
    unique,
    values,
    xray_problem,
)

tf.get_logger().setLevel("ERROR")

CIFAR, XRAY = "cifar10_subset", "pneumonia_mnist"
HELD_OUT = 1000  # pictures of cifar10_subset that choose the rate
CASES = [
    Case(CIFAR, 1000, "accuracy", f"{CIFAR}, 1,000"),
    Case(CIFAR, 7000, "accuracy", f"{CIFAR}, 8,000"),
    Case(XRAY, 200, "balanced_accuracy", f"{XRAY}, 200"),
    Case(XRAY, 1000, "balanced_accuracy", f"{XRAY}, 1,000"),
]
AUC = [dataclasses.replace(case, metric="auc") for case in CASES if case.problem == XRAY]
STEPS = {(CIFAR, 1000): 150, (CIFAR, 7000): 250, (XRAY, 200): 125, (XRAY, 1000): 125}
SOURCE, TARGET = CASES[1], CASES[3]  # of what is forgotten
FORGETTING_SEEDS = 3


def cifar_problem(path: Path) -> Problem:
    """Of the training pictures 1,000 choose the rate, always the same; the others are learned."""
    with np.load(path) as file:
        train, test = (
            (file[f"{split}_images"], file[f"{split}_labels"].astype("int64"))
            for split in ("train", "test")
        )
        names = [str(name) for name in file["names"]]
    val, train = draw(train, HELD_OUT, seed=0)
    return Problem(CIFAR, names, train, val, test)


# Running


def steps_of(case: Case, shorten: int) -> int:
    stage = STEPS[case.problem, case.examples] // STAGES
    return STAGES * max(1, stage // shorten)


class Study:
    """The problems and ways, and the log of the runs; each process has one."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.problems = {
            CIFAR: cifar_problem(arguments.cifar10),
            XRAY: xray_problem(arguments.data_dir),
        }
        self.approaches = approaches(arguments.weights)
        self.seeds = arguments.seeds
        self.shorten = arguments.shorten
        self.log = arguments.log

    def sweep(self, case: Case, name: str) -> list[Run]:
        learned = functools.partial(self.learned, case, name)
        return sweep(learned, self.approaches[name].rates, self.seeds)

    def learned(self, case: Case, name: str, seed: int, rate: float) -> Run:
        problem, approach = self.problems[case.problem], self.approaches[name]
        steps = steps_of(case, self.shorten)
        key = {
            "problem": problem.name,
            "approach": name,
            "examples": case.examples,
            "seed": seed,
            "rate": rate,
            "steps": steps,
        }
        return once(
            self.log,
            key,
            lambda: learn(problem, approach, case.examples, seed, rate, steps=steps),
        )

    def forgotten(self, seed: int, source_rate: float, rates: dict[str, float]) -> list[Run]:
        """What each way forgets of the source task, at its rate: one seed."""
        source, target = self.problems[SOURCE.problem], self.problems[TARGET.problem]
        steps = steps_of(TARGET, self.shorten)

        @functools.cache
        def taught() -> tuple[keras.Model, list[np.ndarray]]:
            (x, y), _ = draw(source.train, SOURCE.examples, seed)
            keras.utils.set_random_seed(seed)
            model = self.approaches[ONE].fit(
                x, y, source_rate, steps=steps_of(SOURCE, self.shorten)
            )
            return model, model.get_weights()

        def run(name: str, rate: float) -> Run:
            model, weights = taught()
            model.set_weights(weights)
            before = scores(model, source.test)["accuracy"]
            # The backbone is shared: what moves in the new model has moved in the old one.
            way = approaches(model)[name]
            new = learn(target, way, TARGET.examples, seed, rate, steps=steps)
            return {**new, "before": before, "after": scores(model, source.test)["accuracy"]}

        runs = []
        for name, rate in rates.items():
            key = {"source": source.name, "approach": name, "seed": seed, "rate": rate}
            key |= {"source rate": source_rate, "steps": steps}
            runs.append(once(self.log, key, functools.partial(run, name, rate)))
            before, after = runs[-1]["before"], runs[-1]["after"]
            print(f"forgotten by {name:<22} {100 * before:.1f} to {100 * after:.1f} %", flush=True)
        return runs


def once(log: Path, key: Run, run: Callable[[], Run]) -> Run:
    """The run of the log that has these values, else a new one, which is added."""
    lines = log.read_text().splitlines() if log.exists() else []
    known = [found for found in map(json.loads, lines) if key.items() <= found.items()]
    if known:
        return known[0]
    new = {**run(), **key}
    with log.open("a") as file:
        file.write(json.dumps(new) + "\n")
    return new


def prepare(arguments: argparse.Namespace) -> None:
    """Begins a process; of several each computes with one thread."""
    global STUDY
    if arguments.jobs > 1:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    STUDY = Study(arguments)


def do(method: str, *task: Any) -> list[Run]:
    return getattr(STUDY, method)(*task)


def run_all(arguments: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """The runs of the study, and those of what is forgotten."""
    names = list(approaches(arguments.weights))
    context = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
    with context.Pool(arguments.jobs, prepare, [arguments]) as pool:
        # The longest come first, so that the processes end together.
        tasks = [("sweep", case, name) for case in CASES for name in names]
        tasks.sort(key=lambda task: -STEPS[task[1].problem, task[1].examples])
        runs = joined(pool.starmap(do, tasks, chunksize=1))
        source_rate = chosen_rates(runs, SOURCE)[ONE]
        rates = chosen_rates(runs, TARGET)
        del rates[SCRATCH]
        seeds = range(min(arguments.seeds, FORGETTING_SEEDS))
        tasks = [("forgotten", seed, source_rate, rates) for seed in seeds]
        return runs, joined(pool.starmap(do, tasks, chunksize=1))


def joined(parts: Sequence[list[Run]]) -> list[Run]:
    return [run for part in parts for run in part]


def chosen_rates(runs: list[Run], case: Case) -> dict[str, float]:
    """By way."""
    return {
        run["approach"]: run["rate"]
        for run in runs
        if run["chosen"] and (run["problem"], run["examples"]) == (case.problem, case.examples)
    }


# Results


def decay_table(runs: list[Run]) -> str:
    """Layer decay minus one rate, and whether the goal was reached."""
    rows, good, better = [], 0, 0
    for case in [*CASES, *AUC]:
        one, layered = (values(runs, name, case) for name in (ONE, LAYERED))
        mean, word = difference(runs, LAYERED, ONE, case)
        digits = METRICS[case.metric][2]
        by_seed = ", ".join(f"{change:+.{digits}f}" for change in layered - one)
        rows.append([case.label, case.measure, mean, by_seed, f"{spread(one):.{digits}f}", word])
        if case in CASES:
            good += layered.mean() >= one.mean() - spread(one)
            better += layered.mean() > one.mean()
    header = ["", "measure", "difference", "by seed", "deviation of one rate", "verdict"]
    reached = good == len(CASES) and better > len(CASES) / 2
    return (
        f"{table(header, rows)}\n\n"
        "Goal: layer decay at least as good as one rate in every case within one deviation, and "
        f"better in most, by accuracy and balanced accuracy. At least as good: {good} of "
        f"{len(CASES)}. Better in the mean: {better} of {len(CASES)}. "
        f"{'Reached.' if reached else 'Not reached.'}"
    )


def tuning_table(runs: list[Run]) -> str:
    """What the rates gave on the validation pictures."""
    rows = []
    for name in unique(runs, "approach"):
        for case in CASES:
            wanted = (case.problem, name, case.examples, 0)
            found = {
                run["rate"]: f"{100 * run['val'][case.metric]:.1f}"
                for run in runs
                if (run["problem"], run["approach"], run["examples"], run["seed"]) == wanted
            }
            rows.append([name, case.label, *(found.get(rate, "") for rate in RATES)])
    return table(["validation, first seed, %", "", *(f"{rate:g}" for rate in RATES)], rows)


def forgotten_table(forgotten: list[Run]) -> str:
    rows = []
    for name in unique(forgotten, "approach"):
        of = [run for run in forgotten if run["approach"] == name]
        before, after = (np.array([100 * run[key] for run in of]) for key in ("before", "after"))
        new = np.array([100 * run["test"]["balanced_accuracy"] for run in of])
        shown = [mean_and_spread(found, "accuracy") for found in (before, after, after - before)]
        rows.append([name, *shown, mean_and_spread(new, "balanced_accuracy")])
    header = ["", "before", "after", "change", f"{XRAY}: balanced accuracy, %"]
    return table([f"{CIFAR}: accuracy, %", *header[1:]], rows)


def plot(runs: list[Run], path: Path) -> None:
    """Draws a panel for each case: every seed, the mean and the standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = unique(runs, "approach")
    colours = {ONE: "#e8710a", LAYERED: "#1a73e8"}
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.4), sharey=True, layout="constrained")
    for axis, case in zip(axes.flat, CASES, strict=True):
        for i, name in enumerate(names):
            found = values(runs, name, case)
            colour = colours.get(name, "#5f6368")
            axis.plot(found, [i] * len(found), "o", color=colour, alpha=0.35, markersize=4)
            axis.errorbar(found.mean(), i, xerr=spread(found), color=colour, fmt="D", capsize=4)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=f"{case.label} pictures", xlabel=f"test {case.measure}")
        axis.grid(alpha=0.25, axis="x")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"Plot: {path}")


def markdown(results: dict[str, Any]) -> str:
    runs, forgotten = results["runs"], results["forgotten"]
    seeds, asked = (len(unique(part, "seed")) for part in (runs, forgotten))
    minutes = sum(run["seconds"] for run in [*runs, *forgotten]) / 60
    steps = ", ".join(f"{case.label}: {results['steps'][case.label]}" for case in CASES)
    blocks = [
        "# Ways of fine-tuning",
        f"    {results['command']}",
        f"Machine: {results['machine']}, shared with other work. The trainings took {minutes:.0f} "
        f"minutes together, {results['jobs']} at a time.",
        f"MobileNet (alpha 0.25, {SIZE} by {SIZE} pixels) with ImageNet weights. Accuracy on "
        f"{CIFAR} (ten classes, 2,000 test pictures) and balanced accuracy on {XRAY} (normal or "
        "pneumonia, 624 test pictures), by the number of training pictures.",
        score_table(runs, "test, %", CASES),
        score_table(runs, "test AUC", AUC),
        f"Mean and standard deviation over {seeds} seeds, on the whole test split.",
        "![Every seed, mean and standard deviation](finetune_quality.png)",
        "## Layer decay against one rate",
        'Layer decay minus one rate, seed by seed. "Better" and "worse": zero is outside the 95 % '
        "interval (Student's t) of the mean over the seeds. That covers the seeds; all of them "
        "share the test pictures.",
        decay_table(runs),
        "## What was forgotten",
        f"Networks that learned {CIFAR} (all, one rate; {SOURCE.label} pictures) went on to "
        f"{TARGET.label} pictures in each way, at its rate from above. Then their old head was "
        f"asked again: {asked} seeds, each with a network of its own. The X-rays come in the size "
        "of the source, 32 by 32, before they are enlarged.",
        forgotten_table(forgotten),
        "## How",
        HOW.format(steps=steps),
        rate_table(runs, "rate", CASES),
        "Seconds: median, of one training, with building the model.",
        tuning_table(runs),
    ]
    return "\n\n".join(blocks)


HOW = (
    f"Every way gets the same pictures, batches of {BATCH} and as many steps ({{steps}}), with "
    "AdamW (weight decay 1e-4), whose rate rises over the first tenth of the steps and falls to "
    "zero along a cosine. Nothing is augmented; in the loss each class counts the same. A seed "
    "changes the training pictures (drawn at random, each class in its share), the head and the "
    f'order. "{TOP}", "{ONE}" and "{LAYERED}" first train the head alone for a fifth of these '
    f"steps, at {HEAD_RATE:g}, and differ only in what learns at which rate afterwards, with a "
    "warm-up and a cosine of its own. Gradual unfreezing is one `fit` at one rate: the head from "
    f"the start, and a block more at each of {STAGES} stages (Keras epochs of a {STAGES}th of the "
    "steps), so that all 14 move from the 15th on. From scratch, BatchNormalization learns too, "
    "with a momentum of 0.9; elsewhere it stays as it is.\n\n"
    f"The rate is chosen with the first seed on validation pictures, never on the test split: one "
    f"of four for one rate and for layer decay, one of three for the others. With {CIFAR}, "
    f"{HELD_OUT:,} of the 8,000 training pictures choose the rate, always the same, and the "
    'others are learned from: "8,000" is 7,000 and these. With 1,000 they come on top. With '
    f"{XRAY} the 524 of the split `val` choose."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="h5, MobileNet 0.25, no top")
    parser.add_argument("--cifar10", type=Path, required=True, help="npz of cifar10_subset")
    parser.add_argument("--data-dir", help="where TFDS keeps its data (else TFDS_DATA_DIR)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--shorten", type=int, default=1, help="divides the steps: a quick look")
    parser.add_argument("--log", type=Path, default=Path("runs/finetune_quality.jsonl"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    arguments.log.parent.mkdir(parents=True, exist_ok=True)

    runs, forgotten = run_all(arguments)
    names = f"--weights {arguments.weights.name} --cifar10 {arguments.cifar10.name}"
    results = {
        "command": f"python benchmarks/finetune_quality.py {names} --seeds {arguments.seeds}",
        "machine": machine("scikit-learn"),
        "jobs": arguments.jobs,
        "batch": BATCH,
        "steps": {case.label: steps_of(case, arguments.shorten) for case in CASES},
        "runs": runs,
        "forgotten": forgotten,
    }
    write(arguments.out / "finetune_quality", markdown(results), results)
    plot(runs, arguments.out / "finetune_quality.png")


if __name__ == "__main__":
    main()
