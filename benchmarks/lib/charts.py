"""Charts of the comparison: specifications of Vega-Lite, drawn by its scripts within the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib import ways as w
from lib.journal import Run
from lib.scores import deviation

# Colours that colour-blind people tell apart (Okabe and Ito), and dashes.
LINES = {
    w.SCRATCH: ("#999999", [2, 3]),
    w.HEAD: ("#0072b2", [1, 0]),
    w.TRANSFER: ("#56b4e9", [6, 3]),
    w.DECAY: ("#d55e00", [1, 0]),
    w.LORA: ("#009e73", [6, 3]),
    w.MULTITASK: ("#e69f00", [1, 0]),
    w.EQUAL: ("#cc79a7", [8, 3, 2, 3]),
}
_ROUNDS = {
    w.EQUAL: ("#cc79a7", [1, 0]),
    w.SKEWED: ("#0072b2", [6, 3]),
    w.PRIVATE: ("#d55e00", [2, 3]),
    w.CENTRAL: ("#999999", [8, 3]),
}
_TEXT = {"labelColor": "currentColor", "titleColor": "currentColor", "labelLimit": 300}
_CONFIG = {
    "background": None,
    "view": {"stroke": None},
    "axis": {**_TEXT, "gridColor": "#8884", "domainColor": "#888", "tickColor": "#888"},
    "legend": {**_TEXT, "orient": "bottom", "columns": 2, "symbolOpacity": 1},
    "font": "system-ui, sans-serif",
}


def scripts() -> str:
    """Returns what draws the charts of the page, with Vega-Lite and what it needs."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    draw = (
        'document.querySelectorAll(".chart").forEach(place => vegaEmbed(place.querySelector("div"),'
        ' JSON.parse(place.querySelector("script").textContent),'
        ' {renderer: "svg", actions: false}));'
    )
    bundle = bundle.replace("</script", "<\\/script")
    return f"<script>{bundle}</script><script>{draw}</script>"


def chart(spec: dict[str, Any], caption: str) -> str:
    """Returns the place of a chart."""
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": 300,
        "autosize": {"type": "fit", "contains": "padding"},
        "description": caption,
        "config": _CONFIG,
        **spec,
    }
    text = json.dumps(whole).replace("</", "<\\/")
    return (
        f'<figure class="chart"><div></div><script type="application/json">{text}</script>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _colours(lines: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    known = [name for name in lines if name in names]
    colours = {"domain": known, "range": [lines[name][0] for name in known]}
    dashes = {"domain": known, "range": [lines[name][1] for name in known]}
    return {
        "color": {"field": "way", "type": "nominal", "title": None, "scale": colours},
        "strokeDash": {"field": "way", "type": "nominal", "title": None, "scale": dashes},
    }


def by_examples(runs: Sequence[Run], data: str) -> str:
    """Returns accuracy by the number of examples, with bands of the standard deviation."""
    rows = []
    for way in LINES:
        of = [run for run in runs if (run.get("way"), run["data_set"]) == (way, data)]
        for examples in sorted({run["examples"] for run in of}):
            found = [100 * run["accuracy"] for run in of if run["examples"] == examples]
            mean, spread = float(np.mean(found)), deviation(found)
            row = {"way": way, "examples": examples, "accuracy": mean}
            rows.append({**row, "low": mean - spread, "high": min(mean + spread, 100)})
    sizes = sorted({row["examples"] for row in rows})
    x = {
        "field": "examples", "type": "quantitative", "title": "labelled examples",
        "scale": {"type": "log"}, "axis": {"values": sizes, "grid": False},
    }  # fmt: skip
    y = {"field": "accuracy", "type": "quantitative", "title": "test accuracy, %"}
    lines = _colours(LINES, [row["way"] for row in rows])
    tip = [
        {"field": "way"},
        {"field": "examples", "type": "quantitative"},
        {"field": "accuracy", "type": "quantitative", "format": ".1f"},
    ]
    band = {**y, "field": "low", "scale": {"zero": False}}

    def seen(most: float, least: float) -> dict[str, Any]:
        """Opacities: of the way that was chosen in the legend, and of the others."""
        return {"condition": {"param": "chosen", "value": most}, "value": least}

    spec = {
        "data": {"values": rows},
        "encoding": {"x": x, "color": lines["color"]},
        "layer": [
            {
                "params": [
                    {
                        "name": "chosen",
                        "select": {"type": "point", "fields": ["way"]},
                        "bind": "legend",
                    }
                ],
                "mark": {"type": "line"},
                "encoding": {"y": y, "strokeDash": lines["strokeDash"], "opacity": seen(1, 0.1)},
            },
            {
                "mark": {"type": "area"},
                "encoding": {"y": band, "y2": {"field": "high"}, "opacity": seen(0.1, 0)},
            },
            {
                "mark": {"type": "point", "filled": True},
                "encoding": {"y": y, "tooltip": tip, "opacity": seen(1, 0.1)},
            },
        ],
    }
    return chart(
        spec,
        f"{data}: mean and standard deviation over the seeds. Click a name to see it alone.",
    )


def by_rounds(runs: Sequence[Run], data: str) -> str:
    """Returns accuracy by round with the most examples; nothing without federations."""
    of = [run for run in runs if run["data_set"] == data and run.get("way") in _ROUNDS]
    of = [run for run in of if run["examples"] == max(run["examples"] for run in of)]
    rows = []
    rounds = max((len(run.get("by_round", [])) for run in of), default=0)
    if rounds < 2:
        return ""
    for way in _ROUNDS:
        curves = [
            run.get("by_round") or [run["accuracy"]] * rounds for run in of if run["way"] == way
        ]
        for i in range(min(map(len, curves), default=0)):
            mean = 100 * float(np.mean([curve[i] for curve in curves]))
            rows.append({"way": way, "round": i + 1, "accuracy": mean})
    x = {"field": "round", "type": "quantitative", "title": "round", "axis": {"tickMinStep": 1}}
    y = {
        "field": "accuracy", "type": "quantitative", "title": "test accuracy, %",
        "scale": {"zero": False},
    }  # fmt: skip
    spec = {
        "data": {"values": rows},
        "mark": {"type": "line", "tooltip": True},
        "encoding": {"x": x, "y": y, **_colours(_ROUNDS, [row["way"] for row in rows])},
    }
    return chart(spec, f"{data}, {of[0]['examples']:,} examples: mean over the seeds, by round.")


def by_cost(runs: Sequence[Run]) -> str:
    """Returns accuracy by processor time with the most examples, means over the data sets."""
    most = max(run["examples"] for run in runs)
    by_way = {
        way: [run for run in runs if run.get("way") == way and run["examples"] == most]
        for way in LINES
    }
    sets = [{run["data_set"] for run in of} for of in by_way.values() if of]
    common = set.intersection(*sets) if sets else set()
    rows = []
    for way, some in by_way.items():
        of = [run for run in some if run["data_set"] in common]
        if of:
            cost = float(np.exp(np.mean(np.log([max(run["cpu"], 1e-3) for run in of]))))
            accuracy = 100 * float(np.mean([run["accuracy"] for run in of]))
            rows.append({"way": way, "cpu": cost, "accuracy": accuracy})
    x = {
        "field": "cpu", "type": "quantitative", "title": "CPU seconds to train",
        "scale": {"type": "log"}, "axis": {"format": "~g"},
    }  # fmt: skip
    y = {
        "field": "accuracy", "type": "quantitative", "title": "test accuracy, %",
        "scale": {"zero": False},
    }  # fmt: skip
    colour = _colours(LINES, [row["way"] for row in rows])["color"]
    shape = {**colour, "scale": {"domain": colour["scale"]["domain"]}}
    spec = {
        "data": {"values": rows},
        "mark": {"type": "point", "filled": True, "size": 140, "tooltip": True},
        "encoding": {"x": x, "y": y, "color": colour, "shape": shape},
    }
    return chart(spec, f"{most:,} examples: means over {', '.join(sorted(common))}.")
