"""Short runs: statistics of BatchNormalization that keep up, and a word on what was not learned."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

MEMORIES = 10  # a moving average remembers at most this share of a run
FALLING = 0.05  # share by which the loss falls in an epoch that is not the last one it needs


@contextlib.contextmanager
def fast_statistics(model: keras.Model, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Shortens the memory of BatchNormalization to a tenth of the steps, while a model trains.

    With the momentum of 0.99 a moving average remembers 100 steps. After a few hundred, in which
    the weights moved fast, it lags so far behind that `evaluate` judges another network than the
    one that trained. Long runs, frozen layers and data of unknown length are left alone.

    Args:
        model: the model.
        arguments: the arguments of `fit`.
    """
    steps = _steps(arguments)
    layers = [
        layer
        for layer in model._flatten_layers()
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
    model.train_function = None  # it holds the momentum as a constant
    try:
        yield
    finally:
        for layer, momentum in own.items():
            layer.momentum = momentum
        model.train_function = None


def _steps(arguments: Mapping[str, Any]) -> int | None:
    """Returns the steps that a `fit` with these arguments takes, None if that is not known."""
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
    """Returns a line on training that ended too early, None if it did not.

    Args:
        history: of `fit`.
        solvable: whether `lp.fit_head` can do it.
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
