"""The claims of textbooks about the paradigms, judged by the runs of the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lib import ways as w
from lib.differences import (
    by_data,
    differences,
    ends,
    means,
    middle,
    of_way,
    points,
    settled,
    share,
    sizes,
    spread,
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
    for key, unit in (("cpu", "CPU seconds"), ("flops", "floating-point operations")):
        name = f"Transfer costs little computation: {unit}"
        yield fewer(runs, name, w.HEAD, w.DECAY, key, unit, 2)


def finetuning(runs: Sequence[Run]) -> Iterable[Claim | None]:
    few, many = ends(runs)
    yield compared(runs, "Fine-tuning beats a head where data is plenty", w.DECAY, w.HEAD, many)
    gains = [differences(runs, w.DECAY, w.HEAD, n, points) for n in (few, many)]
    both = {data: gains[1][data] - gains[0][data] for data in gains[1] if data in gains[0]}
    if both and few != many:
        yield Claim(
            "Fine-tuning wants more data than a head",
            f"its advantage over a solved head grows by {spread(both)} from {few} to {many:,} "
            f"examples; {crossing(runs)}",
            settled(both),
        )
    gaps = differences(runs, w.ONE_RATE, w.HEAD, few, lambda run: 100 * run["gap"])
    if gaps:
        yield Claim(
            "Fine-tuning overfits when data is scarce",
            f"its gap between training and test accuracy is {spread(gaps)} larger than that of a "
            f"solved head, {few} examples",
            settled(gaps),
        )
    yield rates(runs)
    yield fewer(
        runs, "LoRA trains a small fraction of the weights", w.LORA, w.ONE_RATE, "trained",
        "trained weights", 2,
    )  # fmt: skip
    near = differences(runs, w.LORA, w.ONE_RATE, many, points)
    if near:
        losses = ", ".join(f"{n:,}: {middle(runs, w.LORA, n, 'loss'):.2f}" for n in sizes(runs))
        yield Claim(
            "LoRA needs few hundred to few thousand examples",
            f"LoRA {spread(near)} compared with all weights, {many:,} examples; its held-out loss "
            f"by examples: {losses}",
            share(mean >= -NEAR for mean in means(near)),
        )


def multitask(runs: Sequence[Run]) -> Iterable[Claim | None]:
    few, many = ends(runs)
    yield compared(
        runs, "A task with few labels profits from another", w.MULTITASK, w.ONE_TASK, few
    )
    for key, unit in (("file", "the bytes of the file"), ("cpu", "the CPU seconds")):
        one, both = (by_data(runs, way, many, key) for way in (w.ONE_TASK, w.MULTITASK))
        found = [np.median(both[data]) / (2 * np.median(one[data])) for data in one if data in both]
        if found:
            yield Claim(
                f"One model of two tasks is cheaper than two: {unit}",
                f"{np.median(found):.2f} times {unit} of two models",
                share(ratio < 1 for ratio in found),
            )


def federated(runs: Sequence[Run]) -> Iterable[Claim | None]:
    _, many = ends(runs)
    near = differences(runs, w.EQUAL, w.CENTRAL, many, points)
    if near:
        yield Claim(
            "Federated averaging approaches the centralised model",
            f"equal parts {spread(near)} compared with one place, {many:,} examples"
            f"{by_round(runs, many)}",
            share(abs(mean) <= NEAR for mean in means(near)),
        )
    yield compared(runs, "It suffers where clients have few classes", w.EQUAL, w.SKEWED, many)
    sent, data = (by_data(runs, w.EQUAL, many, key) for key in ("bytes", "data"))
    if sent:
        whole = [float(np.median(sent[name] / data[name])) for name in sent]
        one = [
            float(np.median(sent[name] / by_data(runs, w.EQUAL, many, "rounds")[name] / data[name]))
            for name in sent
        ]
        yield Claim(
            "Federated learning saves bandwidth",
            f"the updates of all rounds have {np.median(whole):,.1f} times the bytes of the "
            f"{many:,} examples, those of one round {np.median(one):,.1f} times; the break-even is "
            f"at {many * np.median(whole):,.0f} examples (medians over the data sets)",
            share(ratio < 1 for ratio in whole),
        )
    own = {
        data: np.array([100 * (run["personal"] - run["on_clients"]) for run in found])
        for data, found in of_way(runs, w.SKEWED, many).items()
    }
    if own:
        yield Claim(
            "Each device can have a model for its own data",
            f"personal models {spread(own)} compared with the global one, on test examples of the "
            f"classes of each client, two labels per client, {many:,} examples",
            settled(own),
        )
    yield privacy(runs, many)


def privacy(runs: Sequence[Run], many: int) -> Claim | None:
    """Judges what an attacker reads with and without noise, and what the noise costs."""
    read = [
        run["read"] for found in of_way(runs, w.EQUAL, many).values() for run in found
        if "read" in run
    ]  # fmt: skip
    cost = differences(runs, w.PRIVATE, w.EQUAL, many, points)
    if not read or not cost:
        return None
    labels, features = (
        {kind: float(np.mean([one[kind][what] for one in read])) for kind in ("none", "noise")}
        for what in ("labels", "features")
    )
    return Claim(
        "Without differential privacy, updates reveal the data",
        f"from the update of a client with one example, an attacker reads {labels['none']:.0%} of "
        f"the labels and the features with similarity {features['none']:.2f}; with noise "
        f"{labels['noise']:.0%} and {features['noise']:.2f}. Privacy with epsilon 8 for ten "
        f"clients costs {spread({data: -gain for data, gain in cost.items()})}, {many:,} examples",
        share(one["none"]["features"] > 0.9 > one["noise"]["features"] for one in read),
    )


def rates(runs: Sequence[Run]) -> Claim | None:
    """Judges layer decay over three rates."""
    at = {run["examples"] for run in runs if run.get("way") in w.WAYS and w.WAYS[run["way"]].rates}
    if not at:
        return None
    (examples,) = at
    gains = {}
    for rate, more in ((1e-3, ""), *((rate, f", rate {rate:g}") for rate in w.RATES)):
        ways = (f"{way}{more}" for way in (w.DECAY, w.ONE_RATE))
        gains[rate] = differences(runs, *ways, examples, points)
    common = set.intersection(*(set(one) for one in gains.values()))
    if not common:
        return None
    mean = {data: np.mean([one[data] for one in gains.values()], 0) for data in sorted(common)}
    each = ", ".join(f"{np.mean(means(gains[rate])):+.1f} at {rate:g}" for rate in sorted(gains))
    return Claim(
        "Lower rates for lower layers help",
        f"layer decay {spread(mean)} compared with one rate, mean over three rates ({each}), "
        f"{examples} examples",
        settled(mean),
    )


# Figures


def compared(runs: Sequence[Run], claim: str, way: str, other: str, at: int) -> Claim | None:
    """Judges whether a way has the higher accuracy with some number of examples."""
    gains = differences(runs, way, other, at, points)
    if not gains:
        return None
    every = {n: differences(runs, way, other, n, points) for n in sizes(runs)}
    shown = ", ".join(f"{np.mean(means(one)):+.1f} at {n:,}" for n, one in every.items() if one)
    higher = ""
    if len(gains) > 1:
        count = sum(mean > 0 for mean in means(gains))
        higher = f"; higher on {count} of {len(gains)} data sets at {at:,}"
    return Claim(
        claim,
        f"{way} {spread(gains)} compared with {other}, {at:,} examples ({shown} examples{higher})",
        settled(gains),
    )


def fewer(
    runs: Sequence[Run], claim: str, way: str, other: str, key: str, unit: str, least: float
) -> Claim | None:
    """Judges whether a way takes several times fewer of something."""
    _, many = ends(runs)
    a, b = (by_data(runs, one, many, key) for one in (way, other))
    found = [float(np.median(b[data]) / np.median(a[data])) for data in a if data in b]
    if not found:
        return None
    return Claim(
        claim,
        f"{way}: {np.median(found):,.1f} times fewer {unit} than {other}, {many:,} examples "
        f"(at least {min(found):,.1f} times)",
        share(ratio >= least for ratio in found),
    )


def crossing(runs: Sequence[Run]) -> str:
    """Tells from how many examples fine-tuning has the higher mean."""
    means_of = {
        n: np.mean(means(gains))
        for n in sizes(runs)
        if (gains := differences(runs, w.DECAY, w.HEAD, n, points))
    }
    above = [n for n, mean in means_of.items() if mean > 0]
    return f"it has the higher mean from {above[0]:,}" if above else "it is never higher"


def by_round(runs: Sequence[Run], many: int) -> str:
    """Tells the mean accuracy after the first, the middle and the last round."""
    curves = [run["by_round"] for found in of_way(runs, w.EQUAL, many).values() for run in found]
    if not curves or min(map(len, curves)) < 2:
        return ""
    places = [0, min(map(len, curves)) // 2, -1]
    found = [f"{100 * np.mean([one[place] for one in curves]):.1f} %" for place in places]
    return f"; after the first, the middle and the last round {', '.join(found)}"
