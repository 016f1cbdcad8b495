"""A self-contained page of audits."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_lp.utils.files import whole_file

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; padding: 1rem; border: 1px solid #8886; border-radius: 6px;
      font-size: 14px; line-height: 1.4; }
.pictures { overflow-x: auto; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: normal; padding: 4px 16px 4px 0; white-space: nowrap; }
td { padding: 4px; }
img { width: 84px; height: auto; image-rendering: pixelated; display: block; }
"""


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        verdict: sentences, one per line.
        table: a table as text.
        pictures: rows of a name and the PNG files of its pictures.
    """

    verdict: str
    table: str
    pictures: Sequence[tuple[str, Sequence[bytes]]] = ()


def write_page(path: str | os.PathLike[str], sections: Mapping[str, Section]) -> None:
    """Writes a page that needs no other file and no network.

    Args:
        path: the HTML file.
        sections: the parts by title.
    """
    body = "\n".join(_html(title, section) for title, section in sections.items())
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Privacy audit</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Privacy audit</h1>\n{body}\n</body>\n</html>\n"
    )
    with whole_file(path) as file:
        file.write(page.encode())


def picture(values: np.ndarray, low: float, high: float) -> bytes:
    """Returns an array `(height, width, channels)` as a PNG file."""
    scaled = np.clip((values - low) / max(high - low, 1e-30), 0, 1)
    if scaled.shape[-1] not in (1, 3):
        scaled = scaled.mean(-1, keepdims=True)
    content: bytes = tf.io.encode_png((255 * scaled).round().astype("uint8")).numpy()
    return content


def _html(title: str, section: Section) -> str:
    rows = []
    for name, pictures in section.pictures:
        cells = "".join(
            f'<td><img alt="{html.escape(name)}, example {i}" '
            f'src="data:image/png;base64,{base64.b64encode(content).decode()}"></td>'
            for i, content in enumerate(pictures, 1)
        )
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    table = f'<div class="pictures"><table>{"".join(rows)}</table></div>' if rows else ""
    verdict = "".join(f"<p>{html.escape(line)}</p>\n" for line in section.verdict.splitlines())
    return (
        f"<h2>{html.escape(title)}</h2>\n{verdict}{table}\n<pre>{html.escape(section.table)}</pre>"
    )
