"""Corrects the heads for the shift that is left after int8 quantization.

`int8` corrects the shift caused by rounded weights. Rounded activations cause another shift, which
is largest in small depthwise networks. As far as the calibration examples show it to be an affine
map of the outputs, the heads correct it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
import numpy as np

from keras_lp.tasks.heads import Head
from keras_lp.tflite.export.convert import convert
from keras_lp.tflite.export.verify import keras_outputs, load, run_all
from keras_lp.tflite.interface import input_names, outputs
from keras_lp.utils.arguments import Verbose

# Strength of the prior that no correction is needed, in examples: once for the mean, and per unit
# for the linear part, which has many parameters.
_TRUST = 10


@contextlib.contextmanager
def corrected_heads(
    model: keras.Model, calibration: list[np.ndarray], batch_size: int, verbose: Verbose = 0
) -> Iterator[None]:
    """Context manager that corrects the heads for int8 and restores them on exit.

    Args:
        model: a model that `convert` accepts for `"int8"`. A model without heads is not changed.
        calibration: the calibration inputs, in the order of `model.inputs`.
        batch_size: batch size of the file.
        verbose: how to show the progress of the calibration, see `Progress`.

    Raises:
        ImportError: `ai-edge-litert` is not installed.
    """
    heads = {
        output.name: tensor._keras_history.operation
        for output, tensor in zip(outputs(model), model.outputs, strict=True)
        if output.task is not None
    }
    if not heads:
        yield
        return
    content = convert(model, "int8", calibration, batch_size, activate=False, verbose=verbose)
    theirs = run_all(load(content, input_names(model)), calibration, batch_size)
    names = [output.name for output in outputs(model)]
    ours = dict(zip(names, keras_outputs(model, calibration), strict=True))
    before = {name: head.get_weights() for name, head in heads.items()}
    try:
        for name, head in heads.items():
            _correct(head, *affine_map(theirs[name], ours[name]))
        yield
    finally:
        for name, head in heads.items():
            head.set_weights(before[name])


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


def _correct(head: Head, matrix: np.ndarray, shift: np.ndarray) -> None:
    """Applies `matrix` and `shift`, in the units of the labels, to the output of a head."""
    std, mean = np.ones(head.units), np.zeros(head.units)
    if hasattr(head, "std"):
        std, mean = np.asarray(head.std, "float64"), np.asarray(head.mean, "float64")
    kernel, bias = (np.asarray(weight, "float64") for weight in (head.kernel, head.bias))
    head.kernel.assign(kernel * std @ matrix / std)
    head.bias.assign(((bias * std + mean) @ matrix + shift - mean) / std)
