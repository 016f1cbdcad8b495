"""Features that several models with the same frozen backbone share."""

from __future__ import annotations

import weakref
from typing import Any, cast

import keras

from keras_lp.backbones.features import Features, features_layer
from keras_lp.backbones.pixels import warn_of_scaled_images
from keras_lp.model import checks
from keras_lp.model.caching import FeatureCache, caches_batches
from keras_lp.model.data import as_numbers, as_weights, check_labels, checked, is_arrays


class SharedFeatures:
    """Computes the features of each data set once, for all models with the same frozen part.

    The features are in memory up to the model's `cache_memory`, and otherwise in temporary files,
    which are removed together with this object.

    Args:
        model: one of these models. `obstacle(model)` must be None.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._cache = FeatureCache(model, verbose=0)
        self._known: dict[Any, tuple[Any, Any]] = {}
        self._is_wanted = cast(Features, features_layer(model)).cache is not False
        weakref.finalize(self, self._cache.__exit__)

    def replace(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of `fit` with features instead of inputs.

        Data that cannot be read twice are returned unchanged, and so are all data of a model with
        `cache_features=False`. The same object is computed once: its content must not change.

        Args:
            arguments: arguments of `keras.Model.fit` by name.
        """
        new = dict(arguments)
        if not self._is_wanted:
            return new
        x = arguments.get("x")
        if is_arrays(x):
            y, weight = arguments.get("y"), arguments.get("sample_weight")
            new["x"] = self._arrays(x, y, weight)
        elif caches_batches(self._model, x):
            parts, size = self._batches(x)
            new.update(zip(("x", "y", "sample_weight"), parts, strict=False), batch_size=size)
        else:
            return new
        held_out = arguments.get("validation_data")
        if isinstance(held_out, (tuple, list)) and len(held_out) > 1 and is_arrays(held_out[0]):
            new["validation_data"] = (self._arrays(*held_out), *held_out[1:])
        elif caches_batches(self._model, held_out):
            new["validation_data"], size = self._batches(held_out)
            new["validation_batch_size"] = size
        return new

    def _arrays(self, x: Any, y: Any, weight: Any = None) -> Any:
        leaves = keras.tree.flatten(x)
        key = tuple(map(id, leaves))
        if key not in self._known:
            check_labels(self._model, x, y)
            warn_of_scaled_images(self._model, x)
            self._known[key] = (self._cache.take((x,))[0][0], leaves)  # the ids stay in use
            as_weights(self._model, as_numbers(self._model, y), weight)
        return self._known[key][0]

    def _batches(self, data: Any) -> Any:
        key = id(data)
        if key not in self._known:
            with checks.plain_errors():
                self._known[key] = (self._cache.take(checked(self._model, data)), data)
        return self._known[key][0]
