"""Checks that no labels are missing: without its label, an example is not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_lp.tasks.heads import tasks


def check_present(model: keras.Model, y: Any) -> None:
    """Raises `ValueError` if a label is missing, for models that keras_lp built."""
    for name, task in tasks(model).items():
        labels = y.get(name) if isinstance(y, Mapping) else y
        count = 0
        if labels is not None and np.issubdtype(np.asarray(labels).dtype, np.number):
            labels = np.asarray(labels)
            count = int((np.isnan(labels) if np.isnan(task.missing) else labels < 0).sum())
        if labels is None or count:
            raise ValueError(
                "An audit needs all labels, as examples without them are not trained on. Received: "
                f"{count or 'all'} missing labels of the task {name!r}. Leave these examples out."
            )
