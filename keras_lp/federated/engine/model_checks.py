"""Which models can be federated."""

from __future__ import annotations

from typing import Any

import keras

from keras_lp.balancing.ways import balancing_of
from keras_lp.federated.engine.optimizers import check_client_optimizer
from keras_lp.model.model import Model


def check_model(model: Any) -> None:
    """Raises where clients could not train a model, or would train it in silence otherwise.

    Raises:
        ValueError: a model that is not built and compiled, not Functional or Sequential, with a
            fixed batch size, balanced tasks, a `train_step` of its own, nothing to train,
            BatchNormalization that trains, or an optimizer that clients cannot run.
        TypeError: anything else than a Keras model.
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
            "FederatedAveraging takes a Functional or Sequential model with a free batch size. "
            f"Received: model {model.name!r} of type {type(model).__name__}"
            f"{' with a fixed one' if getattr(model, 'inputs', None) else ''}."
        )
    if balancing_of(model) is not None:
        raise ValueError(
            "Clients add up the losses of their tasks, by fixed weights at most. Received: model "
            f"{model.name!r} with balancing by {type(balancing_of(model)).__name__}. Build it with "
            'balancing="equal", "sum" or a dict of weights.'
        )
    if type(model).train_step not in (keras.Model.train_step, Model.train_step):
        raise ValueError(
            "Clients train as Keras does by itself. Received: model "
            f"{model.name!r} of type {type(model).__name__} with a `train_step` of its own, which "
            "they would leave aside."
        )
    if not model.trainable_variables:
        raise ValueError(
            "FederatedAveraging averages trainable weights. Received: model "
            f"{model.name!r} without any."
        )
    training = [
        layer.name
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if training:
        raise ValueError(
            "Clients cannot train BatchNormalization: its statistics would never be averaged. "
            f"Received: model {model.name!r} with the trainable layers {training[:5]}. Freeze "
            "them (a pretrained backbone's stay frozen in every builder), or build the model "
            "with GroupNormalization."
        )
    check_client_optimizer(model.optimizer)
