"""Differences between ways on the same data sets and seeds, and what they say about a claim."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from lib.journal import Run
from lib.scores import deviation, verdict

HOLDS, PARTLY, NOT, UNKNOWN = "holds", "holds partly", "does not hold", "cannot be told here"
ENOUGH = 3  # values that tell a difference; data sets, else their seeds
Values = dict[str, dict[int, float]]  # by data set and seed

RULE = (
    "A difference holds if zero is outside its 95 % interval (Student's t) over the data sets and "
    "it has this sign on each of them, and holds partly if it has the other sign on some. With "
    "fewer than three data sets the interval is over their seeds, of which three are needed. A "
    "condition with a number holds if it is met on each data set, and partly if on some."
)


def points(run: Run) -> float:
    return 100 * run["accuracy"]


def sizes(runs: Sequence[Run]) -> list[int]:
    return sorted({run["examples"] for run in runs})


def ends(runs: Sequence[Run]) -> tuple[int, int]:
    """Returns the fewest and the most examples."""
    found = sizes(runs) or [0]
    return found[0], found[-1]


def of_way(runs: Sequence[Run], way: str, examples: int) -> dict[str, list[Run]]:
    """Returns the runs by data set, in the order of the seeds."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run.get("way") == way and run["examples"] == examples:
            found.setdefault(run["data_set"], []).append(run)
    return found


def values(
    runs: Sequence[Run], way: str, examples: int, of: str | Callable[[Run], float]
) -> Values:
    """Returns what runs have under a key, or what a function makes of them."""
    read = (lambda run: run[of]) if isinstance(of, str) else of
    found = of_way(runs, way, examples).items()
    return {data: {run["seed"]: read(run) for run in some} for data, some in found}


def combined(make: Callable[..., float], *every: Values) -> Values:
    """Applies a function to the values of the data sets and seeds that all have."""
    found: Values = {}
    for data in every[0]:
        parts = [of.get(data, {}) for of in every]
        both = {
            seed: make(*(part[seed] for part in parts))
            for seed in parts[0]
            if all(seed in part for part in parts)
        }
        if both:
            found[data] = both
    return found


def differences(
    runs: Sequence[Run], way: str, other: str, examples: int, of: Callable[[Run], float] = points
) -> Values:
    """Returns the differences of two ways on the same data sets and seeds."""
    two = (values(runs, one, examples, of) for one in (way, other))
    return combined(lambda a, b: a - b, *two)


def means(found: Values) -> dict[str, float]:
    """Returns the mean of each data set."""
    return {data: float(np.mean(list(by.values()))) for data, by in found.items()}


def mean(found: Values) -> float:
    """Returns the mean over the data sets."""
    return float(np.mean(list(means(found).values())))


def together(by_size: Mapping[int, Values]) -> dict[int, Values]:
    """Keeps the data sets that all numbers of examples have, so that their means compare."""
    known = [of for of in by_size.values() if of]
    common = set.intersection(*map(set, known)) if known else set()
    kept = {n: {data: of[data] for data in of if data in common} for n, of in by_size.items()}
    return {n: of for n, of in kept.items() if of}


def units(found: Values) -> np.ndarray:
    """Returns the means of the data sets, or the values of the seeds if there are few sets."""
    if len(found) >= ENOUGH:
        return np.array(list(means(found).values()))
    return np.array([value for by in found.values() for value in by.values()])


def settled(found: Values) -> str:
    """Returns what differences say about a claim that they are above zero, see `RULE`."""
    if len(units(found)) < ENOUGH:
        return UNKNOWN
    said = verdict(units(found))
    if said == "better":
        return HOLDS if min(means(found).values()) > 0 else PARTLY
    return NOT if said == "worse" else UNKNOWN


def share(reached: Iterable[bool]) -> str:
    """Returns what is said if each data set tells whether a claim holds."""
    found = [bool(one) for one in reached]
    return HOLDS if all(found) else PARTLY if any(found) else NOT


def spread(found: Values) -> str:
    """Returns mean and deviation of differences in points."""
    of = units(found)
    shown = f"{of.mean():+.1f}"
    return f"{shown} ± {deviation(of):.1f} points" if len(of) > 1 else f"{shown} points"
