"""The page of the comparison: one HTML file that needs no network, and the same in Markdown."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_lp.utils.page import page, paragraphs
from lib import charts, claims
from lib.differences import RULE
from lib.results import RESULTS, table
from lib.summaries import (
    HEADER,
    NEEDED_NOTE,
    PEER_HEADER,
    PEER_NOTE,
    Cell,
    advice,
    losses,
    needed,
    peer_rows,
    rows_of,
    sections_of,
)

_SORTING = """<script>
document.querySelectorAll("table.sorts th").forEach(head => {
  const table = head.closest("table"), place = [...head.parentNode.children].indexOf(head);
  head.tabIndex = 0;
  const sort = () => {
    const rows = [...table.tBodies[0].rows], up = head.getAttribute("aria-sort") !== "ascending";
    const value = row => row.cells[place].dataset.value ?? row.cells[place].textContent;
    rows.sort((a, b) => value(a) === "" || value(b) === ""
      ? (value(a) === "") - (value(b) === "")  // what is missing comes last
      : (isNaN(value(a)) ? value(a).localeCompare(value(b)) : value(a) - value(b))
        * (up ? 1 : -1));
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


def markdown(results: dict[str, Any]) -> str:
    """Returns the page in Markdown."""
    runs = results["runs"]
    blocks = ["# The paradigms compared", f"    {results['command']}", results["machine"] + "."]
    blocks += ["## What to use when", bullets(advice(runs).splitlines())]
    found = [list(claim) for claim in claims.judge(runs)]
    blocks += ["## Claims", table(["claim", "measured", "verdict"], found), RULE]
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
        _plain(["claim", "measured", "verdict"], found, "plain stacks"), paragraphs(RULE)
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
    """Returns links to the results of the other scripts, with the machine that each ran on."""
    items = []
    for path in sorted(RESULTS.glob("*.md")):
        text = path.read_text()
        title = text.partition("\n")[0].removeprefix("# ")
        machine = re.search(r"\d+ cores of [^,;]+, \d+ GPU", text)
        where = f" ({machine[0]})" if machine else ""
        place = os.path.relpath(path, folder)
        items.append(f'<li><a href="{html.escape(place)}">{html.escape(title)}</a>{where}</li>')
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
            f'<td data-value="{"" if value is None else format(value, ".6g")}">'
            f"{html.escape(cell)}</td>"
            for cell, value in cells
        )
        lines.append(f"<tr><td>{html.escape(way)}</td>{shown}</tr>")
    return (
        f'<div class="wide"><table class="sorts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
