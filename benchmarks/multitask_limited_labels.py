"""Does a second task help a task with few labels?

    TFDS_DATA_DIR=... python benchmarks/multitask_limited_labels.py

Task B has labels on 1, 5, 20 and 100 % of the training texts, task A on all of them. trec: A is the
coarse and B the fine type of a question. clinc_oos: A is the domain and B the intent of a request.

- single task: a model of B alone; its batches have labelled texts only.
- multitask: `lp.multitask_model`; batches of all texts, the missing labels -1. The loss of B is
  the mean over the labels present.
- naive mask: the same network in plain Keras; the losses of B, those of missing labels times 0,
  are divided by the batch size.
- multitask, half of each batch labelled: as `lp.mix` of the labelled texts and of all texts does it
  with `temperature=float("inf")`.

All have 600 steps of Adam on batches of 64, the rate falling to zero along a cosine. The rate is
one of four, the best with the first seed, and each run stops at the best of 6 checkpoints; both by
the accuracy of B on validation texts, for each approach and share. The validation texts all have
their labels, also where the training texts have few. The encoder is the mean of embeddings (32
wide) of words and pairs of words, and a dense layer of 128. A seed changes the texts with labels,
the initial weights and the order. The test split chooses nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from lib import multitask
from lib.arguments import command, parser
from lib.journal import Journal, Run
from lib.machine import machine, one_thread
from lib.multitask import Problem, Restarted, accuracies, cosine, model_of, plain_model
from lib.plots import curves, panels
from lib.results import page, table, write
from lib.scores import VERDICTS, chosen, mean_and_deviation, select, tuned, unique, verdict

NAME = "multitask_limited_labels"
PROBLEMS = ("trec", "clinc_oos")
SHARES = (1, 5, 20, 100)  # % of the training texts
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
BATCH, STEPS, CHECKPOINTS = 64, 100, 6  # steps between two checkpoints
SINGLE, MULTI, NAIVE = "single task", "multitask", "naive mask"
HALF = "multitask, half of each batch labelled"
APPROACHES = (SINGLE, MULTI, NAIVE, HALF)


class Learner:
    """Learns a problem; a model is traced once and used for all runs."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.tasks = problem, list(problem.classes)
        single = {self.tasks[1]: problem.classes[self.tasks[1]]}
        multi = Restarted(partial(model_of, problem.network, problem.classes), STEPS)
        self._models = {
            SINGLE: Restarted(partial(model_of, problem.network, single), STEPS),
            MULTI: multi,
            NAIVE: Restarted(partial(plain_model, problem.network, problem.classes), STEPS),
            HALF: multi,
        }

    def __call__(self, approach: str, share: int, seed: int, rate: float) -> Run:
        model = self._models[approach](seed)
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

    def _batches(self, approach: str, labelled: np.ndarray, seed: int) -> Iterator[np.ndarray]:
        """Yields the numbers of the texts of each batch."""
        everything = np.arange(len(self.problem.train[0]))
        ours, others = (multitask.shuffled(index, seed) for index in (labelled, everything))
        of_labelled = {SINGLE: BATCH, HALF: BATCH // 2}.get(approach, 0)
        while True:
            batch = [next(ours) for _ in range(of_labelled)]
            yield np.array(batch + [next(others) for _ in range(BATCH - of_labelled)])

    def _labels(self, approach: str, index: np.ndarray, labelled: np.ndarray) -> tuple:
        """Returns the texts, their labels, and weights for the naive mask."""
        x, y = multitask.take(self.problem.train, index)
        first, second = self.tasks
        known = np.isin(index, labelled)
        if approach == SINGLE:
            return x, y[second], None
        if approach == NAIVE:
            return x, y, {first: np.ones(len(x)), second: known.astype("float32")}
        return x, {first: y[first], second: np.where(known, y[second], -1)}, None


def study(problem: Problem, journal: Journal, seeds: int) -> None:
    learn = Learner(problem)
    for approach in APPROACHES:
        for share in shares_of(approach):
            key = {"problem": problem.name, "approach": approach, "share": share}
            tuned(journal, partial(learn, approach, share), RATES, seeds, validated, **key)


# Results


def shares_of(*approaches: str) -> list[int]:
    """Returns the shares that all have; with all labels two of them are the multitask model."""
    whole = set(approaches) <= {SINGLE, MULTI}
    return [share for share in SHARES if share < 100 or whole]


def validated(run: Run) -> float:
    return max(run["val"])


def runs_of(runs: list[Run], problem: str, approach: str, share: int) -> list[Run]:
    """Returns the runs at the rate that was chosen, by seed."""
    return chosen(select(runs, problem=problem, approach=approach, share=share), validated)


def scores(runs: list[Run], problem: str, approach: str, share: int) -> np.ndarray:
    """Returns the test accuracies of B in %, by seed."""
    of = runs_of(runs, problem, approach, share)
    return np.array([100 * list(run["test"].values())[-1] for run in of])


def share_table(
    title: str,
    approaches: Sequence[str],
    cell: Callable[[str, int], str],
    labels: Sequence[str] = ("",) * len(SHARES),
    baseline: str = SINGLE,
) -> str:
    """Returns a row for each approach, empty where it or the baseline does not have the share."""
    rows = []
    for approach in approaches:
        there = shares_of(approach, baseline)
        rows.append([approach, *(cell(approach, s) if s in there else "" for s in SHARES)])
    return table([title, *(f"{s} %{w}" for s, w in zip(SHARES, labels, strict=True))], rows)


def score_table(runs: list[Run], problem: str, size: dict[str, Any]) -> str:
    def cell(approach: str, share: int) -> str:
        return mean_and_deviation(scores(runs, problem, approach, share))

    labels = [f": {count:,} labels" for count in size["labels"]]
    return share_table(f"{problem}: {size['tasks'][1]}", unique(runs, "approach"), cell, labels)


def difference_table(runs: list[Run], problem: str, baseline: str) -> str:
    def cell(approach: str, share: int) -> str:
        change = np.subtract(*(scores(runs, problem, one, share) for one in (approach, baseline)))
        return f"{change.mean():+.1f}, {verdict(change)}"

    approaches = [name for name in (MULTI, NAIVE, HALF) if name != baseline]
    return share_table(f"{problem}, minus {baseline}", approaches, cell, baseline=baseline)


def rate_table(runs: list[Run], problem: str) -> str:
    def cell(approach: str, share: int) -> str:
        of = runs_of(runs, problem, approach, share)
        stops = [STEPS * (int(np.argmax(run["val"])) + 1) for run in of]
        return f"{of[0]['rate']:g}, {np.median(stops):.0f}"

    return share_table(f"{problem}: rate, steps (median)", unique(runs, "approach"), cell)


def report(results: dict[str, Any]) -> str:
    runs, sizes = results["runs"], results["sizes"]
    return page(
        "A second task, and few labels",
        results["command"],
        results["machine"],
        __doc__,
        f"Test accuracy of B in %, mean and standard deviation over {len(unique(runs, 'seed'))} "
        f"seeds, {len(runs)} trainings of {np.mean([run['seconds'] for run in runs]):.0f} s on the "
        "mean:",
        *(score_table(runs, problem, sizes[problem]) for problem in sizes),
        f"![Accuracy by share of labels]({NAME}.png)",
        "At 100 % no label is missing, so the naive mask and the batches of halves are the "
        "multitask model.",
        "## Against the single-task model",
        f"Multitask minus single task, seed by seed. {VERDICTS}",
        *(difference_table(runs, problem, SINGLE) for problem in sizes),
        "## Against the naive mask",
        *(difference_table(runs, problem, NAIVE) for problem in sizes),
        "## Rates",
        *(rate_table(runs, problem) for problem in sizes),
    )


def plot(results: dict[str, Any], path: Path) -> None:
    runs, sizes = results["runs"], results["sizes"]
    with panels(path, len(sizes)) as axes:
        for axis, (problem, size) in zip(axes, sizes.items(), strict=True):
            found = {
                name: [scores(runs, problem, name, share) for share in shares_of(name)]
                for name in APPROACHES
            }
            first, second = size["tasks"]
            labels = {"xlabel": f"texts with {second} (log)", "title": f"{problem}, with {first}"}
            curves(axis, SHARES, found, " %", ylabel=f"test accuracy of {second}, %", **labels)


def main() -> None:
    given = parser(__doc__, seeds=5, data_dir=True).parse_args()
    one_thread()
    runs, sizes = [], {}
    for name in PROBLEMS:
        problem = multitask.texts(name, given.data_dir)
        count = len(problem.train[0])
        labels = [round(count * share / 100) for share in SHARES]
        sizes[name] = {"tasks": list(problem.classes), "train": count, "labels": labels}
        settings = {"rates": list(RATES), "batch": BATCH, "steps": STEPS}
        path = given.out / "partial" / f"{NAME}_{name}.json"
        journal = Journal(path, {**settings, "checkpoints": CHECKPOINTS})
        study(problem, journal, given.seeds)
        runs += journal.runs
    results = {
        "command": command(__file__, given, "seeds"),
        "machine": machine("scikit-learn"),
        "sizes": sizes,
        "runs": runs,
    }
    write(given.out / NAME, report(results), results)
    plot(results, (given.out / NAME).with_suffix(".png"))


if __name__ == "__main__":
    main()
