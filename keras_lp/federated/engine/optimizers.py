"""Keras optimizers on clients and the server, run without state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras.src.optimizers.base_optimizer import BaseOptimizer

from keras_lp.federated.engine.yogi import Yogi
from keras_lp.model.optimizers import make_optimizer
from keras_lp.utils.names import near

# Each is tested to equal that of Keras over three steps.
_ON_CLIENTS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Lion")

# The adaptive optimizers have the decay and the large epsilon of Reddi et al., 2021.
_ON_SERVER = {
    "sgd": lambda: keras.optimizers.SGD(1.0),
    "adam": lambda: keras.optimizers.Adam(1e-2, beta_2=0.99, epsilon=1e-3),
    "yogi": lambda: Yogi(1e-2),
    "adagrad": lambda: keras.optimizers.Adagrad(1e-2, initial_accumulator_value=1e-6),
}


def check_client_optimizer(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises `ValueError` unless clients can run an optimizer, which restarts in each round."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "Clients must train in float32 or bfloat16. Received: a model compiled under "
            "mixed_float16. Build it under keras.config.set_dtype_policy('float32')."
        )
    if not isinstance(optimizer, tuple(getattr(keras.optimizers, name) for name in _ON_CLIENTS)):
        raise ValueError(
            f"The client optimizer must be one of {', '.join(_ON_CLIENTS)}. Received: a "
            f"model compiled with {type(optimizer).__name__}. Compile it with one of these."
        )
    if optimizer.use_ema or optimizer.gradient_accumulation_steps:
        raise ValueError(
            "The client optimizer restarts in every round, so it must not average weights or "
            "accumulate gradients. Received: an optimizer with "
            f"use_ema={optimizer.use_ema}, "
            f"gradient_accumulation_steps={optimizer.gradient_accumulation_steps}. Compile the "
            "model without them."
        )


def server_optimizer(optimizer: Any) -> keras.optimizers.Optimizer:
    """Returns the server optimizer for the argument of `FederatedAveraging`.

    Raises:
        ValueError: the name is unknown.
        TypeError: `optimizer` is not None, a name or a Keras optimizer.
    """
    if optimizer is None:
        return keras.optimizers.SGD(1.0)
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise TypeError(
            "`server_optimizer` must be None, the name of an optimizer or a Keras optimizer. "
            f"Received: server_optimizer={optimizer!r}."
        )
    name = optimizer.lower()
    if name in _ON_SERVER:
        return _ON_SERVER[name]()
    try:
        return make_optimizer(name, 1e-3)
    except ValueError as error:
        raise ValueError(
            "`server_optimizer` must be 'yogi' or the name of a Keras optimizer. Received: "
            f"server_optimizer={optimizer!r}.{near(name, _ON_SERVER)}"
        ) from error


def stateless_optimizer(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> keras.optimizers.Optimizer:
    """Returns a new optimizer with the same settings whose `stateless_apply` works.

    The TensorFlow optimizers of Keras override stateless methods of their base class with
    `tf.distribute` code. The twin uses the methods of the base class instead, unless a subclass
    (a layerwise optimizer) overrides them.
    """
    cls = type(optimizer)
    overlay = next(base for base in cls.__mro__ if base.__name__ == "TFOptimizer")
    plain = {
        name: method
        for name, method in vars(BaseOptimizer).items()
        if name in vars(overlay) and getattr(cls, name) is vars(overlay)[name]
        if not name.startswith("__")
    }
    made: Any = type(cls.__name__, (cls,), plain)
    twin = made.from_config(optimizer.get_config())
    if optimizer.weight_decay is not None:  # exclusions are not in the config
        decays = optimizer._use_weight_decay
        twin.exclude_from_weight_decay(var_list=[v for v in variables if not decays(v)])
    twin.build(list(variables))
    return twin
