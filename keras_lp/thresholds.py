"""Thresholds of labels: the probability above which a label of a `MultiLabel` is present."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_lp.batches import as_batches
from keras_lp.heads import Head, heads
from keras_lp.metrics import MacroF1
from keras_lp.tasks import MultiLabel


def choose_thresholds(model: keras.Model, validation_data: Any) -> Any:
    """Chooses for each label the probability above which it counts as present: the best F1.

    A probability of 0.5 is seldom the best threshold of a rare label. For each label of each
    `MultiLabel` task the threshold with the largest F1 score on held out examples is chosen, in
    the middle between two neighbouring probabilities; of several the one nearest to 0.5. A label
    without a positive example keeps 0.5. The thresholds become part of the task in the head:
    `decode_predictions`, the metric `f1` and exported files use them, and they are saved with the
    model.

    Use examples that the model was not trained on, and more than a few positives of each label:
    the best threshold of few examples is a chance one.

    Args:
        model: a compiled model from a builder, with a `MultiLabel` task.
        validation_data: `(x, y)` or `(x, y, sample_weight)` arrays, or a batched
            `tf.data.Dataset` or `PyDataset`; labels as in `fit`, a missing entry is -1.

    Returns:
        The thresholds, an array `(labels,)`; for a model with several outputs a dict of them by
        task.

    Raises:
        ValueError: a model without a `MultiLabel` task.
        TypeError: data of another type.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.transfer_model(backbone, lp.MultiLabel(["rare", "common"]))
    >>> x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    >>> y = (x[:, :2] > [1.5, 0.0]).astype(int)
    >>> history = lp.fit_head(model, (x[:100], y[:100]), verbose=0)
    >>> thresholds = lp.choose_thresholds(model, (x[100:], y[100:]))
    >>> thresholds.shape
    (2,)

    Reference: Lipton et al., 2014, Thresholding Classifiers to Maximize F1 Score
    (arXiv:1402.1892).
    """
    known = {n: h for n, h in heads(model).items() if isinstance(h.task, MultiLabel)}
    if not known:
        raise ValueError(
            "choose_thresholds needs a model with a MultiLabel task. Received: model "
            f"{model.name!r} with {[type(h.task).__name__ for h in heads(model).values()]}."
        )
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in known}
    for x, y, sample_weight in as_batches(validation_data, "validation_data"):
        outputs = model.predict_on_batch(x)
        for name, head in known.items():
            example = (_of_task(part, name) for part in (y, outputs, sample_weight))
            masked = head.task.mask_missing(*example)
            flat = (np.reshape(np.asarray(part), (-1, head.task.units)) for part in masked)
            parts[name].append(tuple(flat))
    found = {}
    for name, head in known.items():
        y, logits, weight = (np.concatenate(part) for part in zip(*parts[name], strict=True))
        probabilities = 1 / (1 + np.exp(-logits.astype("float64")))
        found[name] = np.array(
            [_best(probabilities[:, i], y[:, i], weight[:, i]) for i in range(head.task.units)]
        )
        set_thresholds(model, head, found[name])
    return found if isinstance(model.output, Mapping) else next(iter(found.values()))


def set_thresholds(model: keras.Model, head: Head, thresholds: np.ndarray) -> None:
    """Gives a head, and the metric of its task, thresholds."""
    head.task = dataclasses.replace(head.task, thresholds=thresholds.tolist())
    metrics = model._compile_config.config["weighted_metrics"]
    metrics = metrics[head.name] if isinstance(metrics, Mapping) else metrics
    for metric in keras.tree.flatten(metrics):
        if isinstance(metric, MacroF1):
            metric.thresholds = head.task.thresholds
    model.train_function = model.test_function = None  # they hold the old ones


def _of_task(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else part


def _best(probabilities: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """Returns the threshold with the largest F1 score."""
    present = weight * (y > 0.5)
    if not present.sum() > 0:
        return 0.5
    kept = weight > 0
    order = np.argsort(-probabilities[kept], kind="stable")
    p = probabilities[kept][order]
    found, chosen = np.cumsum(present[kept][order]), np.cumsum(weight[kept][order])
    last = np.append(p[1:] < p[:-1], True)  # of those that are equally probable
    below = np.append(p[1:], 0)
    thresholds = (p + below)[last] / 2
    scores = (2 * found / (chosen + present.sum()))[last]
    best = np.isclose(scores, scores.max(), rtol=1e-12)
    return float(min(thresholds[best], key=lambda value: abs(value - 0.5)))
