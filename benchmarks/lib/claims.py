"""The claims of textbooks about the paradigms, judged by the runs of the comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lib import comparison as c
from lib.journal import Run
from lib.scores import deviation, verdict

HOLDS, PARTLY, NOT, UNKNOWN = "holds", "holds partly", "does not hold", "cannot be told here"
ENOUGH = 3  # values that tell a difference; data sets, else their seeds
NEAR = 2.0  # points within which two accuracies are about the same
By = dict[str, np.ndarray]  # by data set, a value per seed

RULE = (
    "A difference holds if zero is outside its 95 % interval (Student's t) over the data sets and "
    "it has this sign on each of them; with fewer than three data sets, over their seeds, of which "
    "three are needed. It holds partly if it has the other sign on some data set, or is told from "
    "zero by the seeds of single data sets only. A ratio holds if it is reached on each data set."
)


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
    yield compared(runs, "Transfer needs little data", c.HEAD, c.SCRATCH, few)
    for key, unit in (("cpu", "CPU seconds"), ("flops", "floating-point operations")):
        name = f"Transfer costs little computation: {unit}"
        yield fewer(runs, name, c.HEAD, c.DECAY, key, unit, 2)


def finetuning(runs: Sequence[Run]) -> Iterable[Claim | None]:
    few, many = ends(runs)
    yield compared(runs, "Fine-tuning beats a head where data is plenty", c.DECAY, c.HEAD, many)
    gains = [differences(runs, c.DECAY, c.HEAD, n, points) for n in (few, many)]
    both = {data: gains[1][data] - gains[0][data] for data in gains[1] if data in gains[0]}
    if both and few != many:
        yield Claim(
            "Fine-tuning wants more data than a head",
            f"its advantage over a solved head grows by {spread(both)} from {few} to {many:,} "
            f"examples; {crossing(runs)}",
            settled(both),
        )
    gaps = differences(runs, c.ONE_RATE, c.HEAD, few, lambda run: 100 * run["gap"])
    if gaps:
        yield Claim(
            "Fine-tuning overfits when data is scarce",
            f"its gap between training and test accuracy is {spread(gaps)} larger than that of a "
            f"solved head, {few} examples",
            settled(gaps),
        )
    yield rates(runs)
    yield fewer(
        runs, "LoRA trains a small fraction of the weights", c.LORA, c.ONE_RATE, "trained",
        "trained weights", 2,
    )  # fmt: skip
    near = differences(runs, c.LORA, c.ONE_RATE, many, points)
    if near:
        losses = ", ".join(f"{n:,}: {middle(runs, c.LORA, n, 'loss'):.2f}" for n in sizes(runs))
        yield Claim(
            "LoRA needs few hundred to few thousand examples",
            f"LoRA {spread(near)} compared with all weights, {many:,} examples; its held-out loss "
            f"by examples: {losses}",
            share(mean >= -NEAR for mean in means(near)),
        )


def multitask(runs: Sequence[Run]) -> Iterable[Claim | None]:
    few, many = ends(runs)
    yield compared(
        runs, "A task with few labels profits from another", c.MULTITASK, c.ONE_TASK, few
    )
    for key, unit in (("file", "the bytes of the file"), ("cpu", "the CPU seconds")):
        one, both = (by_data(runs, way, many, key) for way in (c.ONE_TASK, c.MULTITASK))
        found = [np.median(both[data]) / (2 * np.median(one[data])) for data in one if data in both]
        if found:
            yield Claim(
                f"One model of two tasks is cheaper than two: {unit}",
                f"{np.median(found):.2f} times {unit} of two models",
                share(ratio < 1 for ratio in found),
            )


def federated(runs: Sequence[Run]) -> Iterable[Claim | None]:
    _, many = ends(runs)
    near = differences(runs, c.EQUAL, c.CENTRAL, many, points)
    if near:
        yield Claim(
            "Federated averaging approaches the centralised model",
            f"equal parts {spread(near)} compared with one place, {many:,} examples"
            f"{by_round(runs, many)}",
            share(abs(mean) <= NEAR for mean in means(near)),
        )
    yield compared(runs, "It suffers where clients have few classes", c.EQUAL, c.SKEWED, many)
    sent, data = (by_data(runs, c.EQUAL, many, key) for key in ("bytes", "data"))
    if sent:
        whole = [float(np.median(sent[name] / data[name])) for name in sent]
        one = [
            float(np.median(sent[name] / by_data(runs, c.EQUAL, many, "rounds")[name] / data[name]))
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
        for data, found in of_way(runs, c.SKEWED, many).items()
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
        run["read"] for found in of_way(runs, c.EQUAL, many).values() for run in found
        if "read" in run
    ]  # fmt: skip
    cost = differences(runs, c.PRIVATE, c.EQUAL, many, points)
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
    ways = [("", ""), *(((f", rate {rate:g}",) * 2) for rate in c.RATES)]
    middle_size = {
        run["examples"] for run in runs if c.WAYS.get(run.get("way"), c.WAYS[c.HEAD]).rates
    }
    if not middle_size:
        return None
    (examples,) = middle_size
    gains = [
        differences(runs, f"{c.DECAY}{more}", f"{c.ONE_RATE}{more}", examples, points)
        for more, _ in ways
    ]
    common = set.intersection(*(set(one) for one in gains))
    if not common:
        return None
    mean = {data: np.mean([one[data] for one in gains], axis=0) for data in sorted(common)}
    each = ", ".join(
        f"{np.mean(means(one)):+.1f} at {rate}"
        for rate, one in sorted(
            zip((0.001, *c.RATES), gains, strict=True), key=lambda pair: pair[0]
        )
    )
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
        if (gains := differences(runs, c.DECAY, c.HEAD, n, points))
    }
    above = [n for n, mean in means_of.items() if mean > 0]
    return f"it has the higher mean from {above[0]:,}" if above else "it is never higher"


def by_round(runs: Sequence[Run], many: int) -> str:
    """Tells the mean accuracy after the first, the middle and the last round."""
    curves = [run["by_round"] for found in of_way(runs, c.EQUAL, many).values() for run in found]
    if not curves or min(map(len, curves)) < 2:
        return ""
    places = [0, min(map(len, curves)) // 2, -1]
    found = [f"{100 * np.mean([one[place] for one in curves]):.1f} %" for place in places]
    return f"; after the first, the middle and the last round {', '.join(found)}"


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
