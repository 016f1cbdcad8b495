"""Which way of fine-tuning gives the best network? Six of them with the same budget.

    TFDS_DATA_DIR=... python benchmarks/finetune_quality.py \\
        --weights mobilenet_2_5_224_tf_no_top.h5 --cifar10 cifar10_subset.npz

MobileNet with alpha 0.25 and ImageNet weights, pictures enlarged to 96 by 96: cifar10_subset with
1,000 and 8,000 pictures, pneumonia_mnist with 200 and 1,000. The ways: the head only; the top
blocks; all layers at one rate; all layers with layer decay; gradual unfreezing; from scratch.

All of them get the same pictures, batches and number of steps, and AdamW with a warm-up and a
cosine. The rate is chosen on validation pictures with the first seed: one of four for one rate and
for layer decay, one of three for the others. A seed changes the training pictures (where there are
more than are used), the initial head and the order. A test split never chooses anything.

What was forgotten: networks that learned cifar10_subset go on to pneumonia_mnist; then the head
for cifar10_subset is asked again.

Two checks of why: a gentler layer decay on pneumonia_mnist, chosen and tested in the same way, and
a lower rate for all layers on cifar10_subset, on validation pictures.

Runs are added to a log as they come, and one that is in the log is not done again.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, write
from finetune_report import markdown, plot
from finetune_ways import (
    BATCH,
    CASES,
    CIFAR,
    FORGETTING_SEEDS,
    HELD_OUT,
    LAYERED,
    ONE,
    OTHER,
    RATES,
    SCRATCH,
    SOURCE,
    STAGES,
    STEPS,
    TARGET,
    XRAY,
    approaches,
    other_decay,
)
from studies import (
    Approach,
    Case,
    Problem,
    Run,
    draw,
    learn,
    scores,
    sweep,
    xray_problem,
)

tf.get_logger().setLevel("ERROR")


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
        self.approaches = {**approaches(arguments.weights), OTHER: other_decay(arguments.weights)}
        self.seeds = arguments.seeds
        self.shorten = arguments.shorten
        self.log = arguments.log

    def sweep(self, case: Case, name: str) -> list[Run]:
        approach = self.approaches[name]
        return sweep(functools.partial(self.learned, case, approach), approach.rates, self.seeds)

    def lower(self, case: Case, seed: int) -> list[Run]:
        """All at one rate again, at the lowest."""
        return [self.learned(case, self.approaches[ONE], seed, RATES[0])]

    def learned(self, case: Case, approach: Approach, seed: int, rate: float) -> Run:
        steps = steps_of(case, self.shorten)
        key = {
            "problem": case.problem,
            "approach": approach.name,
            "examples": case.examples,
            "seed": seed,
            "rate": rate,
            "steps": steps,
        }
        arguments = (self.problems[case.problem], approach, case.examples, seed, rate)
        return once(self.log, key, lambda: learn(*arguments, steps=steps))

    def forgotten(self, seed: int, source_rate: float, ways: list[tuple[str, float]]) -> list[Run]:
        """What each way forgets of the source task, at a rate: one seed."""
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
        for name, rate in ways:
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


def run_all(arguments: argparse.Namespace) -> dict[str, list[Run]]:
    """The runs of the study, those of the checks, and those of what is forgotten."""
    names = list(approaches(arguments.weights))
    context = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
    with context.Pool(arguments.jobs, prepare, [arguments]) as pool:

        def done(tasks: list[tuple[Any, ...]]) -> list[Run]:
            return [run for part in pool.starmap(do, tasks, chunksize=1) for run in part]

        # The longest come first, so that the processes end together.
        cases = sorted(CASES, key=lambda case: -STEPS[case.problem, case.examples])
        runs = done([("sweep", case, name) for case in cases for name in names])
        seeds = range(arguments.seeds)
        checks = done(
            [
                *(("sweep", case, OTHER) for case in CASES[2:]),
                *(("lower", case, seed) for case in CASES[:2] for seed in seeds),
            ]
        )
        source_rate = chosen_rates(runs, SOURCE)[ONE]
        rates = chosen_rates(runs, TARGET)
        del rates[SCRATCH]
        ways = [*rates.items(), (ONE, rates[LAYERED])]  # the last: only the decay differs
        forgotten = done(
            [("forgotten", seed, source_rate, ways) for seed in seeds[:FORGETTING_SEEDS]]
        )
    return {"runs": runs, "checks": checks, "forgotten": forgotten}


def chosen_rates(runs: list[Run], case: Case) -> dict[str, float]:
    """By way."""
    return {
        run["approach"]: run["rate"]
        for run in runs
        if run["chosen"] and (run["problem"], run["examples"]) == (case.problem, case.examples)
    }


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

    found = run_all(arguments)
    names = f"--weights {arguments.weights.name} --cifar10 {arguments.cifar10.name}"
    results = {
        "command": f"python benchmarks/finetune_quality.py {names} --seeds {arguments.seeds}",
        "machine": machine("scikit-learn"),
        "jobs": arguments.jobs,
        "batch": BATCH,
        "steps": {case.label: steps_of(case, arguments.shorten) for case in CASES},
        **found,
    }
    write(arguments.out / "finetune_quality", markdown(results), results)
    plot(found["runs"], arguments.out / "finetune_quality.png")


if __name__ == "__main__":
    main()
