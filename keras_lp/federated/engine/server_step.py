"""What the server of a round does with the sums of updates, in TFF and in a fleet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.federated.engine.optimizers import stateless_optimizer

Tensors = Sequence[Any]


def mean_update(total: Tensors, shares: Any, groups: Sequence[int]) -> tuple[Any, ...]:
    """Returns the sum of updates divided by the sum of shares, per group.

    A group with shares 0 is not updated. A round without any client update results in NaN, which
    the server ignores.

    Args:
        total: the sum of the updates times their shares, for each weight.
        shares: the sum of the shares, `(groups,)`.
        groups: the index of the group of each weight.
    """
    nothing = tf.where(shares[0] > 0, 0.0, np.nan)
    return tuple(
        tf.math.divide_no_nan(update, tf.cast(shares[group], update.dtype))
        + tf.cast(nothing, update.dtype)
        for update, group in zip(total, groups, strict=True)
    )


def noised_mean(total: Tensors, noise: Tensors, count: Any) -> tuple[Any, ...]:
    """Returns the sum of updates plus noise, divided by a fixed number of clients."""
    return tuple(
        (update + tf.cast(one, update.dtype)) / tf.cast(count, update.dtype)
        for update, one in zip(total, noise, strict=True)
    )


class ServerStep:
    """A Keras optimizer that applies the mean update as its gradient.

    An update that is not finite does not change the weights or the optimizer. (The finalizer of TFF
    does the same with AutoGraph, which does not work with every version of Python.)

    Args:
        optimizer: the optimizer.
        variables: the shared trainable variables.

    Attributes:
        start: the state of the optimizer at first.
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
    ) -> None:
        self._twin = stateless_optimizer(optimizer, variables)
        self.start = [variable.numpy() for variable in self._twin.variables]

    def apply(self, state: Tensors, weights: Tensors, update: Tensors) -> tuple[Any, Any, Any]:
        """Returns the new state, the new weights, and the L2 norm of the update."""
        old_slots, old, gradients = list(state), list(weights), list(update)
        new, slots = self._twin.stateless_apply(old_slots, gradients, old)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        slots = tuple(tf.where(finite, *pair) for pair in zip(slots, old_slots, strict=True))
        new = tuple(tf.where(finite, *pair) for pair in zip(new, old, strict=True))
        norm = tf.linalg.global_norm([tf.cast(g, tf.float32) for g in gradients])
        return slots, new, norm
