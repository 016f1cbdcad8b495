"""Scores of runs: selection, mean and standard deviation over seeds, and differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from lib.journal import Journal, Run


def select(runs: Sequence[Run], **wanted: Any) -> list[Run]:
    """Returns the runs that have these values."""
    return [run for run in runs if all(run.get(key) == value for key, value in wanted.items())]


def unique(runs: Sequence[Run], *keys: str) -> list[Any]:
    """Returns the values of a key, or tuples of those of several, in the order of the runs."""
    found = [tuple(run[key] for key in keys) for run in runs]
    return list(dict.fromkeys(one if len(keys) > 1 else one[0] for one in found))


def deviation(found: Sequence[float] | np.ndarray) -> float:
    """Returns the sample standard deviation; 0 of one number."""
    return float(np.std(found, ddof=1)) if len(found) > 1 else 0.0


def mean_and_deviation(found: Sequence[float] | np.ndarray, digits: int = 1) -> str:
    return f"{np.mean(found):.{digits}f} ± {deviation(found):.{digits}f}"


def margin(found: Sequence[float] | np.ndarray) -> float:
    """Returns half of the 95 % interval (Student's t) of a mean; 0 of one number."""
    if len(found) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(found) - 1) * deviation(found) / len(found) ** 0.5)


def verdict(change: np.ndarray) -> str:
    """Tells whether zero is outside the 95 % interval (Student's t) of the mean difference."""
    if len(change) < 2:
        return "one seed"
    if abs(np.mean(change)) <= margin(change):
        return "not told apart"
    return "better" if np.mean(change) > 0 else "worse"


VERDICTS = (
    '"Better" and "worse": zero is outside the 95 % interval (Student\'s t) of the mean difference '
    "over the seeds. That covers the seeds; all of them share the test examples."
)


def sweep(
    learn: Callable[[int, float], Run],
    rates: Sequence[float],
    seeds: int,
    score: Callable[[Run], float],
) -> list[Run]:
    """Chooses the rate with the first seed, then learns with the others; returns all runs.

    Args:
        learn: learns once, with a seed and a rate.
        rates: those to choose from.
        seeds: how many.
        score: of a run, on validation examples; the rate with the highest is "chosen".
    """
    runs = [learn(0, rate) for rate in rates]
    best = max(runs, key=score)["rate"]
    runs += [learn(seed, best) for seed in range(1, seeds)]
    for run in runs:
        run["chosen"] = run["rate"] == best
    return runs


def tuned(
    journal: Journal,
    learn: Callable[[int, float], Run],
    rates: Sequence[float],
    seeds: int,
    score: Callable[[Run], float],
    **key: Any,
) -> list[Run]:
    """Like `sweep`; the runs are kept in a journal by this key, the seed and the rate."""

    def learned(seed: int, rate: float) -> Run:
        return journal.run(lambda: learn(seed, rate), **key, seed=seed, rate=rate)

    runs = sweep(learned, rates, seeds, score)
    best = select(runs, chosen=True)[0]
    print(*key.values(), f"rate {best['rate']:g}, first seed {best['test']}", flush=True)
    return runs


def chosen(runs: Sequence[Run], score: Callable[[Run], float]) -> list[Run]:
    """Returns the runs at the rate that scores best with the first seed, by seed."""
    best = max(select(runs, seed=0), key=score)["rate"]
    return sorted(select(runs, rate=best), key=lambda run: run["seed"])
