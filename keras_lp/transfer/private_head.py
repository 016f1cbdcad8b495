"""Trains linear heads with differential privacy of the examples.

DP-SGD with all examples in each step: Abadi et al., 2016 (arXiv:1607.00133). The gradient of a
linear head for one example is the outer product of its features and the derivatives by its outputs,
so its norm is the product of theirs, and no gradient of a single example is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from keras_lp.privacy.differential_privacy import DifferentialPrivacy
from keras_lp.privacy.mechanism import Mechanism
from keras_lp.transfer.head_solver import Labels
from keras_lp.utils.moments import ROWS

STEPS = 100
_MOMENTUM = 0.9
# Chosen on validation examples of pneumonia_mnist and fashion_mnist. Features of many networks have
# about the length sqrt(columns).
_RATE = 16.0  # divided by sqrt(columns)
_FIRST_CLIP = 1 / 16  # times sqrt(columns)


def train_privately(
    features: np.ndarray, labels: Mapping[str, Labels], l2: float, settings: DifferentialPrivacy
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], Mechanism]:
    """Returns kernel and bias of each head, and the mechanism with its account.

    The gradients of all heads for an example are clipped together. The result is the mean of the
    weights over the second half of the steps.

    Args:
        features: `(examples, columns)`; entries around 1 suit the learning rate.
        labels: the labels of each head.
        l2: strength of the penalty on the kernels, 0 or more.
        settings: the settings of the privacy.

    Raises:
        ValueError: if the budget does not allow a step.
    """
    count, columns = features.shape
    shapes = [(columns + 1, one.outputs) for one in labels.values()]
    features, squares = prepared(features)
    mechanism = Mechanism(
        settings, "example", count, count, STEPS, first_clip=_FIRST_CLIP * math.sqrt(columns)
    )
    rate = _RATE / math.sqrt(columns)
    weights = [np.zeros(shape) for shape in shapes]
    velocities = [np.zeros(shape) for shape in shapes]
    means = [np.zeros(shape) for shape in shapes]
    averaged = 0
    if not mechanism.allows():
        raise ValueError(
            "The privacy budget must allow a step. Received: "
            f"epsilon={settings.epsilon} with noise_multiplier={settings.noise_multiplier}. Raise "
            "one of them."
        )
    while mechanism.releases < STEPS and mechanism.allows():
        mechanism.start()
        clip = mechanism.clip
        sums, within = clipped_sums(features, squares, labels, weights, clip)
        noise = mechanism.noise(shapes)
        mechanism.adapt(within, count)
        for i, (total, extra) in enumerate(zip(sums, noise, strict=True)):
            velocities[i] = _MOMENTUM * velocities[i] + (total + extra) / (count * clip)
            weights[i] = weights[i] - rate * velocities[i]
            weights[i][:-1] /= 1 + rate * l2 / (clip * (1 - _MOMENTUM))  # stable for any l2
        if mechanism.releases > STEPS // 2:
            averaged += 1
            means = [m + (w - m) / averaged for m, w in zip(means, weights, strict=True)]
    found = means if averaged else weights
    return {name: (one[:-1], one[-1]) for name, one in zip(labels, found, strict=True)}, mechanism


def prepared(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns features in float32 and the squared length of each example's features and bias.

    Examples with features that are not finite do not count: they get features of 0 and an infinite
    length.
    """
    finite = np.isfinite(features).all(1)
    features = np.where(finite[:, None], features, 0).astype("float32")
    squares = np.einsum("nc,nc->n", features, features, dtype="float64") + 1
    return features, np.where(finite, squares, np.inf)


def clipped_sums(
    features: np.ndarray,
    squares: np.ndarray,
    labels: Mapping[str, Labels],
    weights: list[np.ndarray],
    clip: float,
) -> tuple[list[np.ndarray], int]:
    """Returns the sums of the clipped gradients of the examples, and how many were not clipped.

    Args:
        features: output of `prepared`, `(examples, columns)`.
        squares: output of `prepared`, `(examples,)`.
        labels: the labels of each head.
        weights: kernel and, as the last row, bias of each head.
        clip: the norm to which the gradient of an example, over all heads, is clipped.
    """
    sums, within = [np.zeros(one.shape) for one in weights], 0
    for start in range(0, len(features), ROWS):
        rows = slice(start, start + ROWS)
        block = features[rows]
        slopes, of_outputs = [], np.zeros(len(block))
        for one, weight in zip(labels.values(), weights, strict=True):
            logits = block @ weight[:-1].astype("float32") + weight[-1]
            slope = one.losses(rows, logits[:, None])[1][:, 0]
            own = one.weights[rows]
            slope = slope * own[:, None] if one.kind == "softmax" else slope * own / one.outputs
            slopes.append(slope)
            of_outputs += np.einsum("no,no->n", slope, slope)
        with np.errstate(invalid="ignore"):  # 0 times infinity
            norms = np.sqrt(of_outputs * squares[rows])
        counts = np.isfinite(norms)
        within += int((norms[counts] <= clip).sum())
        factors = np.where(counts, np.minimum(1, clip / np.maximum(norms, 1e-30)), 0)[:, None]
        for total, slope in zip(sums, slopes, strict=True):
            scaled = (slope * factors).astype("float32")
            total[:-1] += block.T @ scaled
            total[-1] += scaled.sum(0)
    return sums, within
