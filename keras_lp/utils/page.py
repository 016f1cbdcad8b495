"""Self-contained HTML pages: text, tables, pictures and charts, without scripts and links."""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from keras_lp.utils.files import whole_file

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --first: #0072b2; --second: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --first: #56b4e9; --second: #e69f00; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; padding: 1rem; border: 1px solid var(--line); border-radius: 6px;
      font-size: 14px; line-height: 1.4; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: normal; padding: 4px 16px 4px 0; white-space: nowrap; }
td { padding: 4px; }
.matrix td, .matrix thead th { text-align: right; padding: 4px 8px; }
img { width: 84px; height: auto; image-rendering: pixelated; display: block; }
figure { margin: 1rem 0; max-width: 34rem; }
figcaption { font-size: 14px; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor; }
svg .axis { stroke: var(--line); fill: none; }
svg .phase { stroke: currentColor; stroke-dasharray: 2 3; fill: none; }
svg .line { fill: none; stroke-width: 2; }
svg .first { stroke: var(--first); } svg .second { stroke: var(--second); stroke-dasharray: 6 3; }
svg text.first { fill: var(--first); stroke: none; }
svg text.second { fill: var(--second); stroke: none; }
"""


def write_page(
    path: str | os.PathLike[str], title: str, sections: Mapping[str, Sequence[str]]
) -> None:
    """Writes a page that needs no other file and no network.

    Args:
        path: the HTML file.
        title: the title.
        sections: the parts of each section, HTML from the functions below, by heading.
    """
    with whole_file(path) as file:
        file.write(page(title, sections).encode())


def page(title: str, sections: Mapping[str, Sequence[str]]) -> str:
    """Returns the HTML of a page, see `write_page`."""
    body = "\n".join(
        f"<h2>{html.escape(heading)}</h2>\n" + "\n".join(parts)
        for heading, parts in sections.items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def paragraphs(text: str) -> str:
    """Returns a paragraph for each line of a text."""
    return "\n".join(f"<p>{html.escape(line)}</p>" for line in text.splitlines())


def preformatted(text: str) -> str:
    """Returns a text with its columns."""
    return f"<pre>{html.escape(text)}</pre>"


def pictures(rows: Sequence[tuple[str, Sequence[bytes]]]) -> str:
    """Returns a table of pictures.

    Args:
        rows: the name and the PNG files of each row.
    """
    lines = []
    for name, images in rows:
        cells = "".join(
            f'<td><img alt="{html.escape(name)}, example {i}" '
            f'src="data:image/png;base64,{base64.b64encode(content).decode()}"></td>'
            for i, content in enumerate(images, 1)
        )
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def picture(values: np.ndarray, low: float, high: float) -> bytes:
    """Returns an array `(height, width, channels)` as a PNG file."""
    scaled = np.clip((values.astype("float64") - low) / max(high - low, 1e-30), 0, 1)
    if scaled.shape[-1] not in (1, 3):
        scaled = scaled.mean(-1, keepdims=True)
    content: bytes = tf.io.encode_png((255 * scaled).round().astype("uint8")).numpy()
    return content


def matrix(counts: np.ndarray, names: Sequence[str], rows: str, columns: str) -> str:
    """Returns a table of counts, darker where the share of its row is larger.

    Args:
        counts: `(classes, classes)`.
        names: the names of the classes.
        rows: what a row is.
        columns: what a column is.
    """
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    lines = []
    for name, own in zip(names, counts, strict=True):
        shares = own / max(own.sum(), 1)
        cells = "".join(
            f'<td style="background: rgb(0 114 178 / {0.6 * share:.3f})">{count:,.0f}</td>'
            for count, share in zip(own, shares, strict=True)
        )
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    return (
        f"<p>Rows: {html.escape(rows)}. Columns: {html.escape(columns)}.</p>"
        f'<div class="wide"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def line_chart(
    series: Mapping[str, Sequence[float]],
    x_title: str,
    y_title: str,
    phases: Sequence[tuple[str, int]] = (),
) -> str:
    """Returns a chart of one or two series over 1, 2, ...; values that are not finite are left out.

    Args:
        series: values by name.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
        phases: name and length of each part, which lines divide. Defaults to (): no parts.
    """
    finite = [v for values in series.values() for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    span = (high - low) or abs(high) or 1.0
    length = max(2, *(len(values) for values in series.values()))

    def place(i: int, value: float) -> str:
        return f"{50 + 420 * i / (length - 1):.1f},{180 - 160 * (value - low) / span:.1f}"

    parts = [
        '<path class="axis" d="M50,15 V185 H475"/>',
        f'<text x="45" y="184" text-anchor="end">{low:.3g}</text>',
        f'<text x="45" y="24" text-anchor="end">{low + span:.3g}</text>',
        '<text x="50" y="200" text-anchor="middle">1</text>',
        f'<text x="470" y="200" text-anchor="middle">{length}</text>',
        f'<text x="260" y="214" text-anchor="middle">{html.escape(x_title)}</text>',
    ]
    for number, (name, values) in enumerate(series.items()):
        kind = ("first", "second")[number % 2]
        points = [place(i, v) for i, v in enumerate(values) if math.isfinite(v)]
        shown = f'<polyline class="line {kind}" points="{" ".join(points)}"/>'
        if len(points) == 1:
            x, y = points[0].split(",")
            shown = f'<circle class="{kind}" cx="{x}" cy="{y}" r="3"/>'
        label = f'<text class="{kind}" x="{60 + 130 * number}" y="12">{html.escape(name)}</text>'
        parts += [shown, label]
    done, named = 0, []
    for name, count in phases:
        if done:
            left = 50 + 420 * (done - 0.5) / (length - 1)
            parts.append(f'<path class="phase" d="M{left:.1f},15 V185"/>')
        named.append(f"{name}: {done + 1}" + (f" to {done + count}" if count > 1 else ""))
        done += count
    title = f"{y_title} ({x_title}s: {'; '.join(named)})" if phases else y_title
    caption = html.escape(f"{y_title} by {x_title}")
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 480 220" role="img" aria-label="{caption}">{"".join(parts)}</svg>'
        "</figure>"
    )
