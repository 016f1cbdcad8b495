"""The page of the comparison: one HTML file that needs no network, and the same in Markdown."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from typing import Any

from keras_lp.utils.page import page, paragraphs
from lib import comparison as c
from lib.claims import judge
from lib.journal import Run
from lib.results import table
from lib.scores import deviation, mean_and_deviation

# Colours that colour-blind people tell apart (Okabe and Ito), one per line, and dashes.
_LINES = {
    c.SCRATCH: ("#999999", "2 3"),
    c.HEAD: ("#0072b2", ""),
    c.TRANSFER: ("#56b4e9", "6 3"),
    c.DECAY: ("#d55e00", ""),
    c.LORA: ("#009e73", "6 3"),
    c.EQUAL: ("#cc79a7", "8 3 2 3"),
}
_SORTING = """<script>
document.querySelectorAll("table.sorts th").forEach((head, column) => {
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
table.sorts td:first-child { text-align: left; white-space: nowrap; }
[aria-sort=ascending]::after { content: " ▲"; } [aria-sort=descending]::after { content: " ▼"; }
</style>"""
HEADER = [
    "way", "accuracy, %", "cross-entropy", "calibration error", "train minus test, points",
    "trained weights", "CPU seconds", "predicting, CPU ms", "bytes sent", "forgotten, points",
    "file, KB",
]  # fmt: skip


def figures(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """Returns the cells of a row and the numbers by which they are sorted."""

    def values(key: str) -> list[float]:
        return [run[key] for run in runs]

    accuracies = [100 * value for value in values("accuracy")]
    cells = [(mean_and_deviation(accuracies), statistics.mean(accuracies))]
    for key, factor, form in (
        ("loss", 1, ".2f"), ("calibration", 1, ".3f"), ("gap", 100, "+.1f"),
        ("trained", 1, ",.0f"), ("cpu", 1, ".1f"), ("predicting", 1, ".2f"), ("bytes", 1, ",.0f"),
    ):  # fmt: skip
        value = factor * statistics.median(values(key))
        cells.append((format(value, form) if value or key != "bytes" else "-", value))
    known = [run["forgotten"] for run in runs if "forgotten" in run]
    cells.append(
        (f"{100 * statistics.mean(known):+.1f}", 100 * statistics.mean(known))
        if known
        else ("-", 0)
    )
    size = statistics.median(values("file")) / 1024
    return [*cells, (f"{size:,.0f}", size)]


def rows_of(runs: Sequence[Run], data: str, examples: int) -> dict[str, list[tuple[str, float]]]:
    found = {}
    for way in c.WAYS:
        own = [
            run
            for run in runs
            if (run["way"], run["data_set"], run["examples"]) == (way, data, examples)
        ]
        if own:
            found[way] = figures(own)
    return found


def sections_of(runs: Sequence[Run]) -> list[tuple[str, int]]:
    return sorted({(run["data_set"], run["examples"]) for run in runs})


def advice(runs: Sequence[Run]) -> str:
    """Returns what to use when, drawn from the figures."""
    lines = []
    for data, examples in sections_of(runs):
        rows = rows_of(runs, data, examples)
        best = max(rows, key=lambda way: rows[way][0][1])
        top = rows[best][0][0]
        near = [way for way in rows if way != best and rows[way][0][1] >= rows[best][0][1] - 1]
        also = f"; within a point: {', '.join(near)}" if near else ""
        worst = min(rows, key=lambda way: rows[way][0][1])
        lines.append(
            f"{data}, {examples} labelled examples: {best} has the highest mean ({top} %){also}; "
            f"{worst} has the lowest ({rows[worst][0][0]} %)."
        )
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    runs = results["runs"]
    blocks = ["# The paradigms compared", f"    {results['command']}", results["machine"] + "."]
    blocks.append("\n".join(f"- {line}" for line in advice(runs).splitlines()))
    for data, examples in sections_of(runs):
        rows = rows_of(runs, data, examples)
        cells = [[way, *(cell for cell, _ in row)] for way, row in rows.items()]
        blocks += [f"## {data}, {examples} labelled examples", table(HEADER, cells)]
    claims = [list(claim) for claim in judge(runs)]
    blocks += ["## Claims", table(["claim", "measured", "verdict"], claims), results["method"]]
    return "\n\n".join(blocks) + "\n"


def html_page(results: dict[str, Any]) -> str:
    runs = results["runs"]
    sections: dict[str, Sequence[str]] = {"What to use when": [paragraphs(advice(runs))]}
    for data in sorted({run["data_set"] for run in runs}):
        sections[f"{data}: accuracy by labelled examples"] = [_chart(runs, data)]
    for data, examples in sections_of(runs):
        rows = rows_of(runs, data, examples)
        sections[f"{data}, {examples} labelled examples"] = [_sortable(rows)]
    claims = "".join(
        f"<tr>{''.join(f'<td>{html.escape(part)}</td>' for part in claim)}</tr>"
        for claim in judge(runs)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("claim", "measured", "verdict"))
    sections["Claims"] = [
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{claims}</tbody></table></div>"
    ]
    about = [paragraphs(f"{results['machine']}.\n{results['command']}")]
    sections["How"] = [*about, paragraphs(results["method"].replace("\n", " ")), _SORTING]
    return page("The paradigms compared", sections)


def _sortable(rows: dict[str, list[tuple[str, float]]]) -> str:
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


def _chart(runs: Sequence[Run], data: str) -> str:
    """Returns accuracy by the number of examples, with bars of the standard deviation."""
    sizes = sorted({run["examples"] for run in runs if run["data_set"] == data})
    points: dict[str, list[tuple[int, float, float]]] = {}
    for way in _LINES:
        for i, examples in enumerate(sizes):
            own = [
                100 * run["accuracy"]
                for run in runs
                if (run["way"], run["data_set"], run["examples"]) == (way, data, examples)
            ]
            if own:
                spread = deviation(own) if len(own) > 1 else 0.0
                points.setdefault(way, []).append((i, statistics.mean(own), spread))
    if not points:
        return ""
    low = min(mean - spread for line in points.values() for _, mean, spread in line)
    low = 10 * (low // 10)

    def x(i: float) -> float:
        return 60 + 360 * i / max(len(sizes) - 1, 1)

    def y(value: float) -> float:
        return 260 - 240 * (value - low) / (100 - low)

    parts = ['<path class="axis" d="M60,20 V260 H430"/>']
    for value in (low, (low + 100) / 2, 100):
        parts.append(f'<text x="54" y="{y(value) + 4:.0f}" text-anchor="end">{value:.0f}</text>')
    for i, examples in enumerate(sizes):
        parts.append(f'<text x="{x(i):.0f}" y="276" text-anchor="middle">{examples}</text>')
    parts.append('<text x="245" y="296" text-anchor="middle">labelled examples</text>')
    parts.append('<text x="14" y="140" transform="rotate(-90 14 140)">accuracy, %</text>')
    for number, (way, line) in enumerate(points.items()):
        colour, dashes = _LINES[way]
        path = " ".join(f"{x(i):.1f},{y(mean):.1f}" for i, mean, _ in line)
        style = f'style="stroke: {colour}; stroke-dasharray: {dashes or "none"}"'
        parts.append(f'<polyline class="line" {style} points="{path}"/>')
        for i, mean, spread in line:
            ends = y(min(mean + spread, 100)), y(mean - spread)
            parts.append(
                f'<path style="stroke: {colour}" d="M{x(i):.1f},{ends[0]:.1f} V{ends[1]:.1f}"/>'
            )
        height = 150 + 18 * number
        parts.append(f'<path class="line" {style} d="M300,{height} H330"/>')
        parts.append(f'<text x="336" y="{height + 4}">{html.escape(way)}</text>')
    name = html.escape(f"Accuracy by labelled examples on {data}")
    return (
        f'<figure><svg viewBox="0 0 480 300" role="img" aria-label="{name}">{"".join(parts)}</svg>'
        "<figcaption>Mean and standard deviation over the seeds.</figcaption></figure>"
    )
