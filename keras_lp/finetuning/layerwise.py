"""Optimizers with a learning rate per layer (Howard and Ruder, 2018, arXiv:1801.06146).

A variable learns at the optimizer's rate times its own multiplier, so schedules and callbacks on
the rate keep the ratios. The multipliers are in the order of the trainable variables, because
saving a nested model preserves the order but not the paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

if TYPE_CHECKING:
    _Base = keras.optimizers.Optimizer
else:
    _Base = object


class _Layerwise(_Base):
    """Mixin over a concrete Keras optimizer."""

    def __init__(self, *args: Any, multipliers: Sequence[float] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.multipliers = [float(m) for m in multipliers]

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        if len(variables) != len(self.multipliers):
            raise ValueError(
                "An optimizer with layerwise rates is for the trainable variables that it was "
                f"created for. Received: {len(variables)} variables for {len(self.multipliers)} "
                "rates. Call `lp.finetune_model(model)` again after changing what trains."
            )
        super().build(variables)
        # Biases and normalisation (vectors) do not decay; in attention, biases have rank 2.
        self._decays = [len(v.shape) > 1 and v.name != "bias" for v in variables]
        # One vector: the number of variables is constant, so a saved state always loads.
        self._multipliers = self.add_variable(
            (len(variables),),
            initializer=keras.initializers.Constant(np.array(self.multipliers, "float32")),
            dtype="float32",
            name="multipliers",
            aggregation="only_first_replica",
        )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        rate = ops.cast(learning_rate, "float32") * ops.convert_to_tensor(self._multipliers)[index]
        # Decoupled decay also uses the variable's own rate.
        if self.weight_decay is not None and self._decays[index]:
            decay = ops.cast(rate * self.weight_decay, variable.dtype)
            self.assign_sub(variable, ops.convert_to_tensor(variable) * decay)
        super().update_step(gradient, variable, rate)

    def set_factors(self, factors: Sequence[float]) -> None:
        """Multiplies the rates; a variable with a factor of 0 does not change.

        Args:
            factors: one factor of 0 or more per variable.
        """
        self._multipliers.assign(np.array(self.multipliers, "float32") * np.array(factors))

    def _filter_empty_gradients(self, grads: Sequence[Any], variables: Sequence[Any]) -> Any:
        grads, variables = super()._filter_empty_gradients(grads, variables)
        self._indices = [self._get_variable_index(variable) for variable in variables]
        return grads, variables

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        """Clips like Keras, but variables with a factor of 0 do not count in the global norm."""
        if self.clipnorm or not self.global_clipnorm:
            return super()._clip_gradients(grads)
        moving = ops.cast(ops.convert_to_tensor(self._multipliers) > 0, "float32")
        squares = [
            moving[i] * ops.cast(ops.sum(ops.square(g)), "float32")
            for i, g in zip(self._indices, grads, strict=True)
        ]
        norm = ops.sqrt(ops.sum(ops.stack(squares)))
        scale = self.global_clipnorm / ops.maximum(norm, self.global_clipnorm)
        return [g * ops.cast(scale, g.dtype) for g in grads]

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Does nothing: `update_step` applies the decay."""

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "multipliers": self.multipliers}


@keras.saving.register_keras_serializable("keras_lp")
class LayerwiseSGD(_Layerwise, keras.optimizers.SGD):
    """`keras.optimizers.SGD` with a multiplier of the rate for each variable."""


@keras.saving.register_keras_serializable("keras_lp")
class LayerwiseAdam(_Layerwise, keras.optimizers.Adam):
    """`keras.optimizers.Adam` with a multiplier of the rate for each variable."""


@keras.saving.register_keras_serializable("keras_lp")
class LayerwiseAdamW(_Layerwise, keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` with a multiplier of the rate for each variable."""


@keras.saving.register_keras_serializable("keras_lp")
class LayerwiseNadam(_Layerwise, keras.optimizers.Nadam):
    """`keras.optimizers.Nadam` with a multiplier of the rate for each variable."""


@keras.saving.register_keras_serializable("keras_lp")
class LayerwiseRMSprop(_Layerwise, keras.optimizers.RMSprop):
    """`keras.optimizers.RMSprop` with a multiplier of the rate for each variable."""


@keras.saving.register_keras_serializable("keras_lp")
class LayerwiseAdagrad(_Layerwise, keras.optimizers.Adagrad):
    """`keras.optimizers.Adagrad` with a multiplier of the rate for each variable."""


@keras.saving.register_keras_serializable("keras_lp")
class LayerwiseLion(_Layerwise, keras.optimizers.Lion):
    """`keras.optimizers.Lion` with a multiplier of the rate for each variable."""


_LAYERWISE: dict[type[keras.optimizers.Optimizer], type[keras.optimizers.Optimizer]] = {
    keras.optimizers.SGD: LayerwiseSGD,
    keras.optimizers.Adam: LayerwiseAdam,
    keras.optimizers.AdamW: LayerwiseAdamW,
    keras.optimizers.Nadam: LayerwiseNadam,
    keras.optimizers.RMSprop: LayerwiseRMSprop,
    keras.optimizers.Adagrad: LayerwiseAdagrad,
    keras.optimizers.Lion: LayerwiseLion,
}


def with_multipliers(
    optimizer: keras.optimizers.Optimizer, multipliers: Sequence[float]
) -> keras.optimizers.Optimizer:
    """Returns an unbuilt optimizer with the same settings and a rate for each variable.

    Args:
        optimizer: an SGD, Adam, AdamW, Nadam, RMSprop, Adagrad or Lion of Keras.
        multipliers: one factor of the rate per trainable variable, in the model's order.

    Raises:
        ValueError: if the optimizer is of another kind.
    """
    config = optimizer.get_config()
    return _layerwise_class(optimizer).from_config({**config, "multipliers": list(multipliers)})


def check_layerwise(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises `ValueError` unless there is a layerwise optimizer of this kind."""
    _layerwise_class(optimizer)


def _layerwise_class(
    optimizer: keras.optimizers.Optimizer,
) -> type[keras.optimizers.Optimizer]:
    for plain, cls in _LAYERWISE.items():
        if type(optimizer) in (plain, cls):
            return cls
    raise ValueError(
        "Layerwise learning rates work with the Keras optimizers "
        f"{[plain.__name__ for plain in _LAYERWISE]}. Received: optimizer of type "
        f"{type(optimizer).__name__}."
    )
