"""The claims of textbooks about the paradigms, judged by the runs of the comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lib import comparison as c
from lib.journal import Run
from lib.scores import deviation, verdict


class Claim(NamedTuple):
    """A claim, the figure that was measured, and what it says about the claim."""

    claim: str
    figure: str
    verdict: str


def judge(runs: Sequence[Run]) -> list[Claim]:
    """Returns each claim with its figure and verdict."""
    sizes = sorted({run["examples"] for run in runs})
    few, many = sizes[0], sizes[-1]
    found = []

    def add(claim: str, figure: str, holds: bool | None) -> None:
        words = {True: "holds", False: "does not hold", None: "cannot be told here"}
        found.append(Claim(claim, figure, words[holds]))

    def known(examples: int, *ways: str) -> bool:
        """Whether there are runs of these ways."""
        return all(len(values(runs, way, examples, "accuracy")) for way in ways)

    def better(claim: str, way: str, other: str, examples: int) -> None:
        if known(examples, way, other):
            change = 100 * differences(runs, way, other, examples, lambda run: run["accuracy"])
            figure = f"{way} {show(change)} points compared with {other}, {examples} examples"
            add(claim, figure, {"better": True, "worse": False}.get(verdict(change)))

    def ratio(claim: str, way: str, other: str, key: str, least: float) -> None:
        if known(many, way, other):
            a, b = (values(runs, one, many, key) for one in (way, other))
            factor = float(np.median(b) / np.median(a))
            what = {"cpu": "CPU seconds", "trained": "trained weights"}[key]
            add(claim, f"{way}: {factor:,.1f} times fewer {what} than {other}", factor >= least)

    better("Transfer needs little data", c.HEAD, c.SCRATCH, few)
    better("With more data, fine-tuning is better than a head alone", c.DECAY, c.HEAD, many)
    if known(few, c.ONE_RATE, c.HEAD):
        gaps = 100 * differences(runs, c.ONE_RATE, c.HEAD, few, lambda run: run["gap"])
        add(
            "Fine-tuning overfits when data is scarce",
            f"its gap between training and test is {show(gaps)} points larger than that of a "
            f"solved head, {few} examples",
            {"better": True, "worse": False}.get(verdict(gaps)),
        )
    ratio("Transfer costs little computation", c.HEAD, c.DECAY, "cpu", 2)
    better("Lower rates for lower layers help", c.DECAY, c.ONE_RATE, few)
    ratio("LoRA trains a small fraction of the weights", c.LORA, c.ONE_RATE, "trained", 2)
    better("Tasks complement each other", c.MULTITASK, c.ONE_TASK, few)
    if known(many, c.EQUAL, c.TRANSFER):
        close = 100 * differences(runs, c.EQUAL, c.TRANSFER, many, lambda run: run["accuracy"])
        add(
            "Federated averaging approaches the centralised model",
            f"equal parts {show(close)} points compared with one place, {many} examples",
            bool(abs(close.mean()) <= 2) if len(close) > 1 else None,
        )
    better("It suffers when clients have few classes", c.EQUAL, c.SKEWED, many)
    if known(many, c.EQUAL):
        traffic = np.median(
            values(runs, c.EQUAL, many, "bytes") / values(runs, c.EQUAL, many, "data")
        )
        add(
            "Federated learning saves bandwidth",
            f"all updates have {traffic:,.1f} times the bytes of the {many} examples",
            bool(traffic < 1),
        )
    return found


def values(runs: Sequence[Run], way: str, examples: int, key: str) -> np.ndarray:
    """Returns the values of runs, by data set and seed."""
    found = [run for run in runs if run["way"] == way and run["examples"] == examples]
    return np.array(
        [run[key] for run in sorted(found, key=lambda run: (run["data_set"], run["seed"]))], float
    )


def differences(
    runs: Sequence[Run], way: str, other: str, examples: int, of: Callable[[Run], float]
) -> np.ndarray:
    """Returns the differences of two ways on the same data sets and seeds."""
    pairs = {}
    for run in runs:
        if run["examples"] == examples and run["way"] in (way, other):
            pairs.setdefault((run["data_set"], run["seed"]), {})[run["way"]] = of(run)
    return np.array([pair[way] - pair[other] for pair in pairs.values() if len(pair) == 2])


def show(change: np.ndarray) -> str:
    """Returns mean and deviation of differences."""
    return (
        f"{change.mean():+.1f} ± {deviation(change):.1f}"
        if len(change) > 1
        else f"{change[0]:+.1f}"
    )
