"""What the comparison says in short: tables, advice, examples needed, where each paradigm lost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lib import charts, peers
from lib import differences as d
from lib import ways as w
from lib.journal import Run
from lib.scores import mean_and_deviation
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
    Column("training, GFLOP", "flops", 1e-9, ",.1f"),
    Column("peak memory, MiB", "memory"),
    Column("predicting, CPU ms", "predicting", 1, ".2f"),
    Column("bytes sent", "bytes"),
    Column("file, KB", "file", 1 / 1024),
    Column("latency of the file, ms", "latency", 1, ".2f"),
]
HEADER = ["way", "accuracy, %", "95 % interval", *(column.title for column in COLUMNS)]
Cell = tuple[str, float]  # what is shown, and the number by which it is sorted


def figures(runs: Sequence[Run]) -> list[Cell]:
    """Returns the cells of a row."""
    accuracies = [100 * run["accuracy"] for run in runs]
    mean, margin = statistics.mean(accuracies), charts.margin(accuracies)
    interval = f"{mean - margin:.1f} to {min(mean + margin, 100):.1f}" if len(runs) > 1 else "-"
    cells = [(mean_and_deviation(accuracies), mean), (interval, margin)]
    for column in COLUMNS:
        known = [run[column.key] for run in runs if run.get(column.key) is not None]
        if not known or (not any(known) and column.key == "bytes"):
            cells.append(("-", 0.0))
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
        found = {way: d.by_data(runs, way, examples, "accuracy") for way in main_ways()}
        known = [set(of) for of in found.values() if of]
        if not known:
            continue
        common = set.union(*known)
        means = {
            way: 100 * statistics.mean(d.means(of))
            for way, of in found.items()
            if set(of) == common
        }
        if not means:
            continue
        best = max(means, key=means.__getitem__)
        near = [way for way in means if way != best and means[way] >= means[best] - NEAR]
        also = f"; within a point: {', '.join(near)}" if near else ""
        cheap = min([best, *near], key=lambda way: d.middle(runs, way, examples, "cpu"))
        seconds = d.middle(runs, cheap, examples, "cpu")
        what = f"{len(common)} data sets" if len(common) > 1 else next(iter(common))
        lines.append(
            f"{examples:,} labelled examples ({what}): {best} has the highest mean accuracy "
            f"({means[best]:.1f} %){also}. Of these, {cheap} takes the least time: {seconds:.1f} "
            "CPU seconds."
        )
    return "\n".join(lines)


def needed(runs: Sequence[Run]) -> list[list[str]]:
    """Returns the examples from which a way reaches what "from scratch" does with the most."""
    rows = []
    names = list(dict.fromkeys(data for data, _ in sections_of(runs)))
    ways = [way for way in main_ways() if way not in (w.ONE_TASK, w.PRIVATE)]
    for data in names:
        known = [n for one, n in sections_of(runs) if one == data]
        found = {
            way: {
                n: 100 * float(of[data].mean())
                for n in known
                if data in (of := d.by_data(runs, way, n, "accuracy"))
            }
            for way in ways
        }
        if not found[w.SCRATCH]:
            continue
        target = found[w.SCRATCH][max(found[w.SCRATCH])]
        first = {
            way: next((f"{n:,}" for n, mean in by.items() if mean >= target), "more" * bool(by))
            for way, by in found.items()
        }
        rows.append([data, f"{target:.1f}", *(first[way] or "-" for way in ways)])
    return [["data set", "target, %", *ways], *rows]


def losses(runs: Sequence[Run]) -> list[str]:
    """Returns where each paradigm has a lower mean than what it should be better than."""
    lines = []
    for way, other in (
        (w.HEAD, w.SCRATCH), (w.TRANSFER, w.SCRATCH), (w.DECAY, w.HEAD), (w.LORA, w.HEAD),
        (w.MULTITASK, w.ONE_TASK), (w.EQUAL, w.CENTRAL), (w.PRIVATE, w.EQUAL),
    ):  # fmt: skip
        places = []
        for examples in d.sizes(runs):
            gains = d.differences(runs, way, other, examples, d.points)
            places += [
                (float(gain.mean()), f"{data} with {examples:,} examples")
                for data, gain in gains.items()
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
                rows.append([name, peer.of, of[0]["missing"], "-", "-", "-"])
            continue
        times = []
        for kind in ("cpu", "seconds"):
            middle, low, high = ratio(
                [run[kind] for run in done], [run["own"][kind] for run in done]
            )
            times.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        accuracies = [
            f"{100 * np.mean([one['accuracy'] for one in some]):.1f}"
            for some in (done, [run["own"] for run in done])
        ]
        rows.append([name, peer.of, *times, *accuracies])
    return rows


NEEDED_NOTE = (
    "The least number of labelled examples, of those that were run, with which the mean accuracy "
    'reaches that of "from scratch" with the most.'
)
PEER_HEADER = [
    "peer", "compared with", "CPU time, of ours", "time, of ours", "accuracy, %", "ours, %",
]  # fmt: skip
PEER_NOTE = (
    "Each peer and the way that is alike train in turn, in one process, on the same cases: medians "
    "of the ratios, with quartiles, over data sets and seeds. Above 1, ours is faster. Building, "
    "tracing and starting count; the processor time of Flower's workers does not."
)
