"""The server's half of a federation of real phones: their weights, averaged.

McMahan et al., 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data
(arXiv:1602.05629).
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import keras
import numpy as np

from keras_lp.tflite.device.device import mismatch, read_arrays, write_weights
from keras_lp.tflite.device.exchange import (
    HALF,
    VERSION,
    Variables,
    all_weights,
    find_weights,
    model_version,
)
from keras_lp.utils.arguments import check_positive
from keras_lp.utils.text_table import ShownAsText

Update = str | os.PathLike[str] | Mapping[str, np.ndarray]


class _Refused(Exception):  # noqa: N818
    """Why an update is not averaged."""


@dataclasses.dataclass(frozen=True, repr=False)
class DeviceRound(ShownAsText):
    """What `aggregate_device_updates` made of a round.

    Attributes:
        weights: what the phones load next, by name, with the new `"version"`.
        accepted: the positions of the updates that were averaged.
        refused: why each of the others was not, by its position.
    """

    weights: dict[str, np.ndarray]
    accepted: tuple[int, ...]
    refused: dict[int, str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the weights to an `.npz` file for `DeviceTrainer.load_weights`."""
        write_weights(path, self.weights)

    def __str__(self) -> str:
        count = len(self.accepted) + len(self.refused)
        lines = [f"{len(self.accepted)} of {count} updates averaged"]
        lines += [f"update {i} refused: {reason}" for i, reason in self.refused.items()]
        return "\n".join(lines)


def aggregate_device_updates(
    model: keras.Model, updates: Sequence[Update], *, weights: Sequence[float] | None = None
) -> DeviceRound:
    """Averages what phones learned, writes it into the model, and returns what they load next.

    An update is what `DeviceTrainer.get_weights` returned or `save_weights` wrote, after training
    from the model's weights of now. One that is malformed, not finite, of another model or stale
    (trained from other weights than the model has now) is refused: it is never averaged, a warning
    names it, and the round goes on without it. No round number has to be kept: the version of the
    weights is a digest of the model, so the model, saved and loaded, is the server's whole state.

    Files are read as arrays of numbers of the sizes that the model has, never unpickled.

    Args:
        model: the Keras model that `export_trainable_tflite` wrote, with its present weights.
        updates: paths of `.npz` files, or dicts of arrays by name.
        weights: how much each update counts, above 0, such as the number of its examples.
            Defaults to None: all the same.

    Returns:
        A `DeviceRound`; `save(path)` writes what the phones load next.

    Raises:
        ValueError: no update, or none that is accepted (the model stays as it is); `weights` that
            are not one number above 0 an update.
        TypeError: anything else than a Keras model.

    Example:

    ```python
    done = lp.aggregate_device_updates(model, ["a.npz", "b.npz"], weights=[120, 80])
    done.save("round_1.npz")
    ```
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"aggregate_device_updates takes a Keras model. Received: model={model!r}.")
    updates = list(updates)
    shares = _checked_shares(weights, len(updates))
    accepted: dict[int, dict[str, np.ndarray]] = {}
    refused: dict[int, str] = {}
    versions: dict[tuple[str, ...], np.ndarray] = {}
    for i, update in enumerate(updates):
        try:
            read = _read(model, update, versions)
            if accepted and read.keys() != next(iter(accepted.values())).keys():
                raise _Refused("it has other weights than the first that was accepted")
            accepted[i] = read
        except _Refused as reason:
            refused[i] = str(reason)
    if not accepted:
        raise ValueError(
            "A round needs an update that can be averaged. Received: "
            f"{len(updates)} updates, "
            + ("; ".join(f"update {i}: {reason}" for i, reason in refused.items()) or "none")
            + "."
        )
    if refused:
        listed = "; ".join(f"update {i}: {reason}" for i, reason in refused.items())
        warnings.warn(f"Not averaged: {listed}.", stacklevel=2)
    total = sum(shares[i] for i in accepted)
    exchanged = cast(Variables, find_weights(model, next(iter(accepted.values()))))
    for name, variable in exchanged.items():
        # In float64: the order of the updates must not matter.
        mean: Any = sum(shares[i] / total * update[name].astype("float64")
                   for i, update in accepted.items())  # fmt: skip
        variable.assign(mean.astype("float32"))
    values = {name: keras.ops.convert_to_numpy(v).copy() for name, v in exchanged.items()}
    values[VERSION] = model_version(model, exchanged)
    return DeviceRound(values, tuple(accepted), refused)


def _checked_shares(weights: Any, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    weights = list(weights)
    if len(weights) != count:
        raise ValueError(
            "`weights` must have one number an update. Received: "
            f"{len(weights)} weights for {count} updates."
        )
    for weight in weights:
        check_positive("weights", weight)
        if not np.isfinite(weight):
            raise ValueError(f"`weights` must be finite. Received: weights={weights!r}.")
    return [float(weight) for weight in weights]


def _read(
    model: keras.Model, update: Update, versions: dict[tuple[str, ...], np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the checked weights of an update, without the version.

    Args:
        model: the model.
        update: a path or arrays.
        versions: the model's version by what is exchanged; new ones are added.
    """
    if not isinstance(update, (str, os.PathLike, Mapping)):
        raise _Refused(f"it is a {type(update).__name__}, not a file or a dict of arrays")
    try:
        if not isinstance(update, Mapping):
            sizes = {name: 4 * math.prod(v.shape) for name, v in all_weights(model).items()}
            update = read_arrays(update, {**sizes, VERSION: 4 * 2 * HALF})
        return _checked(model, update, versions)
    except OSError as error:
        raise _Refused(f"it cannot be read ({error})") from error
    except (TypeError, ValueError) as error:
        raise _Refused(str(error)) from error


def _checked(
    model: keras.Model,
    update: Mapping[str, Any],
    versions: dict[tuple[str, ...], np.ndarray],
) -> dict[str, np.ndarray]:
    exchanged = find_weights(model, update.keys() - {VERSION})
    if exchanged is None:
        raise _Refused("it has other weights than this model")
    wanted = {
        name: {"shape": variable.shape, "dtype": np.dtype(variable.dtype)}
        for name, variable in exchanged.items()
    }
    wanted[VERSION] = {"shape": (2 * HALF,), "dtype": np.dtype("int32")}
    reason = mismatch(update, wanted)
    if reason is not None:
        raise _Refused(reason)
    key = tuple(exchanged)
    if key not in versions:
        versions[key] = model_version(model, exchanged)
    same = np.equal(update[VERSION], versions[key])
    if not same[:HALF].all():
        raise _Refused("it is of another model")
    if not same[HALF:].all():
        raise _Refused("it is stale: trained from other weights than the model has now")
    return {name: np.asarray(update[name]) for name in exchanged}
