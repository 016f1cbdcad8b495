"""Short runs: faster statistics of BatchNormalization, and a hint if training ended too early."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_lp.utils.keras_internals import sublayers

MEMORIES = 10  # the memory of a moving average is at most the steps of a run divided by this
FALLING = 0.05  # relative decrease of the loss in the last epoch that suggests more epochs


@contextlib.contextmanager
def fast_statistics(model: keras.Model, steps: int | None) -> Iterator[None]:
    """Limits the memory of BatchNormalization to a tenth of the steps during training.

    With a momentum of 0.99, a moving average remembers 100 steps. After a few hundred steps, in
    which the weights changed fast, it lags so far behind that `evaluate` scores another network
    than the trained one. Long runs, frozen layers and data of unknown length are not changed.

    Args:
        model: the model.
        steps: number of steps, None if it is unknown.
    """
    layers = [
        layer
        for layer in sublayers(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if steps is None or not layers:
        yield
        return
    longest = max(1 - MEMORIES / (int(model.optimizer.iterations) + steps), 0.5)
    own = {layer: layer.momentum for layer in layers if layer.momentum > longest}
    if not own:
        yield
        return
    for layer in own:
        layer.momentum = longest
    model.train_function = None  # it contains the momentum as a constant
    try:
        yield
    finally:
        for layer, momentum in own.items():
            layer.momentum = momentum
        model.train_function = None


def steps_of(arguments: Mapping[str, Any]) -> int | None:
    """Returns the number of steps of `fit` with these arguments, None if it is unknown."""
    x, steps = arguments["x"], arguments["steps_per_epoch"]
    if steps is None and isinstance(x, tf.data.Dataset):
        steps = int(x.cardinality())
    elif steps is None and isinstance(x, keras.utils.PyDataset):
        steps = x.num_batches
    elif steps is None and arguments["y"] is not None:
        kept = 1 - (arguments["validation_split"] or 0)
        steps = math.ceil(len(keras.tree.flatten(x)[0]) * kept / (arguments["batch_size"] or 32))
    if steps is None or steps < 1:
        return None
    return steps * (arguments["epochs"] - arguments["initial_epoch"])


def unfinished(history: keras.callbacks.History, solvable: bool) -> str | None:
    """Returns a line if training ended too early, else None.

    Args:
        history: output of `fit`.
        solvable: whether `lp.fit_head` can solve the heads.
    """
    losses = history.history.get("loss", [])
    if len(losses) < 2 or history.model.stop_training or not losses[-2] > 0:
        return None
    fall = 1 - losses[-1] / losses[-2]
    if not fall > FALLING:
        return None
    solve = "solve the head with lp.fit_head(model, data), " if solvable else ""
    return (
        f"The loss still fell by {100 * fall:.0f} % in the last epoch: {solve}train for more "
        "epochs, or look for a higher rate with lp.find_learning_rate."
    )
