"""The page of the comparison: one HTML file that needs no network, and the same in Markdown."""

from __future__ import annotations

import html
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_lp.utils.page import page, paragraphs
from lib import charts, claims, peers
from lib import comparison as c
from lib.journal import Run
from lib.results import RESULTS, table
from lib.scores import mean_and_deviation
from lib.timing import ratio

_SORTING = """<script>
document.querySelectorAll("table.sorts th").forEach(head => {
  const table = head.closest("table"), place = [...head.parentNode.children].indexOf(head);
  head.tabIndex = 0;
  const sort = () => {
    const rows = [...table.tBodies[0].rows], up = head.getAttribute("aria-sort") !== "ascending";
    const value = row => row.cells[place].dataset.value ?? row.cells[place].textContent;
    rows.sort((a, b) => (isNaN(value(a)) || isNaN(value(b))
      ? value(a).localeCompare(value(b)) : value(a) - value(b)) * (up ? 1 : -1));
    table.tBodies[0].append(...rows);
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
});
</script>
<style>
table.sorts th { cursor: pointer; white-space: normal; vertical-align: bottom; }
table.sorts td { text-align: right; padding: 4px 10px 4px 0; white-space: nowrap; }
table.sorts td:first-child { text-align: left; }
table.plain td { vertical-align: top; padding: 6px 12px 6px 0; min-width: 6rem; }
[aria-sort=ascending]::after { content: " ▲"; } [aria-sort=descending]::after { content: " ▼"; }
figure.chart { max-width: 44rem; } figure.chart > div { width: 100%; }
summary { cursor: pointer; margin: .5rem 0; }
@media (max-width: 600px) {
  table.stacks thead { display: none; }
  table.stacks tr { display: block; border-bottom: 1px solid var(--line); padding: 6px 0; }
  table.stacks td { display: block; padding: 2px 0; }
  table.stacks td:first-child { font-weight: 600; }
}
</style>"""
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
    for way in c.WAYS:
        own = claims.of_way(runs, way, examples).get(data)
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
    return [way for way, of in c.WAYS.items() if not of.rates]


def advice(runs: Sequence[Run]) -> str:
    """Returns what to use when, drawn from the figures: a line per number of examples."""
    lines = []
    for examples in claims.sizes(runs):
        found = {way: claims.by_data(runs, way, examples, "accuracy") for way in main_ways()}
        known = [set(of) for of in found.values() if of]
        if not known:
            continue
        common = set.union(*known)
        means = {
            way: 100 * statistics.mean(claims.means(of))
            for way, of in found.items()
            if set(of) == common
        }
        if not means:
            continue
        best = max(means, key=means.__getitem__)
        near = [way for way in means if way != best and means[way] >= means[best] - NEAR]
        also = f"; within a point: {', '.join(near)}" if near else ""
        cheap = min([best, *near], key=lambda way: claims.middle(runs, way, examples, "cpu"))
        seconds = claims.middle(runs, cheap, examples, "cpu")
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
    ways = [way for way in main_ways() if way not in (c.ONE_TASK, c.PRIVATE)]
    for data in names:
        known = [n for one, n in sections_of(runs) if one == data]
        found = {
            way: {
                n: 100 * float(of[data].mean())
                for n in known
                if data in (of := claims.by_data(runs, way, n, "accuracy"))
            }
            for way in ways
        }
        if not found[c.SCRATCH]:
            continue
        target = found[c.SCRATCH][max(found[c.SCRATCH])]
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
        (c.HEAD, c.SCRATCH), (c.TRANSFER, c.SCRATCH), (c.DECAY, c.HEAD), (c.LORA, c.HEAD),
        (c.MULTITASK, c.ONE_TASK), (c.EQUAL, c.CENTRAL), (c.PRIVATE, c.EQUAL),
    ):  # fmt: skip
        places = []
        for examples in claims.sizes(runs):
            gains = claims.differences(runs, way, other, examples, claims.points)
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


PEER_HEADER = [
    "peer", "compared with", "CPU time, of ours", "time, of ours", "accuracy, %", "ours, %",
]  # fmt: skip
PEER_NOTE = (
    "Each peer and the way that is alike train in turn, in one process, on the same cases: medians "
    "of the ratios, with quartiles, over data sets and seeds. Above 1, ours is faster."
)


def markdown(results: dict[str, Any]) -> str:
    """Returns the page in Markdown."""
    runs = results["runs"]
    blocks = ["# The paradigms compared", f"    {results['command']}", results["machine"] + "."]
    blocks += ["## What to use when", bullets(advice(runs).splitlines())]
    found = [list(claim) for claim in claims.judge(runs)]
    blocks += ["## Claims", table(["claim", "measured", "verdict"], found), claims.RULE]
    if losses(runs):
        blocks += ["## Where each paradigm lost", bullets(losses(runs))]
    header, *rows = needed(runs)
    if rows:
        blocks += ["## Examples needed", NEEDED_NOTE, table(header, rows)]
    if peer_rows(runs):
        blocks += ["## Peers", PEER_NOTE, table(PEER_HEADER, peer_rows(runs))]
    for data, examples in sections_of(runs):
        rows = rows_of(runs, data, examples)
        cells = [[way, *(cell for cell, _ in row)] for way, row in rows.items()]
        blocks += [f"## {data}, {examples:,} labelled examples", table(HEADER, cells)]
    return "\n\n".join([*blocks, "## How", results["method"]]) + "\n"


NEEDED_NOTE = (
    "The least number of labelled examples, of those that were run, with which the mean accuracy "
    'reaches that of "from scratch" with the most.'
)


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def html_page(results: dict[str, Any], folder: Path | None = None) -> str:
    """Returns the page.

    Args:
        results: see `lib.compare.write`.
        folder: where the page will be, from which it links to the results of the other scripts.
            Defaults to None: no links.
    """
    runs = results["runs"]
    sections: dict[str, Sequence[str]] = {"What to use when": [paragraphs(advice(runs))]}
    if any("way" in run for run in runs):
        sections["What to use when"] = [paragraphs(advice(runs)), charts.by_cost(runs)]
    found = [list(claim) for claim in claims.judge(runs)]
    sections["Claims"] = [
        _plain(["claim", "measured", "verdict"], found, "plain stacks"), paragraphs(claims.RULE)
    ]  # fmt: skip
    if losses(runs):
        sections["Where each paradigm lost"] = [paragraphs("\n".join(losses(runs)))]
    header, *rows = needed(runs)
    if rows:
        sections["Examples needed"] = [paragraphs(NEEDED_NOTE), _plain(header, rows)]
    if peer_rows(runs):
        sections["Peers"] = [paragraphs(PEER_NOTE), _plain(PEER_HEADER, peer_rows(runs))]
    for data in dict.fromkeys(data for data, _ in sections_of(runs)):
        parts = [charts.by_examples(runs, data), charts.by_rounds(runs, data)]
        for one, examples in sections_of(runs):
            if one == data:
                parts.append(
                    f"<details><summary>All figures, {examples:,} labelled examples</summary>"
                    f"{_sortable(rows_of(runs, data, examples))}</details>"
                )
        sections[data] = parts
    if folder is not None:
        sections["Results of the other scripts"] = [_links(folder)]
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    about = f"{results['machine']}.\n{results['command']}\nSeeds: {seeds}."
    method = paragraphs(results["method"].replace("\n", " "))
    sections["How"] = [paragraphs(about), method, _SORTING, charts.scripts()]
    return page("The paradigms compared", sections)


def _links(folder: Path) -> str:
    items = []
    for path in sorted(RESULTS.glob("*.md")):
        title = path.read_text().partition("\n")[0].removeprefix("# ")
        place = os.path.relpath(path, folder)
        items.append(f'<li><a href="{html.escape(place)}">{html.escape(title)}</a></li>')
    return f"<ul>{''.join(items)}</ul>"


def _plain(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "plain") -> str:
    """Returns a table of texts; of the kind `stacks`, cells are below each other on a phone."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    lines = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _sortable(rows: dict[str, list[Cell]]) -> str:
    """Returns a table that sorts by a column when its heading is clicked."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in HEADER)
    lines = []
    for way, cells in rows.items():
        shown = "".join(
            f'<td data-value="{value:.6g}">{html.escape(cell)}</td>' for cell, value in cells
        )
        lines.append(f"<tr><td>{html.escape(way)}</td>{shown}</tr>")
    return (
        f'<div class="wide"><table class="sorts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
