"""The claims of textbooks about the paradigms, judged by the runs of the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lib import ways as w
from lib.differences import (
    combined,
    differences,
    ends,
    mean,
    means,
    of_way,
    settled,
    share,
    sizes,
    spread,
    together,
    values,
)
from lib.journal import Run

NEAR = 2.0  # points within which two accuracies are about the same


class Claim(NamedTuple):
    """A claim, the figure that was measured, and what it says about the claim."""

    claim: str
    figure: str
    verdict: str


def judge(runs: Sequence[Run]) -> list[Claim]:
    """Returns each claim that the runs allow to judge."""
    made = (claim for of in (transfer, finetuning, multitask, federated) for claim in of(runs))
    return [claim for claim in made if claim is not None]


def transfer(runs: Sequence[Run]) -> Iterable[Claim | None]:
    few, _ = ends(runs)
    yield compared(runs, "Transfer needs little data", w.HEAD, w.SCRATCH, few)
    costs = "Transfer costs less than half of fine-tuning"
    yield fewer(runs, f"{costs}: CPU seconds", w.HEAD, w.DECAY, "cpu", "CPU seconds")
    what = "floating-point operations"
    yield fewer(runs, f"{costs}: {what}", w.TRANSFER, w.DECAY, "flops", what)


def finetuning(runs: Sequence[Run]) -> Iterable[Claim | None]:
    few, many = ends(runs)
    yield compared(runs, "Fine-tuning beats a head where data is plenty", w.DECAY, w.HEAD, many)
    gains = [differences(runs, w.DECAY, w.HEAD, n) for n in (few, many)]
    growth = combined(lambda a, b: b - a, *gains)
    if growth and few != many:
        yield Claim(
            "Fine-tuning wants more data than a head",
            f"change of its advantage over a solved head from {few} to {many:,} examples: "
            f"{spread(growth)}; {crossing(runs)}",
            settled(growth),
        )
    gaps = [[values(runs, way, n, "gap") for n in (few, many)] for way in (w.ONE_RATE, w.HEAD)]
    shrunk = [combined(lambda a, b: 100 * (a - b), *one) for one in gaps]
    if shrunk[0] and few != many:
        head = f"; of a solved head {spread(shrunk[1])}" if shrunk[1] else ""
        yield Claim(
            "Fine-tuning overfits when data is scarce",
            f"gap between training and test accuracy with {few} examples, compared with {many:,}: "
            f"{spread(shrunk[0])}{head}",
            settled(shrunk[0]),
        )
    yield rates(runs)
    name = "LoRA trains less than half of the weights"
    yield fewer(runs, name, w.LORA, w.ONE_RATE, "trained", "trained weights")
    yield near(runs, "LoRA is within two points of all weights", w.LORA, w.ONE_RATE, above=True)


def multitask(runs: Sequence[Run]) -> Iterable[Claim | None]:
    few, many = ends(runs)
    claim = "A task with few labels profits from another"
    yield compared(runs, claim, w.MULTITASK, w.ONE_TASK, few)
    for key, unit in (("file", "the bytes of the file"), ("predicting", "the time to predict")):
        two = (values(runs, way, many, key) for way in (w.MULTITASK, w.ONE_TASK))
        found = means(combined(lambda both, one: both / (2 * one), *two))
        if found:
            yield Claim(
                f"One model of two tasks is cheaper than two: {unit}",
                f"{np.median(list(found.values())):.2f} times {unit} of two models",
                share(ratio < 1 for ratio in found.values()),
            )


def federated(runs: Sequence[Run]) -> Iterable[Claim | None]:
    _, many = ends(runs)
    claim = "Federated averaging comes within two points of one place"
    yield near(runs, claim, w.EQUAL, w.CENTRAL, more=by_round(runs, many))
    yield compared(runs, "It suffers where clients have few classes", w.EQUAL, w.SKEWED, many)
    sent, rounds, data = (values(runs, w.EQUAL, many, key) for key in ("bytes", "rounds", "data"))
    whole = means(combined(lambda a, b: a / b, sent, data))
    one = means(combined(lambda a, n, b: a / n / b, sent, rounds, data))
    if whole:
        middle, each = (float(np.median(list(of.values()))) for of in (whole, one))
        yield Claim(
            "Federated learning saves bandwidth",
            f"the updates of all rounds have {middle:,.1f} times the bytes of the {many:,} "
            f"examples, those of one round {each:,.1f} times; the break-even is at "
            f"{many * middle:,.0f} examples (medians over the data sets)",
            share(ratio < 1 for ratio in whole.values()),
        )
    own = values(runs, w.SKEWED, many, lambda run: 100 * (run["personal"] - run["on_clients"]))
    if own:
        yield Claim(
            "Each device can have a better model for its own data",
            f"personal models {spread(own)} compared with the global one, on test examples of the "
            f"classes of each client, two labels per client, {many:,} examples",
            settled(own),
        )
    yield privacy(runs, many)


def privacy(runs: Sequence[Run], many: int) -> Claim | None:
    """Judges what an attacker reads with and without noise, and tells what privacy costs."""
    read = [
        run["read"]
        for found in of_way(runs, w.EQUAL, many).values()
        for run in found
        if "read" in run
    ]
    if not read:
        return None
    labels, features = (
        {kind: float(np.mean([one[kind][what] for one in read])) for kind in ("none", "noise")}
        for what in ("labels", "features")
    )
    cost = differences(runs, w.PRIVATE, w.EQUAL, many)
    shown = ""
    if cost:
        shown = (
            f". Epsilon 8 for ten clients, whose features are not standardised, changes accuracy by"
            f" {spread(cost)}, {many:,} examples"
        )
    return Claim(
        "Without differential privacy, updates reveal the data",
        f"from the update of a client with one example, an attacker reads {labels['none']:.0%} of "
        f"the labels and the features with similarity {features['none']:.2f}; with noise "
        f"multiplier 1 {labels['noise']:.0%} and {features['noise']:.2f}{shown}",
        share(one["none"]["features"] > 0.9 > one["noise"]["features"] for one in read),
    )


def rates(runs: Sequence[Run]) -> Claim | None:
    """Judges layer decay over three rates."""
    at = {run["examples"] for run in runs if run.get("way") in w.WAYS and w.WAYS[run["way"]].rates}
    if not at:
        return None
    (examples,) = at
    gains = {1e-3: differences(runs, w.DECAY, w.ONE_RATE, examples)}
    for rate in w.RATES:
        names = (w.at_rate(way, rate) for way in (w.DECAY, w.ONE_RATE))
        gains[rate] = differences(runs, *names, examples)
    over_rates = combined(lambda *three: float(np.mean(three)), *gains.values())
    if not over_rates:
        return None
    each = ", ".join(f"{mean(gains[rate]):+.1f} at {rate:g}" for rate in sorted(gains))
    return Claim(
        "Lower rates for lower layers help",
        f"layer decay {spread(over_rates)} compared with one rate, mean over three rates ({each}), "
        f"{examples} examples",
        settled(over_rates),
    )


# Figures


def compared(runs: Sequence[Run], claim: str, way: str, other: str, at: int) -> Claim | None:
    """Judges whether a way has the higher accuracy with some number of examples."""
    gains = differences(runs, way, other, at)
    if not gains:
        return None
    every = together({n: differences(runs, way, other, n) for n in sizes(runs)})
    shown = ", ".join(f"{mean(one):+.1f} at {n:,}" for n, one in every.items())
    higher = ""
    if len(gains) > 1:
        count = sum(one > 0 for one in means(gains).values())
        higher = f"; higher on {count} of {len(gains)} data sets"
    where = f"; by examples: {shown}" if len(every) > 1 else ""
    return Claim(
        claim,
        f"{way} {spread(gains)} compared with {other}, {at:,} examples{higher}{where}",
        settled(gains),
    )


def near(
    runs: Sequence[Run], claim: str, way: str, other: str, above: bool = False, more: str = ""
) -> Claim | None:
    """Judges whether a way is about as accurate as another; `above`: or more accurate."""
    _, many = ends(runs)
    gains = differences(runs, way, other, many)
    if not gains:
        return None
    return Claim(
        claim,
        f"{way} {spread(gains)} compared with {other}, {many:,} examples{more}",
        share(one >= -NEAR and (above or one <= NEAR) for one in means(gains).values()),
    )


def fewer(
    runs: Sequence[Run], claim: str, way: str, other: str, key: str, unit: str
) -> Claim | None:
    """Judges whether a way takes less than half of something."""
    _, many = ends(runs)
    two = (values(runs, one, many, key) for one in (way, other))
    found = means(combined(lambda a, b: b / a, *two))
    if not found:
        return None
    ratios = list(found.values())
    return Claim(
        claim,
        f"{way}: {np.median(ratios):,.1f} times fewer {unit} than {other}, {many:,} examples (at "
        f"least {min(ratios):,.1f} times)",
        share(ratio > 2 for ratio in ratios),
    )


def crossing(runs: Sequence[Run]) -> str:
    """Tells from how many examples fine-tuning has the higher mean."""
    every = together({n: differences(runs, w.DECAY, w.HEAD, n) for n in sizes(runs)})
    above = [n for n, gains in every.items() if mean(gains) > 0]
    return f"it has the higher mean from {above[0]:,}" if above else "it is never higher"


def by_round(runs: Sequence[Run], many: int) -> str:
    """Tells the mean accuracy after the first, the middle and the last round."""
    curves = [run["by_round"] for found in of_way(runs, w.EQUAL, many).values() for run in found]
    if not curves or min(map(len, curves)) < 2:
        return ""
    places = [0, min(map(len, curves)) // 2, -1]
    found = [f"{100 * np.mean([one[place] for one in curves]):.1f} %" for place in places]
    return f"; after the first, the middle and the last round {', '.join(found)}"
