"""The work of a node: the local training of `FederatedAveraging`, without TFF."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.federated.checkpoints import describe_model
from keras_lp.federated.clients.source import Source, replace_inputs
from keras_lp.federated.engine import head_sums
from keras_lp.federated.engine.blocks import Work, block_spec, rows_reader, rows_spec, to_blocks
from keras_lp.federated.engine.client_work import LocalTraining, train_block
from keras_lp.federated.engine.merging import find_merging
from keras_lp.federated.engine.rounds import Rounds, changing
from keras_lp.federated.engine.sums import Sums
from keras_lp.federated.fleet.messages import Content
from keras_lp.model import class_balance
from keras_lp.model.caching import FeatureCache
from keras_lp.tasks.heads import heads

_NAME = "node"  # of the only client


def version(model: keras.Model) -> str:
    """Returns a digest of what stays the same: structure, settings, frozen weights."""
    text = json.dumps(describe_model(model), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Refusal(ValueError):  # noqa: N818
    """What a node does not accept of the server. Its text has nothing of the data."""


class Node:
    """A node: it answers what the server asks.

    Args:
        load: returns the data of the node, `(x, y)` or `(x, y, sample_weight)`.
        name: the name by which the server knows the node.
        cache: folder for models that the server sent.
    """

    def __init__(self, load: Callable[[], Any], name: int | str, cache: Path | None = None) -> None:
        self._name = name
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._cache = cache or home / "keras_lp" / "fleet"
        self._load = load
        self._training: _Training | None = None

    def answer(self, asked: dict[str, Any], arrays: Sequence[np.ndarray]) -> Content:
        """Returns the answer to a question of the server.

        Args:
            asked: JSON values with `work`, what is asked, and `version`, of the model.
            arrays: the arrays that belong to it.

        Raises:
            Refusal: the model of the node is of another version.
        ValueError: the data do not fit.
        """
        work = asked["work"]
        if work == "hello":
            return {"name": self._name, "known": self._open(asked) is not None}, []
        if work == "model":
            self._keep(asked["version"], arrays[0].tobytes())
            return {}, []
        training = self._open(asked)
        if training is None:
            raise Refusal(
                "A node must have the model of the server. Received: version "
                f"{asked['version']}, which this node does not have. Start the run again."
            )
        return training.answer(asked, arrays)

    def _open(self, asked: dict[str, Any]) -> _Training | None:
        """Returns the training of a model of some version, None without the model."""
        known = self._training
        if known is not None and (known.version, known.settings) == _key(asked):
            return known
        path = self._path(asked["version"])
        if not path.exists():
            return None
        try:
            model = keras.saving.load_model(path)
        except Exception:  # a damaged file can raise anything
            model = None
        if model is None or version(model) != asked["version"]:
            path.unlink(missing_ok=True)  # the server sends it again
            return None
        self._training = _Training(model, self._load, *_key(asked))
        return self._training

    def _keep(self, name: str, content: bytes) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".keras", delete=False) as file:
            file.write(content)
        try:
            found = version(keras.saving.load_model(file.name))
            if found == name:
                os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)
        if found != name:
            raise Refusal(
                "The model of the server must be of the version that it names. Received: a model "
                f"of version {found}, named {name}. Update keras_lp on both to the same release."
            )

    def _path(self, name: str) -> Path:
        if not name.isalnum():
            raise Refusal(f"A version consists of letters and digits. Received: {name!r}.")
        return self._cache / f"{name}.keras"


def _form(part: Any) -> Any:
    """Returns the shapes and dtypes of examples, JSON values."""
    if isinstance(part, dict):
        return {name: _form(one) for name, one in part.items()}
    if isinstance(part, (list, tuple)):
        return [_form(one) for one in part]
    return [list(part.shape[1:]), str(part.dtype)]


def _key(asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return asked["version"], asked["settings"]


class _Training(Rounds):
    """Trains a model on the data of a node.

    Args:
        model: the model.
        load: returns the data.
        version: the version of the model.
        settings: of the federation, JSON values.
    """

    def __init__(
        self, model: keras.Model, load: Callable[[], Any], version: str, settings: dict[str, Any]
    ) -> None:
        local = LocalTraining(**settings["local"])
        super().__init__(model, local, keras.optimizers.SGD(1.0), settings["weighting"])
        self.version = version
        self.settings = settings
        data = {_NAME: load()}
        self._inputs = Source(model, data, on_features=False).load(_NAME)
        self._source = Source(model, data)
        (self._data,) = self._source.load_all([_NAME])
        self._train: Any = None

    def answer(self, asked: dict[str, Any], arrays: Sequence[np.ndarray]) -> Content:
        """Returns the answer to a question about training."""
        if asked["work"] == "form":
            return self._form()
        if asked["work"] == "moments":
            return self._moments()
        if asked["work"] == "classes":
            return self._classes()
        return self._update(asked, arrays)

    def _form(self) -> Content:
        """Returns the form of the data and of the metrics, without any value of the data."""
        self._stateless(self._data, self._source.on_features)
        merging = find_merging(self._model, self._data)
        return {"form": [_form(part) for part in self._inputs], "ways": merging.ways}, []

    def _moments(self) -> Content:
        """Returns the sums of the features, of which the server makes their scale."""
        data = self._data
        if not self._source.on_features:
            with FeatureCache(self._model, verbose=0) as cache:
                data = replace_inputs(cache, data)
        sums = Sums([data], self._folder)
        found = sums.here(head_sums.feature_moments(sums.read_rows))
        return {"names": list(found)}, list(found.values())

    def _classes(self) -> Content:
        """Returns the counts of the classes of balanced heads."""
        waiting = class_balance.waiting_heads(heads(self._model))
        sums = Sums([self._data], self._folder)
        found = sums.here(head_sums.class_sums(waiting, sums.read_rows))
        return {"names": list(found)}, list(found.values())

    def _update(self, asked: dict[str, Any], arrays: Sequence[np.ndarray]) -> Content:
        """Trains from the weights of the server; returns what one client adds to the round."""
        for variable, value in zip(changing(self._model), arrays, strict=True):
            variable.assign(value)
        personal, groups = self.personal_variables(), self._groups()
        if self._train is None:
            stateless = self._stateless(self._data, self._source.on_features)
            read = rows_reader(self._folder, rows_spec(self._data))
            block = train_block(stateless, self._local, groups.of_variables, 1, read, self._done)
            self._train = stateless, tf.function(block, autograph=False)
        stateless, train = self._train
        stateless.write_frozen()
        shares = groups.shares(self._data)
        if asked["uniform"]:
            shares = np.ones_like(shares)
        work = Work(self._data, shares, np.array(asked["seed"], "int32"), personal.values())
        (element,) = to_blocks([work], asked["learning_rate"], self._folder, asked["clip"])
        specs = block_spec(len(groups), personal.size)
        values = element.get_single_element()
        tensors = {name: tf.cast(values[name], spec.dtype) for name, spec in specs.items()}
        weights = tuple(tf.constant(variable.numpy()) for variable in personal.shared)
        result = train(weights, tensors)
        parts = result["metrics"]
        counts = [len(result["update"]), len(parts["states"])]
        found = [*result["update"], *parts["states"], parts["place"], result["shares"]]
        return (
            {
                "counts": counts,
                "dropped": int(result["dropped"][0]),
                "within": int(result["within"]),
            },
            [np.asarray(one) for one in found],
        )
