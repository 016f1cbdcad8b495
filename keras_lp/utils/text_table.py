"""Plain-text tables, and results that are displayed as tables."""

from __future__ import annotations

import html
from collections.abc import Sequence


class ShownAsText:
    """Base class of results: their repr, at a prompt and in a notebook, is their printed text."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def text_table(rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Returns rows of cells as text in aligned columns.

    Args:
        rows: rows with the same number of cells.
        left: number of leading columns that are left-aligned; the others are right-aligned.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
