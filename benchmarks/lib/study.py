"""Studies that compare approaches on problems by the number of training examples."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from lib import scores
from lib.journal import Run
from lib.problems import Arrays, Problem, draw
from lib.results import table
from lib.scores import deviation, mean_and_deviation, select, unique, verdict

METRICS = {  # label, factor, digits
    "balanced_accuracy": ("balanced accuracy, %", 100, 1),
    "auc": ("AUC", 1, 3),
    "accuracy": ("accuracy, %", 100, 1),
}


@dataclasses.dataclass
class Approach:
    """A way to learn: `fit` takes inputs, labels, the rate and options of the study."""

    name: str
    rates: Sequence[float]
    fit: Callable[..., keras.Model]


@dataclasses.dataclass(frozen=True)
class Case:
    """A column of a table: a problem with so many training examples, and the metric to show."""

    problem: str
    examples: int
    metric: str
    label: str

    @property
    def measure(self) -> str:
        return METRICS[self.metric][0]

    @property
    def digits(self) -> int:
        return METRICS[self.metric][2]

    def of(self, runs: Sequence[Run], **wanted: Any) -> list[Run]:
        """Returns the runs of this case that have these values, by seed."""
        found = select(runs, problem=self.problem, examples=self.examples, **wanted)
        return sorted(found, key=lambda run: run["seed"])

    def values(self, runs: Sequence[Run], part: str = "test", **wanted: Any) -> np.ndarray:
        """Returns the scores of these runs, by seed."""
        factor = METRICS[self.metric][1]
        return np.array([factor * run[part][self.metric] for run in self.of(runs, **wanted)])

    def chosen(self, runs: Sequence[Run], approach: str) -> np.ndarray:
        """Returns the scores on the test split at the rate that was chosen, by seed."""
        return self.values(runs, approach=approach, chosen=True)


def scores_of(model: keras.Model, data: Arrays) -> dict[str, float]:
    """Returns balanced accuracy and AUC of two classes, accuracy of more (they are of one size).

    The first score chooses the rate.
    """
    x, y = data
    logits = model.predict(x, batch_size=256, verbose=0)
    if logits.shape[-1] > 2:
        return {"accuracy": float(np.mean(y == logits.argmax(-1)))}
    return {
        "balanced_accuracy": float(balanced_accuracy_score(y, logits.argmax(-1))),
        "auc": float(roc_auc_score(y, logits[:, 1] - logits[:, 0])),
    }


def learn(
    problem: Problem,
    approach: Approach,
    examples: int,
    seed: int,
    rate: float,
    shown: int | None = None,
    **options: Any,
) -> Run:
    """Learns once; returns what was done and the scores.

    Args:
        problem: what is learned.
        approach: how.
        examples: the number of training examples, drawn at random.
        seed: of these, the initial weights and the order.
        rate: the learning rate.
        shown: examples that `fit` gets; fewer ones are repeated. Defaults to None: each once.
        **options: for `fit`, which also gets `class_weight`, so that each class counts the same.
    """
    (x, y), _ = draw(problem.train, examples, seed)
    weights = len(y) / (len(problem.labels) * np.bincount(y))
    again = np.resize(np.arange(examples), shown or examples)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    start = time.perf_counter()
    options["class_weight"] = dict(enumerate(weights))
    model = approach.fit(x[again], y[again], rate, **options)
    return {
        "problem": problem.name,
        "approach": approach.name,
        "examples": examples,
        "seed": seed,
        "rate": rate,
        "seconds": round(time.perf_counter() - start, 1),
        "val": scores_of(model, problem.val),
        "test": scores_of(model, problem.test),
    }


def sweep(learned: Callable[[int, float], Run], rates: Sequence[float], seeds: int) -> list[Run]:
    """Chooses the rate by the first score on `val`; see `lib.scores.sweep`."""
    runs = scores.sweep(learned, rates, seeds, lambda run: next(iter(run["val"].values())))
    first = runs[0]
    case = Case(first["problem"], first["examples"], next(iter(first["val"])), "")
    found = case.chosen(runs, first["approach"])
    best, seconds = (
        statistics.median(run[key] for run in select(runs, chosen=True))
        for key in ("rate", "seconds")
    )
    print(
        f"{case.problem:<19} {first['approach']:<27} n = {case.examples:<4}  rate {best:<6g} "
        f"{mean_and_deviation(found)} %  {seconds:.0f} s",
        flush=True,
    )
    return runs


def difference(runs: Sequence[Run], approach: str, baseline: str, case: Case) -> tuple[str, str]:
    """Returns the mean of an approach minus the baseline, seed by seed, and the verdict."""
    change = case.chosen(runs, approach) - case.chosen(runs, baseline)
    return f"{change.mean():+.{case.digits}f}", verdict(change)


def score_table(runs: Sequence[Run], title: str, cases: Sequence[Case]) -> str:
    """Returns the scores of each approach in each case."""
    rows = [
        [name, *(mean_and_deviation(case.chosen(runs, name), case.digits) for case in cases)]
        for name in unique(runs, "approach")
    ]
    return table([title, *(case.label for case in cases)], rows)


def difference_table(runs: Sequence[Run], title: str, cases: Sequence[Case], baseline: str) -> str:
    """Returns each approach minus the baseline, seed by seed, and where it is not better."""
    rows, others = [], []
    for approach in unique(runs, "approach"):
        if approach != baseline:
            found = [difference(runs, approach, baseline, case) for case in cases]
            rows.append([approach, *(f"{change}, {word}" for change, word in found)])
            pairs = zip(cases, found, strict=True)
            others += [f"{approach} with {case.label}" for case, (_, w) in pairs if w != "better"]
    text = table([title, *(case.label for case in cases)], rows)
    return f"{text}\n\nNot better than {baseline}: {'; '.join(others) or 'nothing here'}."


def rate_table(runs: Sequence[Run], title: str, cases: Sequence[Case]) -> str:
    """Returns the rates that were chosen, and the median seconds of a training."""
    rows = []
    problems = {case.problem for case in cases}
    for name in unique(runs, "approach"):
        of = [run for run in select(runs, approach=name) if run["problem"] in problems]
        rates = [f"{case.of(of, chosen=True)[0]['rate']:g}" for case in cases]
        seconds = statistics.median(run["seconds"] for run in of)
        rows.append([name, *rates, f"{seconds:.1f}"])
    return table([title, *(case.label for case in cases), "seconds"], rows)


def tuning_table(
    runs: Sequence[Run], cases: Sequence[Case], approaches: Sequence[str], rates: Sequence[float]
) -> str:
    """Returns what each rate gave on the validation examples with the first seed."""
    rows = []
    for case in cases:
        for name in approaches:
            found = [case.values(runs, "val", approach=name, rate=r, seed=0)[:1] for r in rates]
            if all(len(one) for one in found):
                rows.append([case.label, name, *(f"{one[0]:.1f}" for one in found)])
    return table(["validation, first seed, %", "", *(f"{rate:g}" for rate in rates)], rows)


def validation_table(runs: Sequence[Run], ways: Sequence[tuple[Case, str, float]]) -> str:
    """Returns the validation scores of cases, approaches and rates that several seeds have."""
    rows = []
    for case, name, rate in ways:
        by_seed = {run["seed"]: run for run in case.of(runs, approach=name, rate=rate)}
        found = case.values(list(by_seed.values()), "val")
        if len(found) > 1:
            shown = mean_and_deviation(found, case.digits)
            rows.append([case.label, name, f"{rate:g}", shown, f"{found.min():.{case.digits}f}"])
    return table(["validation, %", "", "rate", "mean and deviation", "worst seed"], rows)


def seed_table(
    runs: Sequence[Run], cases: Sequence[Case], approach: str, baseline: str, title: str
) -> str:
    """Returns an approach minus the baseline, whose name in the header is `title`, by seed."""
    rows = []
    for case in cases:
        base = case.chosen(runs, baseline)
        mean, word = difference(runs, approach, baseline, case)
        changes = [f"{c:+.{case.digits}f}" for c in case.chosen(runs, approach) - base]
        spread = f"{deviation(base):.{case.digits}f}"
        rows.append([case.label, case.measure, mean, ", ".join(changes), spread, word])
    header = ["", "measure", "difference", "by seed", f"deviation of {title}", "verdict"]
    return table(header, rows)


def at_an_end(runs: Sequence[Run], cases: Sequence[Case]) -> str:
    """Names where the rate is the lowest or highest of those tried: one beyond may be better."""
    found = []
    for name in unique(runs, "approach"):
        for case in cases:
            rates = unique(case.of(runs, approach=name), "rate")
            best = case.of(runs, approach=name, chosen=True)[0]["rate"]
            found += [f"{name} ({case.label})"] * (best in (min(rates), max(rates)))
    return "; ".join(found) or "none"
