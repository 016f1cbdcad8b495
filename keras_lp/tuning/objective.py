"""The result that a search improves."""

from __future__ import annotations

from typing import Any

import keras
import keras_tuner

from keras_lp.tasks.heads import tasks
from keras_lp.tuning.multitask import GAIN, MultitaskHyperModel
from keras_lp.utils.keras_internals import metric_direction
from keras_lp.utils.names import near


def make_objective(
    objective: Any, model: keras.Model, hypermodel: keras_tuner.HyperModel
) -> keras_tuner.Objective:
    """Returns an objective of keras-tuner.

    Args:
        objective: None, the name of a task, the name of a result such as `"val_loss"`, or an
            objective of keras-tuner.
        model: a model of the search.
        hypermodel: the hypermodel of the search.

    Raises:
        ValueError: if the model has no such result.
    """
    if isinstance(objective, keras_tuner.Objective):
        return objective
    known = tasks(model)
    several = len(known) > 1
    directions = {"val_loss": "min"}
    firsts: dict[str, str] = {}
    for name, task in known.items():
        prefix = f"val_{name}_" if several else "val_"
        directions[f"{prefix}loss"] = "min"
        for metric in task.make_metrics():
            less = metric_direction(metric) == "down"
            directions[f"{prefix}{metric.name}"] = "min" if less else "max"
            firsts.setdefault(name, f"{prefix}{metric.name}")
    if several and isinstance(hypermodel, MultitaskHyperModel):
        directions[GAIN] = "max"
    if not known:  # a model of the user's own hypermodel
        directions["val_accuracy"] = "max"
    if objective is None:
        default = GAIN if GAIN in directions else next(iter(firsts.values()), "val_loss")
        objective = "val_loss" if several and default != GAIN else default
    name = firsts.get(objective, objective)
    if name not in directions:
        options = sorted({*directions, *known})
        raise ValueError(
            f"`objective` must be one of {options}, or a keras_tuner.Objective. Received: "
            f"objective={objective!r}.{near(str(objective), options)}"
        )
    return keras_tuner.Objective(name, directions[name])
