"""Checks whether a model can be trained on clients."""

from __future__ import annotations

from typing import Any

import keras

from keras_lp.balancing.ways import balancing_of
from keras_lp.federated.engine.optimizers import check_client_optimizer
from keras_lp.federated.engine.personal import PersonalLayers, untrainable_statistics
from keras_lp.model.model import Model


def check_model(model: Any, personal_layers: PersonalLayers = None) -> None:
    """Raises if clients cannot train a model, or would silently train it differently.

    Args:
        model: the model.
        personal_layers: the layers that stay on the clients. Defaults to None.

    Raises:
        ValueError: the model is not built and compiled, is not Functional or Sequential, has a
            fixed batch size, balanced tasks, a custom `train_step`, no trainable weights, trainable
            BatchNormalization, or an optimizer that clients cannot run.
        TypeError: `model` is not a Keras model.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"FederatedAveraging takes a compiled Keras model. Received: model={model!r}."
        )
    if not model.compiled or getattr(model, "loss", None) is None or not model.built:
        raise ValueError(
            "FederatedAveraging takes a built model that is compiled with a loss. Received: model "
            f"{model.name!r}, which is not. Use a builder such as lp.transfer_model, or call "
            "model.compile(optimizer, loss)."
        )
    if not getattr(model, "inputs", None) or any(t.shape[0] is not None for t in model.inputs):
        raise ValueError(
            "FederatedAveraging takes a Functional or Sequential model with batch size None. "
            f"Received: model {model.name!r} of type {type(model).__name__}"
            f"{' with a fixed batch size' if getattr(model, 'inputs', None) else ''}."
        )
    if balancing_of(model) is not None:
        raise ValueError(
            "Clients support only fixed loss weights for tasks. Received: model "
            f"{model.name!r} with balancing by {type(balancing_of(model)).__name__}. Build it with "
            'balancing="equal", "sum" or a dict of weights.'
        )
    if type(model).train_step not in (keras.Model.train_step, Model.train_step):
        raise ValueError(
            "Clients do not support a custom `train_step`. Received: model "
            f"{model.name!r} of type {type(model).__name__}, which overrides it. Build "
            "it with keras.Model or keras.Sequential."
        )
    if not model.trainable_variables:
        raise ValueError(
            "FederatedAveraging takes a model with trainable weights. Received: model "
            f"{model.name!r} without any."
        )
    training = untrainable_statistics(model, personal_layers)
    if training:
        raise ValueError(
            "Clients cannot share BatchNormalization that trains, because its statistics are not "
            f"averaged. Received: model {model.name!r} with the trainable layers {training[:5]}. "
            "Freeze them (every builder freezes those of a pretrained backbone), keep them on the "
            'clients with personal_layers="normalization", or build the model with '
            "GroupNormalization."
        )
    check_client_optimizer(model.optimizer)
