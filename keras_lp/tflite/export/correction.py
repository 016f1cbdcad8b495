"""The affine map of the outputs that int8 quantization leaves to correct.

`int8` corrects the shift caused by rounded weights. Rounded activations cause another shift, which
is largest in small depthwise networks. As far as the calibration examples show it to be an affine
map of the outputs, the last dense layers correct it.
"""

from __future__ import annotations

import numpy as np

# Strength of the prior that no correction is needed, in examples: once for the mean, and per unit
# for the linear part, which has many parameters.
_TRUST = 10


def affine_map(given: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits the affine map from `given` to `wanted`, shrunk towards the identity.

    Args:
        given: `(examples, ..., units)`.
        wanted: an array of the same shape.

    Returns:
        The matrix `(units, units)` and the vector `(units,)`.
    """
    units = given.shape[-1]
    x = given.reshape(-1, units).astype("float64")
    errors = wanted.reshape(-1, units) - x
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1.0)
    columns = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], axis=1)
    trust = np.diag([_TRUST * units] * units + [_TRUST])
    trusted = columns.T @ columns + trust
    solved = np.linalg.solve(trusted, columns.T @ errors)
    slope = solved[:-1] / scale[:, None]
    return np.eye(units) + slope, solved[-1] - mean @ slope
