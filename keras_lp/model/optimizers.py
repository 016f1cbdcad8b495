"""Optimizers by name, and their rates."""

from __future__ import annotations

from typing import Any

import keras

from keras_lp.utils.arguments import check_choice, check_positive
from keras_lp.utils.keras_internals import rate_of


def make_optimizer(optimizer: Any, learning_rate: Any) -> keras.optimizers.Optimizer:
    """Returns a Keras optimizer for a name, or the given optimizer unchanged.

    Args:
        optimizer: the name of a Keras optimizer, or an optimizer with its own rate.
        learning_rate: the rate, for a name.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if `optimizer` is neither a name nor an optimizer.
    """
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise TypeError(
            "`optimizer` must be the name of a Keras optimizer or an instance of one. Received: "
            f"optimizer={optimizer!r}."
        )
    if not isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        check_positive("learning_rate", learning_rate)
        learning_rate = float(learning_rate)
    known = {
        name.lower(): value
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
        and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
    }
    check_choice("optimizer", optimizer.lower(), sorted(known))
    return known[optimizer.lower()](learning_rate=learning_rate)


def reference_rate(optimizer: keras.optimizers.Optimizer) -> float:
    """Returns the rate of an optimizer; for a schedule its peak, or first value."""
    rate = rate_of(optimizer)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        peak = getattr(rate, "warmup_target", None)
        rate = rate(0) if peak is None else peak
    return float(keras.ops.convert_to_numpy(rate))
