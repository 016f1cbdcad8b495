"""Tables as plain text, and results that show themselves as theirs."""

from __future__ import annotations

import html
from collections.abc import Sequence


class ShownAsText:
    """Base class of results: at a prompt and in a notebook they look as printed."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def text_table(rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Returns rows of cells in aligned columns.

    Args:
        rows: as many cells each.
        left: how many of the first columns start at the left; the others end at the right.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
