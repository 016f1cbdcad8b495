"""Results: Markdown tables, the page of a study, and the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(title: str, command: str, machine: str, doc: str, *blocks: str) -> str:
    """Returns the Markdown page of a study.

    Args:
        title: the heading.
        command: the command that repeats the study.
        machine: see `lib.machine.machine`.
        doc: the docstring of the script: what follows its question and its command is shown.
        *blocks: paragraphs and tables.
    """
    method = [part.strip("\n") for part in doc.split("\n\n")[2:]]
    start = [f"# {title}", f"    {command}", f"Machine: {machine}."]
    return "\n\n".join([*start, *method, *blocks]).rstrip() + "\n"


def write(stem: Path, markdown: str, numbers: dict[str, Any]) -> None:
    """Writes `stem`.md and `stem`.json, and prints the page."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(markdown.rstrip() + "\n")
    stem.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\n{markdown}\nWritten to {stem}.md and .json")
