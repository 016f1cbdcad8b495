"""Mean and standard deviation of feature columns."""

from __future__ import annotations

import numpy as np

ROWS = 4096  # per step of a pass over features


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and standard deviation of each column, infinite for a constant column.

    Args:
        features: `(rows, columns)`; a `np.memmap` is read in pieces.
    """
    total, squares = np.zeros((2, features.shape[1]))
    first = np.asarray(features[:ROWS], np.float64).mean(0)  # avoids cancellation
    for start in range(0, len(features), ROWS):
        block = np.asarray(features[start : start + ROWS], np.float64) - first
        total += block.sum(0)
        squares += np.einsum("ij,ij->j", block, block)
    mean = total / len(features)
    deviation = np.sqrt(np.maximum(squares / len(features) - mean**2, 0))
    constant = deviation <= 1e-6 * np.abs(first + mean) + 1e-30
    return first + mean, np.where(constant, np.inf, deviation)
