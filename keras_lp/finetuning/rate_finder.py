"""The learning rate range test (Smith, 2017, arXiv:1506.01186)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.model.checks import check_weights
from keras_lp.model.data import as_numbers
from keras_lp.tasks.heads import heads
from keras_lp.tasks.regression import standardize
from keras_lp.utils.arguments import Verbose, check_positive
from keras_lp.utils.keras_internals import rate_of
from keras_lp.utils.progress import Progress
from keras_lp.utils.text_table import ShownAsText

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, repr=False)
class LearningRates(ShownAsText):
    """Results of `lp.find_learning_rate`.

    Attributes:
        rates: the tested rates, one per batch, `(batches,)`.
        losses: the smoothed losses, `(batches,)`.
        steepest: the rate at which the loss fell fastest.
        valley: the rate in the middle of the longest decrease of the loss; the safer suggestion.

    Example:

    >>> import numpy as np, keras_lp as lp
    >>> rates, losses = np.array([1e-3, 1e-2, 1e-1]), np.array([1.0, 0.6, 0.9])
    >>> lp.LearningRates(rates, losses, steepest=1e-3, valley=5e-3)
    learning rates: valley 0.005, steepest 0.001

    Reference: Smith, 2017, Cyclical Learning Rates for Training Neural Networks
    (arXiv:1506.01186).
    """

    rates: np.ndarray
    losses: np.ndarray
    steepest: float
    valley: float

    def __str__(self) -> str:
        return f"learning rates: valley {self.valley:.2g}, steepest {self.steepest:.2g}"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Plots the losses over the rates, with both suggestions.

        If the loss diverges, the y axis is cut off above its decrease, and the label says so.

        Args:
            path: path of the image file to write. Defaults to None: no file.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("A plot needs matplotlib: pip install matplotlib.") from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="0.3")
        for name, rate, marker in (("valley", self.valley, "o"), ("steepest", self.steepest, "s")):
            loss = np.interp(np.log(rate), np.log(self.rates), self.losses)
            axes.plot(rate, loss, marker, label=f"{name}: {rate:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed")
        least = int(np.argmin(self.losses))
        fall = self.losses[: least + 1].max() - self.losses[least]
        top = self.losses[least] + 1.5 * fall
        if fall > 0 and self.losses.max() > top:  # diverged: the fall would hardly be seen
            axes.set_ylim(self.losses[least] - 0.1 * fall, top)
            axes.set_ylabel("loss, smoothed; cut off above")
        axes.legend()
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def find_learning_rate(
    model: keras.Model,
    data: Any,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    batch_size: int = 32,
    seed: int = 0,
    verbose: Verbose = "auto",
) -> LearningRates:
    """Trains briefly at increasing learning rates, suggests a rate, and restores the model.

    Weights, statistics, the optimizer and the random state of the layers are restored exactly.
    With layer rates, the suggestion is the head's rate: the ratios are kept. The test ends early
    if the loss is four times its minimum.

    Args:
        model: a compiled model.
        data: `(x, y)` or `(x, y, sample_weight)` arrays, or a batched `tf.data.Dataset` of such
            tuples; repeated as needed.
        low: the first rate. Defaults to 1e-7.
        high: the last rate. Defaults to 10.
        steps: number of batches, whose rates increase geometrically; 10 or more. Defaults to 100.
        batch_size: batch size for arrays. Defaults to 32.
        seed: seed of the order of arrays. Defaults to 0.
        verbose: `"auto"` shows a progress bar in a terminal or notebook. 1 also prints lines
            elsewhere; 2 prints lines; 0 is silent. Defaults to `"auto"`.

    Returns:
        A `LearningRates` with `valley`, `steepest` and `plot(path)`.

    Raises:
        ValueError: if the model is not compiled or its rate is a schedule, the rates or `steps`
            are out of range, sample weights are negative or not finite, or the data have no batch.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu")])
    >>> model = lp.transfer_model(backbone, 2)
    >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    >>> found = lp.find_learning_rate(model, (x, x[:, 0] > 0), steps=20)
    >>> 1e-7 < found.valley < 10
    True
    >>> model = lp.finetune_model(model, learning_rate=found.valley)

    Reference: Smith, 2017, Cyclical Learning Rates for Training Neural Networks
    (arXiv:1506.01186).
    """
    optimizer = _check(model, low, high, steps)
    rate = optimizer.learning_rate
    if not optimizer.built:
        model.optimizer.build(model.trainable_variables)
    kept = [*model.variables, *model.optimizer.variables]
    before = [np.array(variable) for variable in kept]
    if not isinstance(data, tf.data.Dataset):
        weight = [part for part in data[2:] if part is not None]
        check_weights(weight)
        data = (data[0], as_numbers(model, data[1]), *weight)
    batches = data.take(steps) if isinstance(data, tf.data.Dataset) else [data]
    standardize(heads(model), (batch[1] for batch in batches))
    rates = np.geomspace(low, high, steps)
    losses: list[float] = []
    average = lowest = 0.0
    try:
        with Progress("Learning rates", steps, verbose) as progress:
            for i, batch in zip(range(steps), _batches(data, batch_size, seed), strict=False):
                rate.assign(rates[i])
                x, y, weight = (*batch, None)[:3]
                logs = model.train_on_batch(x, y, weight, return_dict=True)
                average = 0.9 * average + 0.1 * float(logs["loss"])
                smoothed = average / (1 - 0.9 ** (i + 1))
                if not np.isfinite(smoothed):
                    break
                lowest = smoothed if not losses else min(lowest, smoothed)
                losses.append(smoothed)
                if smoothed > 4 * lowest + 1e-12 and i > 5:
                    break
                progress.step()
    finally:
        for variable, value in zip(kept, before, strict=True):
            variable.assign(value)
        model.reset_metrics()
    if len(losses) < 4:
        raise ValueError(
            "The range test needs finite losses and data with at least one batch. "
            f"Received: {len(losses)} finite losses from low={low}. Use a smaller `low`, or check "
            "the data."
        )
    tried, smooth = rates[: len(losses)], np.array(losses)
    slopes = np.gradient(smooth, np.log(tried))
    return LearningRates(
        tried, smooth, steepest=float(tried[np.argmin(slopes)]), valley=_valley(tried, smooth)
    )


def _check(model: Any, low: Any, high: Any, steps: Any) -> keras.optimizers.Optimizer:
    ready = isinstance(model, keras.Model) and model.compiled and model.built
    if not ready or model.optimizer is None:
        raise ValueError(
            "find_learning_rate takes a compiled Keras model with weights. Received: "
            f"model={model!r}. Call `model.compile(...)`, or use a builder of keras_lp."
        )
    for name, value in (("low", low), ("high", high)):
        check_positive(name, value)
    check_positive("steps", steps, integer=True)
    if low >= high or steps < 10:
        raise ValueError(
            "The range test goes from `low` up to `high` in 10 `steps` or more. Received: "
            f"low={low}, high={high}, steps={steps}."
        )
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if isinstance(rate_of(optimizer), keras.optimizers.schedules.LearningRateSchedule):
        raise ValueError(
            "The range test sets the rate itself, so the optimizer's rate must be a number. "
            f"Received: a {type(rate_of(optimizer)).__name__}. Compile with a number first."
        )
    return optimizer


def _batches(data: Any, batch_size: int, seed: int) -> Iterator[tuple[Any, ...]]:
    """Yields batches indefinitely."""
    rng = np.random.default_rng(seed)
    while True:
        empty = True
        if isinstance(data, tf.data.Dataset):
            for batch in data:
                empty = False
                yield tuple(batch)
        else:
            order = rng.permutation(len(keras.tree.flatten(data[0])[0]))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                empty = False
                yield tuple(
                    keras.tree.map_structure(lambda leaf, rows=rows: np.asarray(leaf)[rows], part)
                    for part in data
                )
        if empty:
            return


def _valley(rates: np.ndarray, losses: np.ndarray) -> float:
    """Returns the rate in the middle of the longest decreasing subsequence of the losses."""
    count = len(losses)
    length, previous = np.ones(count, int), np.full(count, -1)
    for i in range(count):
        for j in range(i):
            if losses[i] < losses[j] and length[j] + 1 > length[i]:
                length[i], previous[i] = length[j] + 1, j
    path = [int(np.argmax(length))]
    while previous[path[-1]] >= 0:
        path.append(int(previous[path[-1]]))
    return float(rates[path[len(path) // 2]])
