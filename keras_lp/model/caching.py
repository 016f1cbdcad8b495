"""Caches the features of a frozen backbone.

A frozen backbone gives the same features in every epoch. `fit` therefore runs it once over the data
and then trains the layers above it on the features: the same result in a fraction of the time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones.features import (
    Features,
    are_features,
    feature_batch_size,
    feature_function,
    features_layer,
    obstacle,
)
from keras_lp.model.data import is_arrays, is_batches
from keras_lp.utils.arguments import Verbose
from keras_lp.utils.files import named_errors
from keras_lp.utils.keras_internals import is_distributed, loss_tracker, train_validation_split
from keras_lp.utils.repeatable import is_repeatable


class FeatureCache:
    """Runs the frozen part of a model over data, and stores the features.

    A context manager: it removes its files on exit.

    Args:
        model: a model without `obstacle`.
        verbose: whether to show progress.
    """

    def __init__(self, model: keras.Model, verbose: Verbose = "auto") -> None:
        self._compute: Any = feature_function(model)
        self._batch_size = feature_batch_size(model)
        self._traced = model.run_eagerly
        self._left = cast(Features, features_layer(model)).memory
        self._verbose = 1 if verbose == "auto" else int(verbose)
        self._folder: str | None = None
        self._streamed = False
        self._in_files: list[np.ndarray] = []
        self._handles: list[Any] = []

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *_: Any) -> None:
        self._in_files.clear()
        for handle in self._handles:
            with contextlib.suppress(OSError):  # of a file that had no space
                handle.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def wrote_files(self) -> bool:
        """Whether some of the data are stored in files."""
        return self._folder is not None or self._streamed

    def take(self, data: Any) -> tuple[tuple[Any, ...], int | None]:
        """Returns `(features, y, sample_weight)`, without entries of None, and the batch size.

        Args:
            data: a tuple of arrays, for which the caller chooses the batch size (None is
                returned), of inputs or of features; or a data set of batches.
        """
        if isinstance(data, (tuple, list)):
            x, *rest = data
            return (self._of_arrays(x), *(part for part in rest if part is not None)), None
        if isinstance(data, tf.data.Dataset):
            total = int(data.cardinality())
            return self._of_batches(data, total if total >= 0 else None)
        return self._of_batches((data[i] for i in range(data.num_batches)), data.num_batches)

    def read_batches(
        self, parts: tuple[Any, ...], batch_size: int, shuffle: bool
    ) -> tf.data.Dataset:
        """Returns batches of the stored data, read from its files row by row."""
        flat = [np.asanyarray(part) for part in keras.tree.flatten(parts)]
        count, types = len(flat[0]), [(part.dtype, part.shape[1:]) for part in flat]
        structure = keras.tree.map_structure(lambda _: None, parts)
        # TensorFlow keeps the functions below, so they refer to the list and not to the arrays.
        held, first = self._in_files, len(self._in_files)
        last = first + len(flat)
        held += flat

        def read(rows: np.ndarray) -> list[np.ndarray]:
            return [part[rows] for part in held[first:last]]

        def batch(rows: tf.Tensor) -> Any:
            columns = tf.numpy_function(read, [rows], [dtype for dtype, _ in types])
            for column, (_, shape) in zip(columns, types, strict=True):
                column.set_shape((None, *shape))
            return keras.tree.pack_sequence_as(structure, columns)

        rows = tf.data.Dataset.range(count)
        if shuffle:
            rows = rows.shuffle(count)
        return rows.batch(batch_size).map(batch).prefetch(2)

    def reserve(self, count: int) -> bool:
        """Reserves bytes of memory; returns False if not enough are left."""
        if count > self._left:
            return False
        self._left -= count
        return True

    def new_file(self) -> Any:
        """Opens a new file in the temporary folder."""
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="keras_lp_features_")
        handle, path = tempfile.mkstemp(dir=self._folder)
        self._handles.append(os.fdopen(handle, "wb"))
        return self._handles[-1], path

    def _of_arrays(self, x: Any) -> Any:
        if are_features(x):  # computed before, for several models
            self._streamed |= any(isinstance(part, np.memmap) for part in x.values())
            return x
        count, size = len(keras.tree.flatten(x)[0]), self._batch_size
        starts = range(0, count, size)
        batches = (
            (keras.tree.map_structure(lambda leaf, i=start: leaf[i : i + size], x),)
            for start in starts
        )
        ((features,), _) = self._of_batches(batches, len(starts))
        return features

    def _of_batches(self, batches: Iterable[Any], total: int | None) -> tuple[Any, int]:
        columns: list[_Rows] = []
        size = structure = None
        for batch in self._progress(batches, total):
            x, *rest = batch
            parts = (self._features(x), *(part for part in rest if part is not None))
            flat = keras.tree.flatten(parts)
            if size is None:
                size, structure = len(flat[0]), parts
                columns = [_Rows(self) for _ in flat]
            for rows, part in zip(columns, flat, strict=True):
                rows.append(part)
        if size is None:
            raise ValueError("A data set to train on must have a batch. Received: an empty one.")
        return keras.tree.pack_sequence_as(structure, [rows.finish() for rows in columns]), size

    def _features(self, x: Any) -> dict[str, tf.Tensor]:
        x = keras.tree.map_structure(lambda leaf: tf.convert_to_tensor(leaf), x)
        if not self._traced:  # for any number of examples: the last batch needs no new trace
            self._compute.get_concrete_function(keras.tree.map_structure(_spec, x))
            self._traced = True
        return self._compute(x)

    def _progress(self, steps: Iterable[Any], total: int | None) -> Iterable[Any]:
        if not self._verbose:
            yield from steps
            return
        print("Features of the frozen backbone, computed once:", flush=True)
        if self._verbose == 2:
            yield from steps
            return
        bar = keras.utils.Progbar(total)
        done = 0
        for step in steps:
            yield step
            done += 1
            bar.update(done, finalize=done == total)
        if done != total:
            bar.update(done, finalize=True)


class _Rows:
    """An array that grows by batches: in memory while there is space, else in a file."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._array: Any = None  # an array, from the first batch on
        self._count = 0
        self._file: Any = None
        self._path = ""

    def append(self, batch: Any) -> None:
        batch = np.ascontiguousarray(batch)
        if self._array is None:
            self._array = np.empty((0, *batch.shape[1:]), batch.dtype)
        if batch.shape[1:] != self._array.shape[1:]:
            raise ValueError(
                "Features can be cached only if features and labels of all examples have the same "
                f"shape. Received: shapes {self._array.shape[1:]} and {batch.shape[1:]}. Pass "
                "cache_features=False."
            )
        if self._file is None and not self._cache.reserve(batch.nbytes):
            self._file, self._path = self._cache.new_file()
            self._write(self._array[: self._count])
            self._array = self._array[:0].copy()
        if self._file is not None:
            self._write(batch)
        else:
            end = self._count + len(batch)
            if end > len(self._array):  # usually grows in place
                self._array.resize((max(end, end * 5 // 4), *batch.shape[1:]), refcheck=False)
            self._array[self._count : end] = batch
        self._count += len(batch)

    def _write(self, rows: np.ndarray) -> None:
        with named_errors(self._path):
            self._file.write(rows.view("uint8").data)  # bfloat16 does not support buffers

    def finish(self) -> np.ndarray:
        shape = (self._count, *self._array.shape[1:])
        if self._file is None:
            self._array.resize(shape, refcheck=False)
            return self._array
        with named_errors(self._path):
            self._file.close()
        return np.memmap(self._path, self._array.dtype, "r", shape=shape)


@contextlib.contextmanager
def computed_once(model: keras.Model, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the arguments of `fit` with features instead of inputs if the result is the same.

    Args:
        model: the model to train.
        arguments: the arguments of `fit` by name.

    Raises:
        ValueError: if `cache_features=True` and the data are infinite or cannot be read twice.
    """
    if not _is_wanted(model, arguments):
        yield arguments
        return
    x, y, weight = (arguments[name] for name in ("x", "y", "sample_weight"))
    validation, split = arguments["validation_data"], arguments["validation_split"]
    if split and validation is None:
        (x, y, weight), validation = train_validation_split((x, y, weight), split)
    with FeatureCache(model, arguments["verbose"]) as cache:
        parts, size = cache.take((x, y, weight) if is_arrays(x) else x)
        size = size or arguments["batch_size"]
        new = {**arguments, "validation_split": 0.0, "validation_data": validation}
        if cache.wrote_files:
            train = cache.read_batches(parts, size or 32, arguments["shuffle"])
            new.update(x=train, y=None, sample_weight=None, batch_size=None)
        else:
            x, y, weight = (*parts, None, None)[:3]
            new.update(x=x, y=y, sample_weight=weight, batch_size=size)

        in_arrays = isinstance(validation, (tuple, list)) and _fit_together(validation)
        if in_arrays or caches_batches(model, validation):
            parts, own_size = cache.take(validation)
            size = arguments["validation_batch_size"] or own_size or size
            if cache.wrote_files:
                parts = cache.read_batches(parts, size or 32, shuffle=False)
            new.update(validation_data=parts, validation_batch_size=size)
        with _several_steps_a_call(model, new):
            yield new


@contextlib.contextmanager
def _several_steps_a_call(model: keras.Model, arguments: dict[str, Any]) -> Iterator[None]:
    """Lets Keras run several steps per call if no callback needs single steps.

    A step of a head takes less time than Keras needs to start it.
    """
    callbacks = arguments["callbacks"] or []
    callbacks = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    by_epoch = (
        keras.callbacks.CSVLogger,
        keras.callbacks.EarlyStopping,
        keras.callbacks.LearningRateScheduler,
        keras.callbacks.ReduceLROnPlateau,
    )
    limited = arguments["steps_per_epoch"] or arguments["validation_steps"]
    watched = any(
        type(callback) not in by_epoch and not getattr(callback, "by_epoch", False)
        for callback in callbacks
    )
    single = arguments["epochs"] - arguments["initial_epoch"] < 2
    if model.steps_per_execution != 1 or model.run_eagerly or limited or watched or single:
        yield
        return
    functions = model.train_function, model.test_function
    # Those of the last `fit`, unless the model was compiled since, which creates a new tracker.
    tracker, *several = model.__dict__.get("_several_steps", (None, None, None))
    if tracker is not loss_tracker(model):
        several = [None, None]
    model.train_function, model.test_function = several
    model.steps_per_execution = 32
    try:
        yield
    finally:
        model.__dict__["_several_steps"] = (
            loss_tracker(model), model.train_function, model.test_function
        )  # fmt: skip
        model.steps_per_execution = 1
        model.train_function, model.test_function = functions


def caches_batches(model: keras.Model, data: Any) -> bool:
    """Whether the features of these data are cached if they are batches that can be read twice."""
    cache = cast(Features, features_layer(model)).cache
    return is_batches(data) and (cache is True or (cache == "auto" and is_repeatable(data)))


def _is_wanted(model: keras.Model, arguments: dict[str, Any]) -> bool:
    layer, x = features_layer(model), arguments["x"]
    if layer is None or layer.cache is False or obstacle(model) is not None:
        return False
    if is_distributed(model):
        return False
    if is_arrays(x):  # if they do not match, Keras raises the error
        weight = arguments["sample_weight"]
        return arguments["y"] is not None and _fit_together((x, arguments["y"], weight))
    misused = arguments["validation_split"] or any(  # Keras rejects these with a data set
        arguments[name] is not None for name in ("y", "sample_weight")
    )
    if (layer.cache == "auto" and not is_repeatable(x)) or misused:
        return False
    endless = isinstance(x, tf.data.Dataset) and (
        int(x.cardinality()) == tf.data.INFINITE_CARDINALITY
        or (int(x.cardinality()) < 0 and arguments["steps_per_epoch"] is not None)
    )
    if endless or not is_batches(x):
        raise ValueError(
            "cache_features=True needs finite data that can be read again: arrays, a finite "
            f"`tf.data.Dataset` or a `PyDataset`. Received: x of type {type(x).__name__}"
            f"{' that may be infinite' if endless else ''}. Limit a data set "
            "with `.take(n)`, or build the model with cache_features=False."
        )
    return True


def _fit_together(parts: Sequence[Any]) -> bool:
    """Whether these are arrays with the same number of examples, at least one."""
    if len(parts) < 2 or not is_arrays(parts[0]):
        return False
    leaves = [leaf for leaf in keras.tree.flatten(list(parts)) if leaf is not None]
    lengths = {len(leaf) for leaf in leaves if len(np.shape(leaf)) > 0}
    return len(lengths) == 1 and min(lengths) > 0


def _spec(tensor: tf.Tensor) -> tf.TensorSpec:
    return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype)
