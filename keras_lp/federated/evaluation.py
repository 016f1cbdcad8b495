"""Summarizes results over all examples, over clients and over the worst clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_lp.utils.keras_internals import metric_direction


def summary(
    model: keras.Model,
    totals: Mapping[str, float],
    each: Mapping[str, np.ndarray],
    seen: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Returns the result of `FederatedAveraging.evaluate` without the number of clients.

    Args:
        model: the model, whose metrics define which direction is better.
        totals: the results over all examples, by name.
        each: the results of each client, `(clients,)`, by name.
        seen: whether each of these results is based on a label, by name.
    """
    figures = dict(totals)
    for name, values in each.items():
        values = values[seen[name]]
        if not len(values):
            values = np.array([np.nan])
        figures[f"mean_{name}"] = float(np.mean(values))
        direction = better(model, name)
        if direction:
            count = max(1, round(len(values) / 10))
            ranked = np.sort(values * direction)  # the worst first
            figures[f"worst_decile_{name}"] = float(np.mean(ranked[:count]) * direction)
    return figures


def better(model: keras.Model, name: str) -> int:
    """Returns 1 if higher is better, -1 if lower is better, and 0 if unknown."""
    if name == "loss" or name.endswith("_loss"):
        return -1
    metrics: list[Any] = list(model.metrics)
    found = [
        metric
        for metric in (*metrics, *(m for outer in metrics for m in getattr(outer, "metrics", [])))
        if name == metric.name or name.endswith(f"_{metric.name}")
    ]
    direction = next((d for m in found if (d := metric_direction(m))), None)
    return {"up": 1, "down": -1}.get(direction or "", 0)
