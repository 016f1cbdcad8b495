r"""Which way of fine-tuning gives the best network? Six of them with the same budget.

    TFDS_DATA_DIR=... python benchmarks/finetune_quality.py \
        --weights mobilenet_2_5_224_tf_no_top.h5 --cifar10 cifar10_subset.npz

MobileNet with alpha 0.25 and ImageNet weights, pictures enlarged to 96 by 96: cifar10_subset with
1,000 and 8,000 pictures, pneumonia_mnist with 200 and 1,000. All ways get the same pictures,
batches of 40 and number of steps, and AdamW (weight decay 1e-4), whose rate rises over the first
tenth of the steps and falls to zero along a cosine. Nothing is augmented; in the loss each class
counts the same.

- head only.
- top 4 blocks; all, one rate; all, layer decay 0.7: the head alone for a fifth of the steps at
  0.003, then what is fine-tuned, with a warm-up and a cosine of its own.
- gradual unfreezing: the head from the start, and a block more at each of 25 stages, so that all 14
  learn from the 15th on.
- from scratch: BatchNormalization learns too, with a momentum of 0.9; elsewhere it is frozen.

The rate is chosen on validation pictures with the first seed: one of four for one rate and for
layer decay, one of three for the others. Of the 8,000 training pictures of cifar10_subset 1,000 are
for validation, always the same, and 7,000 for training. A seed changes the training pictures (drawn
at random, each class in its share), the initial head and the order. The test split chooses nothing.

What was forgotten: networks that learned cifar10_subset learn pneumonia_mnist; then their head for
cifar10_subset is tested again, on pictures of 32 by 32.

Two checks of why: a gentler layer decay on pneumonia_mnist, chosen and tested in the same way, and
a lower rate for all layers on cifar10_subset, on validation pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from lib import study
from lib.arguments import command, parser
from lib.finetuning import BATCH, LAYERED, ONE, OTHER, RATES, STAGES, WAYS, approaches
from lib.journal import Journal, Run
from lib.machine import machine
from lib.plots import BLUE, ORANGE, dots, panels
from lib.problems import CIFAR, XRAY, cifar10_problem, draw, xray_problem
from lib.results import page, table, write
from lib.scores import VERDICTS, deviation, mean_and_deviation, select, unique
from lib.study import Approach, Case, difference, learn, scores_of

CASES = [
    Case(CIFAR, 1000, "accuracy", f"{CIFAR}, 1,000"),
    Case(CIFAR, 7000, "accuracy", f"{CIFAR}, 8,000"),
    Case(XRAY, 200, "balanced_accuracy", f"{XRAY}, 200"),
    Case(XRAY, 1000, "balanced_accuracy", f"{XRAY}, 1,000"),
]
CIFARS, XRAYS = CASES[:2], CASES[2:]
AUC = [dataclasses.replace(case, metric="auc") for case in XRAYS]
STEPS = {(CIFAR, 1000): 150, (CIFAR, 7000): 250, (XRAY, 200): 125, (XRAY, 1000): 125}
SOURCE, TARGET = CASES[1], CASES[3]  # of what is forgotten
FORGETTING_SEEDS = 3
COMPARED = (ONE, OTHER, LAYERED)


class Study:
    """The problems, the ways and the runs so far."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.problems = {
            CIFAR: cifar10_problem(given.cifar10),
            XRAY: xray_problem(given.data_dir),
        }
        self.approaches = approaches(given.weights)
        self.seeds, self.shorten = given.seeds, given.shorten
        self.journal = Journal(given.out / "finetune_quality.partial.json")

    def run(self) -> dict[str, list[Run]]:
        """Returns the runs of the study, those of the checks, and those of what is forgotten."""
        runs = [run for case in CASES for name in WAYS for run in self.sweep(case, name)]
        checks = [run for case in XRAYS for run in self.sweep(case, OTHER)]
        lowest = functools.partial(self.learned, approach=self.approaches[ONE], rate=RATES[0])
        checks += [lowest(case, seed=seed) for case in CIFARS for seed in range(self.seeds)]
        rates = {way: TARGET.of(runs, approach=way, chosen=True)[0]["rate"] for way in WAYS[:-1]}
        ways = [*rates.items(), (ONE, rates[LAYERED])]  # the last: only the decay differs
        rate = SOURCE.of(runs, approach=ONE, chosen=True)[0]["rate"]
        seeds = range(min(self.seeds, FORGETTING_SEEDS))
        forgotten = [run for seed in seeds for run in self.forgotten(seed, rate, ways)]
        return {"runs": runs, "checks": checks, "forgotten": forgotten}

    def sweep(self, case: Case, name: str) -> list[Run]:
        approach = self.approaches[name]
        learned = functools.partial(self.learned, case, approach)
        return study.sweep(learned, approach.rates, self.seeds)

    def learned(self, case: Case, approach: Approach, seed: int, rate: float) -> Run:
        steps, problem = steps_of(case, self.shorten), self.problems[case.problem]
        work = functools.partial(learn, problem, approach, case.examples, seed, rate, steps=steps)
        key = {"problem": case.problem, "approach": approach.name, "examples": case.examples}
        return self.journal.run(work, **key, seed=seed, rate=rate, steps=steps)

    def forgotten(self, seed: int, source_rate: float, ways: list[tuple[str, float]]) -> list[Run]:
        """Tests what each way forgets of the source task, at a rate: one seed."""
        source, target = self.problems[SOURCE.problem], self.problems[TARGET.problem]
        steps = steps_of(TARGET, self.shorten)

        @functools.cache
        def taught() -> tuple[keras.Model, list[np.ndarray]]:
            (x, y), _ = draw(source.train, SOURCE.examples, seed)
            keras.utils.set_random_seed(seed)
            longer = steps_of(SOURCE, self.shorten)
            model = self.approaches[ONE].fit(x, y, source_rate, steps=longer)
            return model, model.get_weights()

        def run(name: str, rate: float) -> Run:
            model, weights = taught()
            model.set_weights(weights)
            before = scores_of(model, source.test)["accuracy"]
            # The two models share the backbone, so training the new one changes the old one.
            way = approaches(model)[name]
            new = learn(target, way, TARGET.examples, seed, rate, steps=steps)
            return {**new, "before": before, "after": scores_of(model, source.test)["accuracy"]}

        runs = []
        for name, rate in ways:
            key = {"source": source.name, "approach": name, "seed": seed, "rate": rate}
            key |= {"source rate": source_rate, "steps": steps}
            runs.append(self.journal.run(functools.partial(run, name, rate), **key))
        return runs


def steps_of(case: Case, shorten: int) -> int:
    return STAGES * max(1, STEPS[case.problem, case.examples] // STAGES // shorten)


# Results


def decay_table(runs: list[Run]) -> str:
    """Returns layer decay minus one rate, and whether the goal was reached."""
    found = [(case.chosen(runs, LAYERED), case.chosen(runs, ONE)) for case in CASES]
    good = sum(layered.mean() >= one.mean() - deviation(one) for layered, one in found)
    better = sum(layered.mean() > one.mean() for layered, one in found)
    reached = good == len(CASES) and better > len(CASES) / 2
    return (
        f"{study.seed_table(runs, [*CASES, *AUC], LAYERED, ONE, 'one rate')}\n\n"
        "Goal: layer decay at least as good as one rate in every case within one deviation, and "
        f"better in most, by accuracy and balanced accuracy. At least as good: {good} of "
        f"{len(CASES)}. Better in the mean: {better} of {len(CASES)}. "
        f"{'Reached.' if reached else 'Not reached.'}"
    )


def gentler_table(runs: list[Run]) -> str:
    """Returns the gentler decay minus one rate and minus the stronger decay."""
    rows = [
        [case.label, *difference(runs, OTHER, ONE, case), *difference(runs, OTHER, LAYERED, case)]
        for case in XRAYS
    ]
    return table([f"{OTHER} minus", ONE, "verdict", LAYERED, "verdict"], rows)


def forgotten_table(forgotten: list[Run]) -> str:
    rows = []
    for name, rate in unique(forgotten, "approach", "rate"):
        of = select(forgotten, approach=name, rate=rate)
        before, after = (np.array([100 * run[key] for run in of]) for key in ("before", "after"))
        new = [100 * run["test"]["balanced_accuracy"] for run in of]
        shown = [mean_and_deviation(found) for found in (before, after, after - before, new)]
        rows.append([name, f"{rate:g}", *shown])
    header = ["rate", "before", "after", "change", f"{XRAY}: balanced accuracy, %"]
    return table([f"{CIFAR}: accuracy, %", *header], rows)


def report(results: dict[str, Any]) -> str:
    runs, checks, forgotten = (results[key] for key in ("runs", "checks", "forgotten"))
    known = [*runs, *checks]
    minutes = sum(run["seconds"] for run in [*known, *forgotten]) / 60
    compared = [run for run in known if run["approach"] in COMPARED and "chosen" in run]
    return page(
        "Ways of fine-tuning",
        results["command"],
        results["machine"],
        __doc__,
        f"The trainings took {minutes:.0f} minutes. Steps: "
        f"{', '.join(f'{label}: {count}' for label, count in results['steps'].items())}. Mean and "
        f"standard deviation over {len(unique(runs, 'seed'))} seeds, on the whole test split:",
        study.score_table(runs, "test, %", CASES),
        study.score_table(runs, "test AUC", AUC),
        "![Every seed, mean and standard deviation](finetune_quality.png)",
        "## Layer decay against one rate",
        f"Layer decay minus one rate, seed by seed. {VERDICTS}",
        decay_table(runs),
        "## Why",
        f"A gentler decay on {XRAY}:",
        study.score_table(compared, "test, %", XRAYS),
        gentler_table(compared),
        "What each rate gave on validation pictures:",
        study.tuning_table(known, CASES, COMPARED, RATES),
        f"A lower rate on {CIFAR}, with every seed, compared with what was chosen:",
        study.validation_table(known, list(itertools.product(CIFARS, (ONE, LAYERED), RATES))),
        "## What was forgotten",
        f"After {TARGET.label} pictures, each way at its rate from above, one rate also at that of "
        f"layer decay; {len(unique(forgotten, 'seed'))} seeds, each with a network of its own:",
        forgotten_table(forgotten),
        "## Rates",
        study.rate_table(runs, "rate", CASES),
        "Seconds: median, of one training, with building the model. Chosen at an end of the rates "
        f"that were tried, so one beyond may be better: {study.at_an_end(runs, CASES)}.",
    )


def plot(runs: list[Run], path: Path) -> None:
    colours = {ONE: ORANGE, LAYERED: BLUE}
    with panels(path, 2, rows=2, size=(9.5, 6.4), sharey=True) as axes:
        for axis, case in zip(axes, CASES, strict=True):
            found = {name: case.chosen(runs, name) for name in unique(runs, "approach")}
            labels = {"title": f"{case.label} pictures", "xlabel": f"test {case.measure}"}
            dots(axis, found, colours, **labels)
        axes[0].invert_yaxis()


def main() -> None:
    arguments = parser(__doc__, seeds=5, data_dir=True)
    arguments.add_argument("--weights", type=Path, required=True, help="h5, MobileNet 0.25, no top")
    arguments.add_argument("--cifar10", type=Path, required=True, help="npz of cifar10_subset")
    arguments.add_argument("--shorten", type=int, default=1, help="divides the steps: a quick look")
    given = arguments.parse_args()
    tf.get_logger().setLevel("ERROR")
    found = Study(given).run()
    results = {
        "command": command(__file__, given, "weights", "cifar10", "seeds"),
        "machine": machine("scikit-learn"),
        "batch": BATCH,
        "steps": {case.label: steps_of(case, given.shorten) for case in CASES},
        **found,
    }
    write(given.out / "finetune_quality", report(results), results)
    plot(found["runs"], given.out / "finetune_quality.png")


if __name__ == "__main__":
    main()
