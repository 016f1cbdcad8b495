"""What the studies of learning share: problems, approaches, runs, and the tables of them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from common import table
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import train_test_split

import keras_lp as lp

METRICS = {  # label, factor, digits
    "balanced_accuracy": ("balanced accuracy, %", 100, 1),
    "auc": ("AUC", 1, 3),
    "accuracy": ("accuracy, %", 100, 1),
}
XRAY_LABELS = ["normal", "pneumonia"]

Arrays = tuple[np.ndarray, np.ndarray]
Run = dict[str, Any]


@dataclasses.dataclass
class Problem:
    """What is to be learned; `train` may hold more pictures than are used."""

    name: str
    labels: list[str]
    train: Arrays
    val: Arrays
    test: Arrays


@dataclasses.dataclass
class Approach:
    """A way to learn it: `fit` takes pictures, labels, the rate and options of the study."""

    name: str
    rates: Sequence[float]
    fit: Callable[..., keras.Model]


@dataclasses.dataclass(frozen=True)
class Case:
    """A column of a table: a problem with so many training pictures, and the metric to show."""

    problem: str
    examples: int
    metric: str
    label: str

    @property
    def measure(self) -> str:
        return METRICS[self.metric][0]


def xray_problem(data_dir: str | None) -> Problem:
    parts = {
        split: lp.load_dataset("pneumonia_mnist", split=split, batch_size=-1, data_dir=data_dir)
        for split in ("train", "val", "test")
    }
    return Problem("pneumonia_mnist", XRAY_LABELS, **parts)


def draw(data: Arrays, count: int, seed: int) -> tuple[Arrays, Arrays]:
    """Draws `count` pictures at random, each class in its share; returns them and the rest."""
    x, y = data
    if count == len(y):
        return data, (x[:0], y[:0])
    chosen, rest = train_test_split(
        np.arange(len(y)), train_size=count, random_state=seed, stratify=y
    )
    return (x[chosen], y[chosen]), (x[rest], y[rest])


def normalisations(model: keras.Model) -> Iterator[keras.layers.BatchNormalization]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from normalisations(layer)
        elif isinstance(layer, keras.layers.BatchNormalization):
            yield layer


def scores(model: keras.Model, data: Arrays) -> dict[str, float]:
    """Of two classes balanced accuracy and AUC, of more (they are of one size) accuracy.

    The first score is the one that a rate is chosen by.
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
        examples: the number of training pictures, drawn at random.
        seed: changes those, the initial weights and the order.
        rate: the learning rate.
        shown: pictures to hand over; fewer ones are repeated. Defaults to None, each once.
        **options: for the approach, besides `class_weight`: each class counts the same.
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
        "val": scores(model, problem.val),
        "test": scores(model, problem.test),
    }


def sweep(learned: Callable[[int, float], Run], rates: Sequence[float], seeds: int) -> list[Run]:
    """Chooses the rate on `val`, then learns with every seed; returns all runs.

    Args:
        learned: learns once, with a seed and a rate.
        rates: those to choose from.
        seeds: how many.
    """
    runs = [learned(0, rate) for rate in rates]
    metric = next(iter(runs[0]["val"]))
    best = max(runs, key=lambda run: run["val"][metric])["rate"]
    runs += [learned(seed, best) for seed in range(1, seeds)]
    for run in runs:
        run["chosen"] = run["rate"] == best
    case = Case(runs[0]["problem"], runs[0]["examples"], metric, "")
    approach = runs[0]["approach"]
    seconds = statistics.median(run["seconds"] for run in runs)
    print(
        f"{case.problem:<19} {approach:<27} n = {case.examples:<4}  rate {best:<6g} "
        f"{mean_and_spread(values(runs, approach, case), metric)} %  {seconds:.0f} s",
        flush=True,
    )
    return runs


def values(runs: list[Run], approach: str, case: Case) -> np.ndarray:
    """The scores on the test split with the chosen rate, by seed."""
    wanted = (case.problem, approach, case.examples)
    chosen = [
        run
        for run in runs
        if run["chosen"] and (run["problem"], run["approach"], run["examples"]) == wanted
    ]
    factor = METRICS[case.metric][1]
    return np.array([factor * run["test"][case.metric] for run in sorted(chosen, key=_seed)])


def _seed(run: Run) -> int:
    return run["seed"]


def spread(found: np.ndarray) -> float:
    return float(np.std(found, ddof=1)) if len(found) > 1 else 0.0


def mean_and_spread(found: np.ndarray, metric: str) -> str:
    digits = METRICS[metric][2]
    return f"{found.mean():.{digits}f} ± {spread(found):.{digits}f}"


def unique(runs: list[Run], key: str) -> list[Any]:
    return list(dict.fromkeys(run[key] for run in runs))


def verdict(change: np.ndarray) -> str:
    """Whether zero is outside the 95 % interval of the mean difference."""
    if len(change) < 2:
        return "one seed"
    margin = stats.t.ppf(0.975, len(change) - 1) * spread(change) / np.sqrt(len(change))
    if abs(change.mean()) <= margin:
        return "not told apart"
    return "better" if change.mean() > 0 else "worse"


def difference(runs: list[Run], approach: str, baseline: str, case: Case) -> tuple[str, str]:
    """An approach minus the baseline, seed by seed: the mean as text, and the verdict."""
    change = values(runs, approach, case) - values(runs, baseline, case)
    return f"{change.mean():+.{METRICS[case.metric][2]}f}", verdict(change)


def score_table(runs: list[Run], title: str, cases: Sequence[Case]) -> str:
    rows = [
        [
            approach,
            *(mean_and_spread(values(runs, approach, case), case.metric) for case in cases),
        ]
        for approach in unique(runs, "approach")
    ]
    return table([title, *(case.label for case in cases)], rows)


def rate_table(runs: list[Run], title: str, cases: Sequence[Case]) -> str:
    rows = []
    for approach in unique(runs, "approach"):
        of = [run for run in runs if run["approach"] == approach]
        of = [run for run in of if run["problem"] in {case.problem for case in cases}]
        chosen = {
            (run["problem"], run["examples"]): f"{run['rate']:g}" for run in of if run["chosen"]
        }
        seconds = statistics.median(run["seconds"] for run in of)
        rates = [chosen[case.problem, case.examples] for case in cases]
        rows.append([approach, *rates, f"{seconds:.1f}"])
    return table([title, *(case.label for case in cases), "seconds"], rows)
