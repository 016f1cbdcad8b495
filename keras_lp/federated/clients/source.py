"""Loads the data of sampled clients and computes features of a frozen backbone once."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Hashable, Sequence
from typing import Any

import keras

from keras_lp.backbones import features
from keras_lp.federated.clients.arrays import Arrays
from keras_lp.federated.clients.clients import Clients, Population, fitting_arrays
from keras_lp.federated.clients.padding import align, example_specs, sizes_of
from keras_lp.model.caching import FeatureCache
from keras_lp.utils.progress import Progress


class FeatureClients(dict[Hashable, Arrays]):
    """The arrays of clients by id, checked, with features of the frozen backbone as inputs.

    The output of `Source.features`, for models with the same backbone and tasks.
    """


class Source(contextlib.AbstractContextManager["Source", None]):
    """The checked clients of one call of `fit` or `evaluate`.

    Arrays in a dict are checked immediately, other clients when they are loaded. If the frozen
    backbone returns the same features in every round, they are computed once per client, under the
    same conditions as in `lp.Model.fit`: for arrays, or with `cache_features=True` for all data.

    This is a context manager, which deletes files with features on exit.

    Args:
        model: the model.
        clients: as in `FederatedAveraging.fit`.
        on_features: whether to replace inputs by features. Defaults to None: under the conditions
            above.

    Attributes:
        ids: the ids of the clients.
        on_features: whether the inputs are features.
    """

    def __init__(
        self, model: keras.Model, clients: Clients, on_features: bool | None = None
    ) -> None:
        self._model = model
        self._spec: Any = None
        self._kept: dict[Hashable, Arrays] = {}
        self._sizes: list[tuple[int, ...]] = []  # largest sizes of examples so far
        if isinstance(clients, FeatureClients):
            self.ids, self.on_features = list(clients), True
            self._features: dict[Hashable, Any] = dict(clients)
            self._cache: FeatureCache | None = None
            return
        self._population = Population(clients, model)
        self._population.check()
        self.ids = self._population.ids
        for client in self.ids:
            if self._population.holds(client):
                self._kept[client] = self._checked(client)
        if on_features is None:
            on_features = _features_wanted(model, in_memory=len(self._kept) == len(self.ids))
        self.on_features = on_features
        self._cache = FeatureCache(model, verbose=0) if self.on_features else None
        self._features = {}

    def load(self, client: Hashable) -> Arrays:
        """Returns the arrays of a client, with features as inputs if `on_features`."""
        if client not in self._features:
            data = self._kept[client] if client in self._kept else self._checked(client)
            if self._cache is None:
                return data
            self._features[client] = replace_inputs(self._cache, data)
        return self._features[client]

    def features(self) -> FeatureClients:
        """Returns all clients with features as inputs, if `on_features`."""
        return FeatureClients({client: self.load(client) for client in self.ids})

    def waiting(self, clients: Sequence[Hashable]) -> int:
        """Returns how many clients take time to load: from their source, or for features."""
        ready = self._features if self.on_features else self._kept
        return sum(client not in ready for client in clients)

    def load_all(
        self, clients: Sequence[Hashable], progress: Progress | None = None
    ) -> list[Arrays]:
        """Returns the arrays of clients; shorter sequences are padded to the longest so far.

        Args:
            clients: their ids.
            progress: gets a step for each of `waiting`. Defaults to None.
        """
        loaded = []
        for client in clients:
            steps = self.waiting([client])
            loaded.append(self.load(client))
            if progress is not None:
                progress.step(steps)
        data = align(self._model, loaded, self._sizes)
        self._sizes = sizes_of(data[0])
        return data

    def __exit__(self, *_: Any) -> None:
        self._features.clear()
        if self._cache is not None:
            self._cache.__exit__()

    def _checked(self, client: Hashable) -> Arrays:
        data = fitting_arrays(self._model, client, self._population.load(client))
        spec = example_specs(self._model, data)
        if self._spec is None:
            self._spec = client, spec
        if spec != self._spec[1]:
            raise ValueError(
                "The data of all clients must have one structure, shape and dtype. Received: "
                f"client {self._spec[0]!r} with {_readable(self._spec[1])}, client {client!r} with "
                f"{_readable(spec)}. Sequences may differ in length only if the size of the input "
                "is None and the model masks padding: Embedding(mask_zero=True), Masking, or an "
                'input "padding_mask".'
            )
        return data


def replace_inputs(cache: FeatureCache, data: Arrays) -> Arrays:
    """Returns the arrays of a client with features instead of inputs."""
    ((found,), _) = cache.take((data[0],))
    return (collections.OrderedDict(sorted(found.items())), *data[1:])


def _features_wanted(model: keras.Model, in_memory: bool) -> bool:
    layer = features.features_layer(model)
    if layer is None or layer.cache is False or (layer.cache == "auto" and not in_memory):
        return False
    is_own = getattr(model, "_is_extended", lambda: True)()  # a subclass may want the inputs
    return not is_own and features.obstacle(model) is None


def _readable(spec: Any) -> str:
    names = ("x", "y", "sample_weight")
    parts = (dict(part) if isinstance(part, dict) else part for part in spec)
    return ", ".join(f"{name}: {part}" for name, part in zip(names, parts, strict=False))
