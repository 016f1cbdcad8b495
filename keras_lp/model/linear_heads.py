"""Heads that are linear in the features of a frozen backbone."""

from __future__ import annotations

import keras

from keras_lp.backbones import features
from keras_lp.model.compiled import has_own_losses
from keras_lp.model.scaling import is_on_features
from keras_lp.tasks.heads import Head, heads


def linear_heads(model: keras.Model) -> dict[str, Head]:
    """Returns the heads of a model by name.

    Raises:
        ValueError: if the heads are not linear functions of frozen features, or the losses are
            not those of the tasks.
    """
    known = heads(model)
    if not known or features.features_layer(model) is None:
        raise ValueError(
            "fit_head solves heads that keras_lp built. Received: model "
            f"{model.name!r} without one. Build it with lp.transfer_model or lp.multitask_model, "
            "or train it with `fit`."
        )
    reason = features.obstacle(model, weightless=True)
    if reason is not None:
        raise ValueError(
            "fit_head needs a frozen backbone, whose features do not change. Received: a model "
            f'in which {reason}. Build it with trainable="head" and without `augmentation`, or '
            "train it with `fit`."
        )
    hidden = [name for name, head in known.items() if not is_on_features(head)]
    if hidden:
        raise ValueError(
            "fit_head solves heads of one layer. Received: the heads "
            f"{hidden} with other layers below them. Build them with hidden_units=(), or train "
            "them with `fit`."
        )
    losses = {name: getattr(head.task, "loss", "crossentropy") for name, head in known.items()}
    other = {name: loss for name, loss in losses.items() if loss != "crossentropy"}
    if other:
        raise ValueError(
            f"fit_head minimises the crossentropy. Received: the losses {other}. Train the heads "
            "with `fit`."
        )
    if not has_own_losses(model):
        raise ValueError(
            "fit_head minimises the tasks' own losses. Received: a model compiled with "
            f"loss={model.loss!r}. Leave `loss` as the builder set it, or train it with `fit`."
        )
    return known


def can_be_solved(model: keras.Model) -> bool:
    """Whether `fit_head` can solve the heads of a model."""
    try:
        linear_heads(model)
    except ValueError:
        return False
    return True
