"""The convex problem of heads on frozen features, in terms of the sums of the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import Head
from keras_lp.tasks.regression import Regression

Sums = Mapping[str, Any]


class Standardization:
    """Scales features to mean 0 and standard deviation 1 in the basis of principal components.

    Args:
        sums: the sums of `head_sums.moments` over all clients.

    Attributes:
        mean: the mean of each column.
        scale: the standard deviation of each column, infinite for a constant column so that its
            weight is 0.
        variances: the variances of the components, or of the columns if the clients sent no
            products.
    """

    def __init__(self, sums: Sums) -> None:
        self.mean = sums["total"] / sums["count"]
        products = sums["products"] / sums["count"]
        matrix = products.ndim == 2
        variance = (np.diag(products) if matrix else products) - self.mean**2
        deviation = np.sqrt(np.maximum(variance, 0))
        constant = deviation <= 1e-6 * np.abs(self.mean)
        self.scale = np.where(constant, np.inf, deviation)
        self.variances, self._basis = np.ones_like(self.mean), None
        if matrix:
            covariance = products - np.outer(self.mean, self.mean)
            values, self._basis = np.linalg.eigh(covariance / np.outer(self.scale, self.scale))
            self.variances = np.maximum(values, 0)

    def kernel(self, weights: np.ndarray) -> np.ndarray:
        """Returns the kernel on raw features for weights `(components, units)`."""
        weights = weights if self._basis is None else self._basis @ weights
        return weights / self.scale[:, None]

    def gradient(self, by_kernel: np.ndarray, by_bias: np.ndarray) -> np.ndarray:
        """Returns the gradient with respect to the weights; the bias includes the mean."""
        centred = (by_kernel - np.outer(self.mean, by_bias)) / self.scale[:, None]
        return centred if self._basis is None else self._basis.T @ centred


class HeadProblem:
    """The problem of one head: its mean loss plus `l2 / 2` times the sum of squared weights.

    A point consists of the weights `(components, units)` and the bias in the last row, divided by
    `factors`. In these coordinates the problem is about equally steep in every direction.

    Args:
        features: the scaling of the features.
        head: the head.
        l2: strength of the penalty, above 0.
    """

    def __init__(self, features: Standardization, head: Head, l2: float) -> None:
        self._features = features
        self._l2 = l2
        curvature = _curvature(head)
        steepness = np.append(curvature * features.variances + l2, curvature)
        self._factors = 1 / np.sqrt(steepness)[:, None]
        self.shape = (len(steepness), head.task.units)

    def weights(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns kernel and bias on raw features."""
        *weights, bias = self._factors * point
        kernel = self._features.kernel(np.array(weights))
        return kernel, bias - self._features.mean @ kernel

    def objective(self, point: np.ndarray, sums: Sums) -> tuple[float, np.ndarray]:
        """Returns the value and gradient at a point.

        Args:
            point: the point.
            sums: the sums of `head_sums.losses` for this head at the point.
        """
        weights = (self._factors * point)[:-1]
        by_kernel, by_bias = (sums[name] / sums["weight"] for name in ("kernel", "bias"))
        gradient = self._features.gradient(by_kernel, by_bias) + self._l2 * weights
        value = sums["loss"] / sums["weight"] + self._l2 / 2 * np.vdot(weights, weights)
        return float(value), self._factors * np.vstack([gradient, by_bias])


class Problem:
    """The sum of the problems of several heads.

    The heads share no weights, so the solution is that of each head alone. They share the rounds.

    Args:
        features: the scaling of the features.
        heads: the heads by name.
        l2: strength of the penalty.
    """

    def __init__(self, features: Standardization, heads: Mapping[str, Head], l2: float) -> None:
        self._problems = {name: HeadProblem(features, head, l2) for name, head in heads.items()}
        self._ends = np.cumsum([np.prod(problem.shape) for problem in self._problems.values()])

    def start(self) -> np.ndarray:
        """Returns the point at which all weights are 0."""
        return np.zeros(self._ends[-1])

    def weights(self, point: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns the kernels and biases on raw features: kernel, bias, kernel, bias, ..."""
        pairs = (problem.weights(part) for _, problem, part in self._parts(point))
        return tuple(array for pair in pairs for array in pair)

    def objective(self, point: np.ndarray, sums: Sums) -> tuple[float, np.ndarray]:
        """Returns the value and gradient at a point for the sums of all heads."""
        found = [problem.objective(part, sums[name]) for name, problem, part in self._parts(point)]
        values, gradients = zip(*found, strict=True)
        return sum(values), np.concatenate([gradient.ravel() for gradient in gradients])

    def _parts(self, point: np.ndarray) -> Sequence[tuple[str, HeadProblem, np.ndarray]]:
        parts = np.split(point, self._ends[:-1])
        return [
            (name, problem, part.reshape(problem.shape))
            for (name, problem), part in zip(self._problems.items(), parts, strict=True)
        ]


def label_scales(heads: Mapping[str, Head], sums: Sums) -> dict[str, tuple[Any, Any]]:
    """Returns the mean and standard deviation of `Regression` labels, `(units,)`, by head.

    Args:
        heads: the heads by name. Values that are already set in a head are kept.
        sums: the sums of `head_sums.moments`.
    """
    scales = {}
    for name, head in heads.items():
        if not isinstance(head.task, Regression):
            continue
        mean, std = (np.asarray(value, "float64") for value in (head.mean, head.std))
        if head.task.mean is None and not mean.any() and (std == 1).all():
            count, total, squares = sums["labels"][name]
            count = np.maximum(count, 1)
            mean = total / count
            std = np.sqrt(np.maximum(squares / count - mean**2, 0))
            std = np.where(std > 1e-6 * np.abs(mean), std, 1)
            # In the precision of the head, so that clients use the same labels as the head.
            mean, std = (value.astype("float32").astype("float64") for value in (mean, std))
        scales[name] = mean, std
    return scales


def _curvature(head: Head) -> float:
    """Returns a typical second derivative of the mean loss with respect to an output.

    For the squared error it is constant. For a crossentropy it is largest at equal probabilities.
    A fifth of that worked best in experiments; a wide range of values is similar.
    """
    units = head.task.units
    if isinstance(head.task, Regression):
        return 2.0 / units
    is_class = isinstance(head.task, Classification)
    return 0.2 * (1 - 1 / units if is_class else 0.25) / units
