"""The attacker's copy of a model, which computes in float64.

In float32, the attacks stop far from the data they could find.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lp.backbones.copying import finalize_normalization
from keras_lp.backbones.images import Augmentation
from keras_lp.tasks.heads import Head
from keras_lp.utils.keras_internals import compile_arguments, sublayers

_RANDOM = (
    Augmentation,
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)
_FLOATS = ("float16", "bfloat16", "float32", "mixed_float16", "mixed_bfloat16")


def twin_of(model: keras.Model) -> Any:
    """Returns a compiled copy of a model in float64, whose Dropout and augmentation do nothing.

    The attacker runs it in training mode, in which BatchNormalization uses the batch, but does not
    know the random numbers of the client.

    Raises:
        ValueError: if a layer cannot be made from its config.
    """
    known = {type(layer).__name__: type(layer) for layer in sublayers(model)}
    with _float64():
        try:
            config = keras.saving.serialize_keras_object(model)
            config.pop("compile_config", None)
            twin: Any = keras.saving.deserialize_keras_object(_in_float64(config), known)
            given = compile_arguments(model)
            loss = keras.tree.map_structure(_copy_loss, given["loss"])
        except Exception as error:
            raise ValueError(
                "An audit copies the model, so its layers and losses must have a config. Received: "
                "model "
                f"{model.name!r}, whose copy failed: {error}"
            ) from error
        for new, old in zip(twin.variables, model.variables, strict=True):
            new.assign(keras.ops.cast(old, new.dtype))
            new.trainable = old.trainable
        finalize_normalization(twin)
        for layer in sublayers(twin):
            if isinstance(layer, _RANDOM):
                quiet: Any = layer
                quiet.call = lambda inputs, *_, **__: inputs
        twin.compile("sgd", loss, loss_weights=given["loss_weights"])
    return twin


def gradients(model: Any, x: Any, y: Any, values: Sequence[Any]) -> list[Any]:
    """Returns the gradient of the mean loss with respect to the trainable weights.

    Args:
        model: a compiled model.
        x: inputs.
        y: labels.
        values: the values of the trainable weights.
    """
    weights = [tf.convert_to_tensor(value) for value in values]
    with tf.GradientTape() as tape:
        tape.watch(weights)
        with still(model, weights):
            outputs = model(x, training=True)
            loss = model.compute_loss(x, y, outputs, None, training=True)
    zero = tf.UnconnectedGradients.ZERO
    return [
        tf.convert_to_tensor(g) for g in tape.gradient(loss, weights, unconnected_gradients=zero)
    ]


def still(model: Any, weights: Sequence[Any] | None = None) -> keras.StatelessScope:
    """Returns a scope in which no state of a model changes.

    Args:
        model: the model.
        weights: values of the trainable weights. Defaults to None: their own.
    """
    trainable = model.trainable_variables
    values = [variable.value for variable in trainable] if weights is None else weights
    others = [(variable, variable.value) for variable in model.non_trainable_variables]
    pairs = [*zip(trainable, values, strict=True), *others]
    return keras.StatelessScope(state_mapping=pairs, collect_losses=True)


def input_of(layer: Any, run: Callable[[], Any]) -> Any:
    """Returns the input of a `Dense` layer, at any depth of a model, while a function runs it.

    A head that scales its inputs multiplies the scaled ones with its kernel.
    """
    found: list[Any] = []
    call = layer.call

    def record(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(inputs)
        return call(inputs, *args, **kwargs)

    layer.call = record
    try:
        run()
    finally:
        del layer.call
    inputs = found[0]
    if isinstance(layer, Head) and layer.scales_inputs:
        inputs = (tf.cast(inputs, layer.compute_dtype) - layer.input_mean) * layer.input_scale
    return inputs


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(before)


def _in_float64(config: Any) -> Any:
    """Returns a config in which all floating-point dtypes are float64."""
    if isinstance(config, dict):
        return {key: _in_float64(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_in_float64(value) for value in config)
    return "float64" if isinstance(config, str) and config in _FLOATS else config


def _copy_loss(loss: Any) -> Any:
    """Returns a loss that computes in the present default dtype."""
    if isinstance(loss, keras.losses.Loss):
        config = loss.get_config()
        return type(loss).from_config({**config, "dtype": None} if "dtype" in config else config)
    return loss
