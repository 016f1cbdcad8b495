"""A training step with balanced tasks.

All methods that use gradients share one path: compute the gradient of each task for the shared
parameters, the Gramian of these gradients, the weights from it, and one weighted sum. Each head
uses the gradient of its own task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import keras
import tensorflow as tf
from keras.src.losses.loss import unscale_loss_for_distribution

from keras_lp.balancing.ways import Balancing
from keras_lp.tasks.heads import backbone_of


def balanced_step(model: Any, balancing: Balancing, data: Any) -> dict[str, Any]:
    """Performs `keras.Model.train_step` with balanced tasks."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    with tf.GradientTape(persistent=balancing.uses_gradients) as tape:
        y_pred = model(x, training=True)
        by_task, counts = model.task_losses(y, y_pred, sample_weight)
        losses = [by_task[task] for task in balancing.tasks]
        penalty = sum(model.losses) if model.losses else tf.zeros(())
        values = tf.stack([unscale_loss_for_distribution(loss) for loss in losses])
        values = tf.stop_gradient(values)
        if balancing.uses_gradients:
            scaled = [model.optimizer.scale_loss(loss) for loss in [*losses, penalty]]
        else:
            weights = tf.stop_gradient(balancing.task_weights(values, None))
            total = sum(weights[i] * loss for i, loss in enumerate(losses)) + penalty
            scaled = [model.optimizer.scale_loss(total)]
    present = tf.stack([counts[task] for task in balancing.tasks]) > 0
    variables, gramian = model.trainable_variables, None
    if balancing.uses_gradients:
        of_tasks = [_gradients(tape, loss, variables) for loss in scaled[:-1]]
        of_penalty = _gradients(tape, scaled[-1], variables) if model.losses else None
        shared = shared_variables(model)
        gramian = _gramian([[own[i] for i in shared] for own in of_tasks], len(losses))
        weights = balancing.task_weights(values, gramian)
        weights = tf.where(present, weights, tf.zeros_like(weights))
        gradients = _combined(of_tasks, of_penalty, set(shared), weights)
    else:
        gradients = tape.gradient(scaled[0], variables)
    model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    balancing.record(weights, gramian, present)
    balancing.update(values, gramian, present)
    model._loss_tracker.update_state(
        tf.reduce_sum(values) + penalty, sample_weight=tf.shape(tf.nest.flatten(x)[0])[0]
    )
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def _gradients(tape: tf.GradientTape, loss: Any, variables: Sequence[Any]) -> list[Any]:
    """Returns dense gradients (those of embeddings are sparse), None for a missing one."""
    found = tape.gradient(loss, variables)
    return [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in found]


def shared_variables(model: keras.Model) -> list[int]:
    """Returns the indices of the backbone's variables among a model's trainable variables.

    Raises:
        ValueError: if there are none.
    """
    backbone = cast(keras.Model, backbone_of(model))
    below = {id(variable) for variable in backbone.trainable_variables}
    shared = [i for i, variable in enumerate(model.trainable_variables) if id(variable) in below]
    if not shared:
        raise ValueError(
            "Balancing with gradients needs trainable shared parameters. Received: a model whose "
            'backbone is frozen. Use trainable="all" or a number of blocks, or balancing="equal", '
            '"uncertainty" or "dwa".'
        )
    return shared


def _gramian(of_tasks: Sequence[Sequence[Any]], count: int) -> tf.Tensor:
    """Returns the inner products of the tasks' gradients, scaled to a mean square of 1."""
    gramian = tf.zeros((count, count))
    for own in zip(*of_tasks, strict=True):
        if all(gradient is None for gradient in own):
            continue
        like = next(gradient for gradient in own if gradient is not None)
        rows = tf.stack(
            [
                tf.reshape(tf.zeros_like(like) if gradient is None else gradient, [-1])
                for gradient in own
            ]
        )
        rows = tf.cast(rows, tf.float32)
        gramian += tf.matmul(rows, rows, transpose_b=True)
    squares = tf.linalg.diag_part(gramian)
    mean = tf.reduce_sum(squares) / tf.maximum(tf.reduce_sum(tf.cast(squares > 0, tf.float32)), 1.0)
    return gramian / tf.where(mean > 0, mean, tf.ones_like(mean))


def _combined(
    of_tasks: Sequence[Sequence[Any]],
    of_penalty: Sequence[Any] | None,
    shared: set[int],
    weights: tf.Tensor,
) -> list[Any]:
    """Returns the gradient of each variable: weighted if it is shared, else the plain sum."""
    combined = []
    for i, own in enumerate(zip(*of_tasks, strict=True)):
        terms = [
            tf.cast(weights[task], gradient.dtype) * gradient if i in shared else gradient
            for task, gradient in enumerate(own)
            if gradient is not None
        ]
        if of_penalty is not None and of_penalty[i] is not None:
            terms.append(of_penalty[i])
        combined.append(tf.add_n(terms) if terms else None)
    return combined
