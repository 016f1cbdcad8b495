"""Averages the weights of real phones on a server: the server side of federated averaging."""

from __future__ import annotations

import dataclasses
import math
import os
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
from keras_lp.utils.warn import warn

Update = str | os.PathLike[str] | Mapping[str, np.ndarray]


class _Refused(Exception):  # noqa: N818
    """Raised with the reason why an update is refused."""


@dataclasses.dataclass(frozen=True, repr=False)
class DeviceRound(ShownAsText):
    """The result of `aggregate_device_updates`. Can be printed.

    Attributes:
        weights: the weights that the phones load next, by name, with the new `"version"`.
        accepted: the indices of the averaged updates.
        refused: the reason for each refused update, by its index.
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
    """Averages the weights that phones trained and assigns the mean to the model.

    An update is the result of `DeviceTrainer.get_weights` or `save_weights` after training from the
    current weights of the model. Updates that are malformed, not finite, from another model or
    stale (trained from weights other than the current ones) are refused: they are not averaged, a
    warning names them, and the round continues without them. The server does not need to count
    rounds: the version of the weights is a digest of the model, so the model is the whole state.

    Files are read as numeric arrays with the sizes of the model and are never unpickled.

    Args:
        model: the Keras model that `export_trainable_tflite` exported, with its current weights.
        updates: paths of `.npz` files, or dicts of arrays by name.
        weights: the weight of each update in the mean, above 0, for example its number of
            examples. Defaults to None: equal weights.

    Returns:
        A `DeviceRound`. Its `save(path)` writes the weights that the phones load next.

    Raises:
        ValueError: there are no updates or all are refused (the model is not changed), or
            `weights` does not have one number above 0 per update.
        TypeError: `model` is not a Keras model.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"])
    >>> report = lp.export_trainable_tflite(model, "sums.tflite")
    >>> x = np.random.default_rng(0).normal(size=(30, 4)).astype("float32")
    >>> for name, rows in {"a.npz": slice(0, 20), "b.npz": slice(20, 30)}.items():
    ...     phone = lp.DeviceTrainer("sums.tflite")
    ...     losses = phone.fit(x[rows], x[rows].sum(1) > 0)
    ...     phone.save_weights(name)
    >>> done = lp.aggregate_device_updates(model, ["a.npz", "b.npz"], weights=[20, 10])
    >>> print(done)
    2 of 2 updates averaged
    >>> done.save("round_1.npz")

    Reference: McMahan et al., 2017, Communication-Efficient Learning of Deep Networks from
    Decentralized Data (arXiv:1602.05629).
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
                raise _Refused("it has other weights than the first accepted update")
            accepted[i] = read
        except _Refused as reason:
            refused[i] = str(reason)
    if not accepted:
        raise ValueError(
            "At least one update must be accepted. Received: "
            f"{len(updates)} updates, "
            + ("; ".join(f"update {i}: {reason}" for i, reason in refused.items()) or "none")
            + "."
        )
    if refused:
        listed = "; ".join(f"update {i}: {reason}" for i, reason in refused.items())
        warn(f"Not averaged: {listed}.")
    total = sum(shares[i] for i in accepted)
    exchanged = cast(Variables, find_weights(model, next(iter(accepted.values()))))
    for name, variable in exchanged.items():
        # In float64, so that the order of the updates does not matter.
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
            "`weights` must have one number per update. Received: "
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
        update: a path, or arrays by name.
        versions: a cache of the versions of the model by the names of the exchanged weights.
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
        raise _Refused("it is from another model")
    if not same[HALF:].all():
        raise _Refused("it is stale: trained from weights other than the current ones")
    return {name: np.asarray(update[name]) for name in exchanged}
