"""Differences between ways on the same data sets and seeds, and what they say about a claim."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from lib.journal import Run
from lib.scores import deviation, verdict

HOLDS, PARTLY, NOT, UNKNOWN = "holds", "holds partly", "does not hold", "cannot be told here"
ENOUGH = 3  # values that tell a difference; data sets, else their seeds
By = dict[str, np.ndarray]  # by data set, a value per seed

RULE = (
    "A difference holds if zero is outside its 95 % interval (Student's t) over the data sets and "
    "it has this sign on each of them; with fewer than three data sets, over their seeds, of which "
    "three are needed. It holds partly if it has the other sign on some data set, or is told from "
    "zero by the seeds of single data sets only. A ratio holds if it is reached on each data set."
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


def by_data(runs: Sequence[Run], way: str, examples: int, key: str) -> By:
    """Returns the values of a key."""
    found = of_way(runs, way, examples).items()
    return {data: np.array([run[key] for run in some], float) for data, some in found}


def middle(runs: Sequence[Run], way: str, examples: int, key: str) -> float:
    """Returns the mean over the data sets."""
    found = by_data(runs, way, examples, key)
    return float(np.mean(means(found))) if found else float("nan")


def differences(
    runs: Sequence[Run], way: str, other: str, examples: int, of: Callable[[Run], float]
) -> By:
    """Returns the differences of two ways on the same data sets and seeds."""
    a, b = (of_way(runs, one, examples) for one in (way, other))
    found = {}
    for data in a:
        values = [{run["seed"]: of(run) for run in one.get(data, [])} for one in (a, b)]
        both = [values[0][seed] - values[1][seed] for seed in values[0] if seed in values[1]]
        if both:
            found[data] = np.array(both)
    return found


def means(found: By) -> list[float]:
    return [float(one.mean()) for one in found.values()]


def units(found: By) -> np.ndarray:
    """Returns the means of the data sets, or the values of the seeds if there are few sets."""
    if len(found) >= ENOUGH:
        return np.array(means(found))
    return np.concatenate(list(found.values()))


def settled(found: Mapping[str, np.ndarray]) -> str:
    """Returns what differences say about a claim that they are above zero, see `RULE`."""
    if len(units(dict(found))) < ENOUGH:
        return UNKNOWN
    said = verdict(units(dict(found)))
    if said == "worse":
        return NOT
    if said == "better":
        return HOLDS if all(mean > 0 for mean in means(dict(found))) else PARTLY
    single = len(found) >= ENOUGH and any(verdict(one) == "better" for one in found.values())
    return PARTLY if single else UNKNOWN


def share(reached: Iterable[bool]) -> str:
    """Returns what is said if each data set tells whether a claim holds."""
    found = [bool(one) for one in reached]
    return HOLDS if all(found) else PARTLY if any(found) else NOT


def spread(found: Mapping[str, np.ndarray]) -> str:
    """Returns mean and deviation of differences in points."""
    of = units(dict(found))
    shown = f"{of.mean():+.1f}"
    return f"{shown} ± {deviation(of):.1f} points" if len(of) > 1 else f"{shown} points"
