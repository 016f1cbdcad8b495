"""Solves a linear head: a convex problem on standardised features.

Uses only NumPy and SciPy. The parameters of several folds are solved together, so that one pass
over the features serves all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from keras_lp.utils.moments import ROWS, moments

Kind = Literal["softmax", "sigmoid", "squared"]

SLOW_COMPONENTS = 2048  # above this number, several threads are used
MOST_COMPONENTS = 4096  # above this number, the eigenvectors cost more than they save
DOUBLE_BYTES = 2**28  # features up to this size are computed in double precision
MANY_PRODUCTS = 10**9  # in a pass over the features
SEARCH = 0.1  # the share of the gradient that may remain while strengths are compared


class Components:
    """Features with mean 0 and standard deviation 1, in the basis of their principal components.

    In this basis the problem is well conditioned for every strength, and it is small if there
    are fewer examples than columns. It is computed once for all heads, strengths and folds.

    Args:
        features: `(rows, columns)`, an array or a `np.memmap`, which is read in pieces.
    """

    def __init__(self, features: np.ndarray) -> None:
        self._features = features
        self.count, columns = features.shape
        self._streamed = isinstance(features, np.memmap)
        double = self.count * columns * 8 <= DOUBLE_BYTES
        self._dtype = np.float64 if double else np.float32
        self.mean, self.scale = moments(features)
        self._dual: np.ndarray | None = None
        self._basis: np.ndarray | None = None
        self._rotated: np.ndarray | None = None
        smaller = min(self.count, columns)
        with _threads(many=smaller > SLOW_COMPONENTS):
            if smaller > MOST_COMPONENTS:
                self.variances = np.ones(columns)
            elif self.count < columns:
                self._dual, self._rotated, self.variances = self._by_examples()
            else:
                self._basis, self.variances = self._by_columns()
        if not self._streamed and self._rotated is None:
            self._rotated = np.concatenate([self._turned(block) for _, block in self._pieces()])

    def _standardized(self, block: np.ndarray, columns: Any = slice(None)) -> np.ndarray:
        return (block.astype(self._dtype) - self.mean[columns].astype(self._dtype)) / self.scale[
            columns
        ].astype(self._dtype)

    def _pieces(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields row slices and their standardised features."""
        for start in range(0, self.count, ROWS):
            rows = slice(start, start + ROWS)
            yield rows, self._standardized(self._features[rows])

    def _turned(self, block: np.ndarray) -> np.ndarray:
        return block if self._basis is None else block @ self._basis.astype(self._dtype)

    def _by_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the eigenvectors `(columns, components)` and the variances of the columns."""
        covariance = sum((block.T @ block).astype(np.float64) for _, block in self._pieces())
        values, vectors = np.linalg.eigh(covariance / self.count)
        kept = values > 1e-9 * max(values[-1], 1e-30)
        return vectors[:, kept], values[kept]

    def _by_examples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the map from weights to a kernel, the components and their variances."""
        gram = np.zeros((self.count, self.count))
        for _, block in self._columns():
            gram += block @ block.T
        values, vectors = np.linalg.eigh(gram)
        kept = values > 1e-9 * max(values[-1], 1e-30)
        root = np.sqrt(values[kept])
        return vectors[:, kept] / root, vectors[:, kept] * root, values[kept] / self.count

    def _columns(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields column slices and their standardised features, in double precision."""
        width = max(1, 2**22 // self.count)
        for start in range(0, self._features.shape[1], width):
            columns = slice(start, start + width)
            block = self._features[:, columns].astype(np.float64)
            yield columns, (block - self.mean[columns]) / self.scale[columns]

    def passes(self, weights: np.ndarray) -> tuple[np.ndarray, Iterator[tuple[slice, np.ndarray]]]:
        """Returns weights, and the blocks of rows that they apply to.

        Args:
            weights: `(components, outputs)`.
        """
        if self._rotated is None:
            return self._to_columns(weights).astype(self._dtype), self._pieces()
        rows = (slice(start, start + ROWS) for start in range(0, self.count, ROWS))
        return weights.astype(self._rotated.dtype), ((row, self._rotated[row]) for row in rows)

    def to_components(self, gradient: np.ndarray) -> np.ndarray:
        """Converts the gradient by the weights of `passes` to the gradient by components."""
        if self._rotated is None and self._basis is not None:
            return self._basis.T @ gradient
        return gradient

    def turn(self, features: np.ndarray) -> np.ndarray:
        """Returns the features of other examples in the same basis, `(rows, components)`."""
        return np.concatenate(
            [
                self._standardized(features[start : start + ROWS]).astype(np.float64)
                @ self._to_columns(np.eye(len(self.variances)))
                for start in range(0, len(features), ROWS)
            ]
        )

    def kernel(self, weights: np.ndarray) -> np.ndarray:
        """Returns the kernel for the raw features, `(columns, outputs)`."""
        return self._to_columns(weights) / self.scale[:, None]

    def _to_columns(self, weights: np.ndarray) -> np.ndarray:
        if self._dual is not None:
            by_example = self._dual @ weights
            return np.concatenate([block.T @ by_example for _, block in self._columns()])
        return weights if self._basis is None else self._basis @ weights


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels that a head learns from, one row per example.

    Args:
        kind: the loss: `"softmax"` for class numbers `(rows,)` or distributions `(rows,
            outputs)`; `"sigmoid"` or `"squared"` for `(rows, outputs)` values.
        values: the labels; any valid value if the weight is 0.
        weights: `(rows,)` for softmax, else `(rows, outputs)`.
        outputs: units of the head.
        smoothing: share of a class label that is spread over all classes.
    """

    kind: Kind
    values: np.ndarray
    weights: np.ndarray
    outputs: int
    smoothing: float = 0.0

    @property
    def curvature(self) -> float:
        """A typical second derivative of the mean loss by an output.

        For the squared error it is constant. For a crossentropy it is largest if all classes are
        equally probable; near the solution, a fifth of this value works better.
        """
        if self.kind == "squared":
            return 2.0 / self.outputs
        return 0.2 * (1 - 1 / self.outputs if self.kind == "softmax" else 0.25) / self.outputs

    def losses(self, rows: slice, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns each label's loss and its derivative, for several folds.

        Args:
            rows: slice of rows.
            logits: `(rows, folds, outputs)` in double precision; changed in place.
        """
        y = self.values[rows]
        if self.kind == "softmax":
            logits -= logits.max(axis=-1, keepdims=True)
            if soft := y.ndim == 2:
                own = np.einsum("nfo,no->nf", logits, y)
            else:
                own = np.take_along_axis(logits, y[:, None, None], axis=-1)[..., 0]
            mean = logits.mean(axis=-1) if self.smoothing else 0.0
            slope = np.exp(logits, out=logits)
            total = slope.sum(axis=-1)
            slope /= total[..., None]
            loss = np.log(total) - (1 - self.smoothing) * own - self.smoothing * mean
            slope -= self.smoothing / self.outputs
            if soft:
                slope -= (1 - self.smoothing) * y[:, None]
            else:
                slope[np.arange(len(y)), :, y] -= 1 - self.smoothing
            return loss, slope
        y = y[:, None]
        if self.kind == "sigmoid":
            decay = np.exp(-np.abs(logits))
            loss = np.maximum(logits, 0) + np.log1p(decay) - y * logits
            return loss, np.where(logits >= 0, 1, decay) / (1 + decay) - y
        return (logits - y) ** 2, 2 * (logits - y)


@dataclasses.dataclass
class Solution:
    """Weights `(components, folds, outputs)`, and biases `(folds, outputs)`."""

    weights: np.ndarray
    bias: np.ndarray


def solve(
    features: Components,
    labels: Labels,
    l2: float,
    *,
    start: Solution | None = None,
    folds: np.ndarray | None = None,
    tolerance: float = 1e-7,
    share: float = 0.0,
) -> Solution:
    """Returns the minimum of the mean loss plus `l2 / 2` times the sum of the squared weights.

    The weights are for standardised features; biases are not penalised. Uses L-BFGS in
    coordinates in which the problem is well conditioned.

    Args:
        features: the features.
        labels: their labels.
        l2: strength of the penalty, above 0.
        start: starting point. Defaults to 0.
        folds: `(rows, folds)`, 1 if a row belongs to the training part of a fold. Defaults to
            one fold with all rows.
        tolerance: the search ends if the largest gradient is below this value.
        share: the search also ends at this share of the largest initial gradient. Defaults to 0.
    """
    from scipy.optimize import minimize

    folds = np.ones((features.count, 1)) if folds is None else folds
    shape = (len(features.variances), folds.shape[1], labels.outputs)
    start = start or Solution(np.zeros(shape), np.zeros(shape[1:]))
    scale = 1 / np.sqrt(labels.curvature * features.variances + l2)[:, None, None]
    scale_bias = 1 / np.sqrt(labels.curvature)
    size = start.weights.size

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        if first and np.array_equal(point, begin):
            return first[0]
        weights = point[:size].reshape(shape) * scale
        bias = point[size:].reshape(shape[1:]) * scale_bias
        value, gradient, gradient_bias = _mean_loss(features, labels, weights, bias, folds)
        value += l2 / 2 * float(np.vdot(weights, weights))
        gradient = (gradient + l2 * weights) * scale
        return value, np.concatenate([gradient.ravel(), gradient_bias.ravel() * scale_bias])

    first: list[tuple[float, np.ndarray]] = []
    begin = np.concatenate([(start.weights / scale).ravel(), start.bias.ravel() / scale_bias])
    first.append(objective(begin))
    tolerance = max(tolerance, share * np.abs(first[0][1]).max())
    options = {"maxiter": 500, "maxcor": 20, "gtol": tolerance, "ftol": tolerance * 1e-6}
    with _threads(many=features.count * size > MANY_PRODUCTS):
        found = minimize(objective, begin, method="L-BFGS-B", jac=True, options=options)
    weights = found.x[:size].reshape(shape) * scale
    return Solution(weights, found.x[size:].reshape(shape[1:]) * scale_bias)


@functools.cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _threads(many: bool) -> Any:
    """Runs small work on one thread: several threads would mostly wait for each other."""
    if many:
        return contextlib.nullcontext()
    return _libraries().limit(limits=1, user_api="blas")


def _mean_loss(
    features: Components, labels: Labels, weights: np.ndarray, bias: np.ndarray, folds: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns the sum over folds of the mean loss, and its gradients."""
    totals = np.maximum(_count(labels, folds), 1e-30)
    value, gradient_bias = 0.0, np.zeros_like(bias)
    kernel, blocks = features.passes(weights.reshape(len(weights), -1))
    gradient: Any = 0.0
    for rows, block in blocks:
        logits = (block @ kernel).astype(np.float64).reshape(-1, *bias.shape) + bias
        loss, slope = labels.losses(rows, logits)
        weight = _weights(labels, folds / totals, rows)
        value += float(np.vdot(weight, loss))
        slope *= weight[..., None] if weight.ndim == 2 else weight
        gradient_bias += slope.sum(0)
        by_kernel = block.T @ slope.reshape(len(slope), -1).astype(block.dtype)
        gradient = gradient + by_kernel.astype(np.float64)
    return value, features.to_components(gradient).reshape(weights.shape), gradient_bias


def _weights(labels: Labels, folds: np.ndarray, rows: slice) -> np.ndarray:
    """Returns the weight of each label in each fold: `(rows, folds[, outputs])`."""
    if labels.kind == "softmax":
        return labels.weights[rows, None] * folds[rows]
    return labels.weights[rows, None] * folds[rows, :, None]


def _count(labels: Labels, folds: np.ndarray) -> np.ndarray:
    """Returns the sum of the weights in each fold."""
    per_row = labels.weights if labels.kind == "softmax" else labels.weights.sum(-1)
    return per_row @ folds


def choose_l2(
    features: Components,
    labels: Labels,
    folds: np.ndarray,
    held_out: tuple[np.ndarray, Labels] | None = None,
) -> tuple[float, float, Solution]:
    """Returns the strength with the lowest loss on held-out examples, that loss, and a start.

    Decreases the strength by half decades, each from the previous solution, until the loss has
    risen twice. The first strength halves the largest component.

    Args:
        features: the features.
        labels: their labels.
        folds: `(rows, folds)`, 1 if a row belongs to the training part of a fold, else 0.
        held_out: features in the basis of `features`, and labels, on which to evaluate; they
            replace the rows outside the folds.
    """
    size = len(features.variances) * folds.shape[1] * labels.outputs
    with _threads(many=features.count * size > MANY_PRODUCTS):
        return _search(features, labels, folds, held_out)


def _search(
    features: Components,
    labels: Labels,
    folds: np.ndarray,
    held_out: tuple[np.ndarray, Labels] | None,
) -> tuple[float, float, Solution]:
    largest = labels.curvature * max(features.variances, default=1.0)
    top = np.ceil(2 * np.log10(largest)) / 2
    best: list[tuple[float, float, Solution]] = []  # one, once a strength is judged
    solution, worse = None, 0
    for exponent in np.arange(top, top - 8, -0.5):
        l2 = float(10.0**exponent)
        solution = solve(features, labels, l2, start=solution, folds=folds, share=SEARCH)
        if held_out is None:
            score = _held_out_loss(features, labels, 1 - folds, solution)
        else:
            score = _loss_on(*held_out, solution)
        if not best or score < best[0][1]:
            mean = Solution(*(p.mean(-2, keepdims=True) for p in (solution.weights, solution.bias)))
            best, worse = [(l2, score, mean)], 0
        else:
            worse += 1
            if worse == 2:
                break
    return best[0]


def _held_out_loss(
    features: Components, labels: Labels, left_out: np.ndarray, solution: Solution
) -> float:
    """Returns the mean loss on the held-out rows, over all folds."""
    value = 0.0
    kernel, blocks = features.passes(solution.weights.reshape(len(solution.weights), -1))
    for rows, block in blocks:
        logits = (block @ kernel).astype(np.float64).reshape(-1, *solution.bias.shape)
        loss, _ = labels.losses(rows, logits + solution.bias)
        value += float(np.vdot(_weights(labels, left_out, rows), loss))
    return value / max(_count(labels, left_out).sum(), 1e-30)


def _loss_on(features: np.ndarray, labels: Labels, solution: Solution) -> float:
    """Returns the mean loss on other examples, for one fold."""
    logits = features @ solution.weights[:, 0] + solution.bias[0]
    loss, _ = labels.losses(slice(None), logits[:, None])
    everything = np.ones((len(features), 1))
    return float(
        np.vdot(_weights(labels, everything, slice(None)), loss)
        / max(_count(labels, everything)[0], 1e-30)
    )
