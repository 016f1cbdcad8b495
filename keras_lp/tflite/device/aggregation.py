"""Averages the weights of real phones on a server: the server side of federated averaging."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import keras
import numpy as np
import tensorflow as tf

from keras_lp.tflite.device.device import mismatch, read_arrays, write_weights
from keras_lp.tflite.device.exchange import (
    HALF,
    VERSION,
    Variables,
    all_weights,
    find_weights,
    model_version,
)
from keras_lp.utils.arguments import check_choice, check_positive
from keras_lp.utils.robust import Aggregation, robust_row
from keras_lp.utils.text_table import ShownAsText
from keras_lp.utils.warn import warn

Update = str | os.PathLike[str] | Mapping[str, np.ndarray]
Limit = float | Literal["auto"] | None
_TIMES = 10  # the median: the automatic limit of norms and weights


class Refused(Exception):  # noqa: N818
    """Raised with the reason why an update is refused."""


class Stale(Refused):
    """Raised for an update that was trained from other weights than the current ones."""


@dataclasses.dataclass(frozen=True, repr=False)
class DeviceRound(ShownAsText):
    """The result of `aggregate_device_updates`. Can be printed.

    Attributes:
        weights: the weights that the phones load next, by name, with the new `"version"`.
        accepted: the indices of the averaged updates.
        refused: the reason for each refused update, by its index.
        limited: what was limited of accepted updates, by their indices.
    """

    weights: dict[str, np.ndarray]
    accepted: tuple[int, ...]
    refused: dict[int, str]
    limited: dict[int, str] = dataclasses.field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the weights to an `.npz` file for `DeviceTrainer.load_weights`."""
        write_weights(path, self.weights)

    def __str__(self) -> str:
        count = len(self.accepted) + len(self.refused)
        lines = [f"{len(self.accepted)} of {count} updates averaged"]
        lines += [f"update {i} refused: {reason}" for i, reason in self.refused.items()]
        lines += [f"update {i} limited: {reason}" for i, reason in self.limited.items()]
        return "\n".join(lines)


def aggregate_device_updates(
    model: keras.Model,
    updates: Sequence[Update],
    *,
    weights: Sequence[float] | None = None,
    max_update_norm: Limit = "auto",
    max_weight: Limit = "auto",
    aggregation: Aggregation = "mean",
) -> DeviceRound:
    """Averages the weights that phones trained and assigns the mean to the model.

    An update is the result of `DeviceTrainer.get_weights` or `save_weights` after training from the
    current weights of the model. Updates that are malformed, not finite, from another model or
    stale (trained from weights other than the current ones) are refused: they are not averaged, a
    warning names them, and the round continues without them. The server does not need to count
    rounds: the version of the weights is a digest of the model, so the model is the whole state.

    Files are read as numeric arrays with the sizes of the model and are never unpickled.

    A phone may send finite but absurd numbers, or claim a billion examples. Therefore the change of
    the weights by each update is scaled down to a largest L2 norm, and weights in the mean are
    capped. A robust `aggregation` also withstands several phones that send bad updates on purpose,
    up to a fifth of them. `limited` of the result names the updates that were limited.

    Args:
        model: the Keras model that `export_trainable_tflite` exported, with its current weights.
        updates: paths of `.npz` files, or dicts of arrays by name.
        weights: the weight of each update in the mean, above 0, for example its number of
            examples. Defaults to None: equal weights.
        max_update_norm: largest L2 norm of the change of all weights by an update. `"auto"` is ten
            times the lower median of the norms above 0 of the round; None is no limit. Defaults to
            `"auto"`.
        max_weight: largest weight in the mean. `"auto"` is ten times the lower median of the
            weights of the round; None is no limit. Defaults to `"auto"`.
        aggregation: `"mean"`, or without `weights` one of `"median"`, `"trimmed_mean"` (without the
            fifth of largest and of smallest values) and `"krum"` (the update nearest to the
            others). Defaults to `"mean"`.

    Returns:
        A `DeviceRound`. Its `save(path)` writes the weights that the phones load next.

    Raises:
        ValueError: there are no updates or all are refused (the model is not changed), `weights`
            does not have one number above 0 per update or is given with a robust aggregation, a
            limit is not above 0, or the aggregation is unknown.
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

    References: McMahan et al., 2017, Communication-Efficient Learning of Deep Networks from
    Decentralized Data (arXiv:1602.05629); Sun et al., 2019, Can You Really Backdoor Federated
    Learning? (arXiv:1911.07963; clipped norms); Yin et al., 2018 (arXiv:1803.01498; median and
    trimmed mean); Blanchard et al., 2017, Machine Learning with Adversaries (krum).
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"aggregate_device_updates takes a Keras model. Received: model={model!r}.")
    check_choice("aggregation", aggregation, get_args(Aggregation))
    for name, limit in (("max_update_norm", max_update_norm), ("max_weight", max_weight)):
        if limit is not None and limit != "auto":
            check_positive(name, limit)
    if aggregation != "mean" and weights is not None:
        raise ValueError(
            "A robust aggregation counts all updates equally. Received: "
            f"aggregation={aggregation!r} with `weights`. Leave out one of them."
        )
    updates = list(updates)
    shares = _checked_shares(weights, len(updates))
    accepted: dict[int, dict[str, np.ndarray]] = {}
    refused: dict[int, str] = {}
    versions: dict[tuple[str, ...], np.ndarray] = {}
    for i, update in enumerate(updates):
        try:
            read = read_update(model, update, versions)
            if accepted and read.keys() != next(iter(accepted.values())).keys():
                raise Refused("it has other weights than the first accepted update")
            accepted[i] = read
        except Refused as reason:
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
    exchanged = cast(Variables, find_weights(model, next(iter(accepted.values()))))
    start = flat(exchanged)
    # In float64, so that the order of the updates does not matter.
    changes = np.stack([flat(update) - start for update in accepted.values()])
    own = np.array([shares[i] for i in accepted])
    norms = np.linalg.norm(changes, axis=1)
    scales = _scales(norms, _limit(max_update_norm, norms[norms > 0]))
    capped = own * _scales(own, _limit(max_weight, own))
    changes = changes * scales[:, None]
    limited = {}
    for row, i in enumerate(accepted):
        said = []
        if scales[row] < 1:
            said.append(
                f"its norm of {norms[row]:.3g} was scaled to {norms[row] * scales[row]:.3g}"
            )
        if capped[row] < own[row]:
            said.append(f"its weight of {own[row]:g} was taken as {capped[row]:g}")
        if said:
            limited[i] = "; ".join(said)
    if aggregation == "mean":
        change = capped @ changes / capped.sum()
    else:
        change = robust_row(tf.constant(changes), aggregation).numpy()
    weights_sent = assign(model, exchanged, start + change)
    return DeviceRound(weights_sent, tuple(accepted), refused, limited)


def flat(weights: Mapping[str, Any]) -> np.ndarray:
    """Returns weights as one float64 vector, in the order of the mapping."""
    return np.concatenate([np.asarray(w).astype("float64").ravel() for w in weights.values()])


def assign(model: keras.Model, exchanged: Variables, vector: np.ndarray) -> dict[str, np.ndarray]:
    """Assigns a vector in the order of `flat`; returns what phones load, with the new version."""
    place = 0
    for variable in exchanged.values():
        size = math.prod(variable.shape)
        part = vector[place : place + size]
        variable.assign(part.reshape(variable.shape).astype("float32"))
        place += size
    return current_weights(model, exchanged)


def current_weights(model: keras.Model, exchanged: Variables) -> dict[str, np.ndarray]:
    """Returns what phones load: the weights of a model by name, with their version."""
    values = {name: keras.ops.convert_to_numpy(v).copy() for name, v in exchanged.items()}
    return {**values, VERSION: model_version(model, exchanged)}


def _limit(given: Limit, values: np.ndarray) -> float:
    """Returns a limit; `"auto"` is a multiple of the lower median of the values."""
    if given == "auto":
        middle = np.sort(values)[(len(values) - 1) // 2] if len(values) else math.inf
        return float(_TIMES * middle)
    return math.inf if given is None else float(given)


def _scales(values: np.ndarray, limit: float) -> np.ndarray:
    """Returns the factors that bring values down to a limit."""
    return np.minimum(1.0, limit / np.maximum(values, 1e-300))


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


def read_update(
    model: keras.Model, update: Update, versions: dict[tuple[str, ...], np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the checked weights of an update, without the version.

    Args:
        model: the model.
        update: a path, or arrays by name.
        versions: a cache of the versions of the model by the names of the exchanged weights.

    Raises:
        Refused: with the reason.
    """
    if not isinstance(update, (str, os.PathLike, Mapping)):
        raise Refused(f"it is a {type(update).__name__}, not a file or a dict of arrays")
    try:
        if not isinstance(update, Mapping):
            sizes = {name: 4 * math.prod(v.shape) for name, v in all_weights(model).items()}
            update = read_arrays(update, {**sizes, VERSION: 4 * 2 * HALF})
        return _checked(model, update, versions)
    except OSError as error:
        raise Refused(f"it cannot be read ({error})") from error
    except (TypeError, ValueError) as error:
        raise Refused(str(error)) from error


def _checked(
    model: keras.Model,
    update: Mapping[str, Any],
    versions: dict[tuple[str, ...], np.ndarray],
) -> dict[str, np.ndarray]:
    exchanged = find_weights(model, update.keys() - {VERSION})
    if exchanged is None:
        raise Refused("it has other weights than this model")
    wanted = {
        name: {"shape": variable.shape, "dtype": np.dtype(variable.dtype)}
        for name, variable in exchanged.items()
    }
    wanted[VERSION] = {"shape": (2 * HALF,), "dtype": np.dtype("int32")}
    reason = mismatch(update, wanted)
    if reason is not None:
        raise Refused(reason)
    key = tuple(exchanged)
    if key not in versions:
        versions[key] = model_version(model, exchanged)
    same = np.equal(update[VERSION], versions[key])
    if not same[:HALF].all():
        raise Refused("it is from another model")
    if not same[HALF:].all():
        raise Stale("it is stale: trained from weights other than the current ones")
    return {name: np.asarray(update[name]) for name in exchanged}
