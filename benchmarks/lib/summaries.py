"""What the comparison says in short: tables, advice, examples needed, where each paradigm lost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lib import differences as d
from lib import peers
from lib import ways as w
from lib.journal import Run
from lib.scores import margin, mean_and_deviation
from lib.timing import ratio

NEAR = 1.0  # points within which ways are named together


class Column(NamedTuple):
    """A column of the tables.

    Attributes:
        title: its heading.
        key: what it shows of the runs.
        factor: by which the values are multiplied.
        form: how a value is written.
        mean: whether it is the mean of the runs, not the median.
    """

    title: str
    key: str
    factor: float = 1.0
    form: str = ",.0f"
    mean: bool = False


COLUMNS = [
    Column("balanced accuracy, %", "balanced", 100, ".1f", mean=True),
    Column("AUC", "auc", 1, ".3f", mean=True),
    Column("cross-entropy", "loss", 1, ".2f"),
    Column("calibration error", "calibration", 1, ".3f"),
    Column("train minus test, points", "gap", 100, "+.1f"),
    Column("forgotten, points", "forgotten", 100, "+.1f", mean=True),
    Column("trained weights", "trained"),
    Column("CPU seconds", "cpu", 1, ".1f"),
    Column("training without a solver, GFLOP", "flops", 1e-9, ",.1f"),
    Column("peak memory, MiB", "memory"),
    Column("predicting an example, CPU ms", "predicting", 1, ".2f"),
    Column("bytes sent", "bytes"),
    Column("file, KB", "file", 1 / 1024),
    Column("latency of the file, ms", "latency", 1, ".2f"),
]
HEADER = ["way", "accuracy, %", "95 % interval", *(column.title for column in COLUMNS)]
Cell = tuple[str, float | None]  # what is shown, and the number by which it is sorted


def figures(runs: Sequence[Run]) -> list[Cell]:
    """Returns the cells of a row."""
    accuracies = [100 * run["accuracy"] for run in runs]
    mean, half = statistics.mean(accuracies), margin(accuracies)
    low, high = max(mean - half, 0), min(mean + half, 100)
    interval: Cell = (f"{low:.1f} to {high:.1f}", low) if len(runs) > 1 else ("-", None)
    cells: list[Cell] = [(mean_and_deviation(accuracies), mean), interval]
    for column in COLUMNS:
        known = [run[column.key] for run in runs if run.get(column.key) is not None]
        if not known or (not any(known) and column.key == "bytes"):
            cells.append(("-", None))
            continue
        value = column.factor * (statistics.mean if column.mean else statistics.median)(known)
        cells.append((format(value, column.form), value))
    return cells


def rows_of(runs: Sequence[Run], data: str, examples: int) -> dict[str, list[Cell]]:
    """Returns the row of each way."""
    found = {}
    for way in w.WAYS:
        own = d.of_way(runs, way, examples).get(data)
        if own:
            found[way] = figures(own)
    return found


def sections_of(runs: Sequence[Run]) -> list[tuple[str, int]]:
    """Returns the pairs of data set and number of examples, in the order of the runs."""
    names = list(dict.fromkeys(run["data_set"] for run in runs))
    found = {(run["data_set"], run["examples"]) for run in runs if "way" in run}
    return sorted(found, key=lambda pair: (names.index(pair[0]), pair[1]))


def main_ways() -> list[str]:
    """Returns the ways without those that only compare rates."""
    return [way for way, of in w.WAYS.items() if not of.rates]


def advice(runs: Sequence[Run]) -> str:
    """Returns what to use when, drawn from the figures: a line per number of examples."""
    lines = []
    for examples in d.sizes(runs):
        found = {way: d.values(runs, way, examples, d.points) for way in main_ways()}
        found = {way: of for way, of in found.items() if of}
        common = set.intersection(*map(set, found.values())) if found else set()
        if not common:
            continue
        kept = {way: {data: of[data] for data in common} for way, of in found.items()}
        means = {way: d.mean(of) for way, of in kept.items()}
        seconds = {
            way: d.mean({data: d.values(runs, way, examples, "cpu")[data] for data in common})
            for way in means
        }
        best = max(means, key=means.__getitem__)
        near = [way for way in means if way != best and means[way] >= means[best] - NEAR]
        cheap = min([best, *near], key=seconds.__getitem__)
        cost = f"{seconds[cheap]:.1f} CPU seconds"
        which = f"; within a point: {', '.join(near)}. The cheapest of these is {cheap}, {cost}"
        what = f"{len(common)} data sets" if len(common) > 1 else next(iter(common))
        lines.append(
            f"{examples:,} labelled examples ({what}): {best} has the highest mean accuracy, "
            f"{means[best]:.1f} %{which if near else f', with {cost}'}.{winners(found)}"
        )
    lines.append("Rates were chosen on digits, not for each data set.")
    return "\n".join(lines)


def winners(found: dict[str, d.Values]) -> str:
    """Tells on which data sets which way has the highest mean, if there are several data sets."""
    means = {way: d.means(of) for way, of in found.items()}
    names = list(dict.fromkeys(data for of in means.values() for data in of))
    if len(names) < 2:
        return ""
    best: dict[str, list[str]] = {}
    for data in names:
        way = max((way for way in means if data in means[way]), key=lambda way: means[way][data])
        best.setdefault(way, []).append(data)
    listed = "; ".join(f"{way} on {', '.join(sets)}" for way, sets in best.items())
    return f" The highest on each data set: {listed}."


def needed(runs: Sequence[Run]) -> list[list[str]]:
    """Returns the examples from which a way reaches what "from scratch" does with the most."""
    rows = []
    ways = [way for way in main_ways() if way not in (w.ONE_TASK, w.PRIVATE)]
    for data in dict.fromkeys(data for data, _ in sections_of(runs)):
        by_way: dict[str, dict[int, float]] = {way: {} for way in ways}
        trained = 0.0  # accuracy from scratch on the training examples
        for n in [n for one, n in sections_of(runs) if one == data]:
            for way in ways:
                own = d.of_way(runs, way, n).get(data)
                if own:
                    by_way[way][n] = statistics.mean(d.points(run) for run in own)
                if own and way == w.SCRATCH:
                    trained = statistics.mean(run["accuracy"] + run["gap"] for run in own)
        if trained < LEARNED:
            continue
        target = by_way[w.SCRATCH][max(by_way[w.SCRATCH])]
        first = [
            next((f"{n:,}" for n, mean in of.items() if mean >= target), "more" if of else "-")
            for of in by_way.values()
        ]
        rows.append([data, f"{target:.1f}", *first])
    return [["data set", "target, %", *ways], *rows]


def losses(runs: Sequence[Run]) -> list[str]:
    """Returns where each paradigm has a lower mean than its alternative."""
    lines = []
    for way, other in (
        (w.HEAD, w.SCRATCH), (w.TRANSFER, w.SCRATCH), (w.DECAY, w.HEAD), (w.LORA, w.HEAD),
        (w.MULTITASK, w.ONE_TASK), (w.EQUAL, w.CENTRAL), (w.SKEWED, w.CENTRAL),
    ):  # fmt: skip
        places = [
            (mean, f"{data} with {examples:,} examples")
            for examples in d.sizes(runs)
            for data, mean in d.means(d.differences(runs, way, other, examples)).items()
        ]
        lost = sorted(place for place in places if place[0] < 0)
        if lost:
            shown = ", ".join(f"{where} ({mean:+.1f})" for mean, where in lost[:4])
            rest = f", and {len(lost) - 4} more" if len(lost) > 4 else ""
            lines.append(
                f"{way}, compared with {other}: lower in {len(lost)} of {len(places)} cases, in "
                f"points: {shown}{rest}."
            )
    return lines


def peer_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Returns a row per peer: times relative to the way that is alike, and both accuracies."""
    rows = []
    for name, peer in peers.PEERS.items():
        of = [run for run in runs if run.get("peer") == name]
        done = [run for run in of if "missing" not in run]
        if not done:
            if of:
                rows.append([name, peer.of, of[0]["missing"], *"-----"])
            continue
        own = [run["own"] for run in done]
        times = []
        for kind in ("cpu", "seconds"):
            middle, low, high = ratio([run[kind] for run in done], [run[kind] for run in own])
            times.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        if not peer.counted:
            times[0] = "-"
        change = [d.points(one) - d.points(other) for one, other in zip(done, own, strict=True)]
        accuracies = [f"{np.mean([d.points(run) for run in some]):.1f}" for some in (done, own)]
        spans = f"{min(change):+.1f} to {max(change):+.1f}"
        rows.append([name, peer.of, *times, *accuracies, spans, str(len(done))])
    return rows


LEARNED = 0.9  # training accuracy from which "from scratch" has learned
NEEDED_NOTE = (
    "The least number of labelled examples, of those that were run, with which the mean accuracy "
    'reaches that of "from scratch" with the most. Data sets are left out on which "from scratch" '
    "does not reach 90 % of its own training examples in these steps."
)
PEER_HEADER = [
    "peer", "compared with", "CPU time, of ours", "time, of ours", "accuracy, %", "ours, %",
    "difference, points", "cases",
]  # fmt: skip
PEER_NOTE = (
    "Each peer and the way that is alike train in turn, in one process, on the same cases of 100 "
    "examples: medians of the ratios, with quartiles, over data sets and seeds. Above 1, ours is "
    "faster. Building, tracing and starting count, imports do not."
)
