"""Attacks on the update of a client, which know the model: from the update back to the data.

In all of them, `update` is an estimate of the gradient of the mean loss of the client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from scipy import optimize

from keras_lp.audit.twin import gradients, input_of
from keras_lp.utils.keras_internals import sublayers

Arrays = Sequence[np.ndarray]
_SCALE = 1e6  # of relative distances, so that L-BFGS-B does not stop early
_MATCHED = 1e-6  # the relative squared distance of gradients that are the same
_SMOOTHNESS = 1e-3  # weight of the total variation
_TINY = 1e-30


class Search:
    """A search for the inputs with the lowest objective, by L-BFGS-B from random starts.

    Args:
        objective: function `(inputs, *arguments) -> number` of float64 tensors.
        low: the smallest value of an input.
        high: the largest value.
        restarts: number of random starts.
        max_iterations: iterations per start.
        seed: random seed of the starts.
    """

    def __init__(
        self, objective: Callable[..., tf.Tensor], low: float, high: float, restarts: int,
        max_iterations: int, seed: int,
    ) -> None:  # fmt: skip
        def slope(inputs: tf.Tensor, *arguments: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                value = objective(inputs, *arguments)
            return value, tape.gradient(value, inputs)

        self._slope = tf.function(slope, autograph=False)
        self._bounds = low, high
        self._restarts, self._seed = restarts, seed
        self._options = {
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations,
            "maxcor": 50,
            "ftol": 1e-20,
            "gtol": 1e-14,
        }

    def run(self, shape: tuple[int, ...], *arguments: Any) -> tuple[np.ndarray, float]:
        """Returns the inputs, of the given shape, and their objective."""

        def slope(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, found = self._slope(tf.constant(flat.reshape(shape)), *arguments)
            return float(value), found.numpy().ravel()

        found = []
        for start in range(self._restarts):
            first = np.random.default_rng((self._seed, start)).uniform(*self._bounds, shape)
            bounds = optimize.Bounds(*self._bounds)
            options: Any = self._options
            found.append(
                optimize.minimize(
                    slope, first.ravel(), jac=True, method="L-BFGS-B", bounds=bounds,
                    options=options,
                )
            )  # fmt: skip
        best = min(found, key=lambda one: float(one.fun))
        return best.x.reshape(shape), float(best.fun)


def roughness(inputs: tf.Tensor, span: float) -> tf.Tensor:
    """Returns the total variation of pictures per value and span; 0 for other inputs."""
    if len(inputs.shape) != 4:
        return tf.constant(0.0, tf.float64)
    total = tf.reduce_sum(tf.image.total_variation(inputs))
    return total / (inputs.shape.num_elements() * span)


def dense_layer(model: keras.Model) -> Any:
    """Returns the first `Dense` layer of which kernel and bias are trained, None without one."""
    trained = {id(variable) for variable in model.trainable_variables}
    for layer in sublayers(model):
        dense: Any = layer
        if (
            isinstance(layer, keras.layers.Dense)
            and dense.use_bias
            and {id(dense.kernel), id(dense.bias)} <= trained
        ):
            return layer
    return None


def is_first(model: keras.Model, layer: Any) -> bool:
    """Whether a layer has the first trained weights of a model."""
    return id(layer.kernel) == id(model.trainable_variables[0])


def read_labels(bias: np.ndarray, count: int) -> np.ndarray:
    """Returns the labels in the gradient of the last bias, `(count,)`.

    With softmax or sigmoid and cross-entropy, the gradient is the probability minus the label: for
    one example only the entry of its class is negative. Zhao et al., 2020, iDLG (arXiv:2001.02610).
    """
    if len(bias) == 1:
        return np.full(count, int(bias[0] < 0))
    order = np.argsort(bias, kind="stable")
    negative = order[: max(1, min(count, int((bias < 0).sum())))]
    return np.resize(negative, count)


def read_dense_inputs(kernel: np.ndarray, bias: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Returns the inputs of a `Dense` layer from the gradient of its weights.

    For one example, each column of the kernel's gradient is the input times the bias's gradient:
    the result is exact. With several examples, each unit shows a weighted sum of their inputs; of
    these, the one most similar to each true input is returned, which is more than an attacker could
    choose.

    Args:
        kernel: gradient of the kernel, `(features, units)`.
        bias: gradient of the bias, `(units,)`.
        true: the true inputs, `(examples, features)`.
    """
    if len(true) == 1:
        unit = int(np.argmax(np.abs(bias)))
        return kernel[:, unit][None] / (bias[unit] if bias[unit] else 1.0)
    used = np.abs(bias) >= max(1e-6 * np.abs(bias).max(), _TINY)
    if not used.any():
        return np.zeros_like(true)
    candidates = (kernel[:, used] / bias[used]).T
    chosen = np.argmax(_cosines(true, candidates), axis=1)
    return candidates[chosen]


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine similarity of the rows of two arrays."""
    return np.diag(_cosines(a, b))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    return a @ b.T / np.maximum(norms, _TINY)


class Inversion:
    """Finds the inputs of a model for which a layer gets given inputs.

    Where a layer gets fewer numbers than the input has, smooth pictures are preferred.

    Args:
        twin: a compiled model in float64.
        layer: one of its layers.
        low: as in `Search`, like the other arguments.
        high: see there.
        **options: see there.
    """

    def __init__(self, twin: Any, layer: Any, low: float, high: float, **options: int) -> None:
        def distance(inputs: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
            found = input_of(layer, lambda: twin(inputs, training=True))
            error = tf.reduce_sum((tf.reshape(found, tf.shape(target)) - target) ** 2)
            error /= tf.reduce_sum(target**2) + _TINY
            if found.shape.num_elements() < inputs.shape.num_elements():
                error += _SMOOTHNESS * roughness(inputs, high - low)
            return _SCALE * error

        self._search = Search(distance, low, high, **options)

    def run(self, target: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the inputs, of the given shape."""
        return self._search.run(shape, tf.constant(target))[0]


class GradientMatching:
    """Finds inputs whose gradient is a given one.

    The squared distance of the gradients is minimised (Zhu et al., 2019, arXiv:1906.08935); if they
    do not match, the angle between them, for smooth pictures (Geiping et al., 2020,
    arXiv:2003.14053).

    Args:
        twin: a compiled model in float64.
        low: as in `Search`, like the other arguments.
        high: see there.
        **options: see there.
    """

    def __init__(self, twin: Any, low: float, high: float, **options: int) -> None:
        weights = [tf.convert_to_tensor(variable) for variable in twin.trainable_variables]

        def squared(inputs: tf.Tensor, y: tf.Tensor, true: list[tf.Tensor]) -> tf.Tensor:
            found = gradients(twin, inputs, y, weights)
            differences = [a - b for a, b in zip(found, true, strict=True)]
            return _SCALE * (_dot(differences, differences) / (_dot(true, true) + _TINY))

        def angle(inputs: tf.Tensor, y: tf.Tensor, true: list[tf.Tensor]) -> tf.Tensor:
            found = gradients(twin, inputs, y, weights)
            lengths = tf.sqrt((_dot(found, found) + _TINY) * (_dot(true, true) + _TINY))
            rough = _SMOOTHNESS * roughness(inputs, high - low)
            return _SCALE * (1 - _dot(found, true) / lengths + rough)

        self._squared = Search(squared, low, high, **options)
        self._angle = Search(angle, low, high, **options)

    def run(self, update: Arrays, y: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the inputs, of the given shape, for these labels."""
        given = tf.constant(y), [tf.constant(one) for one in update]
        inputs, value = self._squared.run(shape, *given)
        return inputs if value < _SCALE * _MATCHED else self._angle.run(shape, *given)[0]


def _dot(a: Sequence[tf.Tensor], b: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.add_n([tf.reduce_sum(one * other) for one, other in zip(a, b, strict=True)])
