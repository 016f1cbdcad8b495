"""Examples for calibrating and verifying a `.tflite` file: from the user, or generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones.pixels import warn_of_scaled_images
from keras_lp.model import checks
from keras_lp.model.model import input_structure
from keras_lp.tflite.interface import Input, Interface, Output

GENERATED = "generated inputs"
_COUNT = 64  # number of generated examples


@dataclasses.dataclass(frozen=True)
class Examples:
    """Inputs in the order of `model.inputs`, and the known labels by output name."""

    inputs: list[np.ndarray]
    labels: dict[str, np.ndarray]
    source: str

    def __len__(self) -> int:
        return len(self.inputs[0])

    def thinned(self, count: int) -> Examples:
        """Returns at most `count` evenly spaced examples, as data are often sorted by class."""
        if len(self) <= count:
            return self
        rows = np.linspace(0, len(self) - 1, count).astype(int)
        inputs = [array[rows] for array in self.inputs]
        return Examples(inputs, {k: y[rows] for k, y in self.labels.items()}, self.source)


def read_examples(described: Interface, data: Any, source: str) -> Examples:
    """Reads and checks the examples that a user passed.

    Args:
        described: the model to be exported.
        data: inputs, an `(inputs, labels)` pair, or a batched `tf.data.Dataset` of either.
        source: the name of the argument, for errors and the report.

    Raises:
        ValueError: the data have no examples or never end, the inputs have the wrong shape or
            names or are not finite, or the labels do not match the outputs.
    """
    if isinstance(data, tf.data.Dataset):
        data = _read_dataset(data, source)
    x, y = (
        (data[0], data[1] if len(data) > 1 else None) if isinstance(data, tuple) else (data, None)
    )
    inputs = _read_inputs(described, x, source)
    counts = {len(array) for array in inputs}
    if counts == {0} or len(counts) > 1:
        raise ValueError(
            f"Every input of `{source}` must have the same number of examples, at least one. "
            f"Received: {sorted(counts)} examples."
        )
    checks.check_finite(inputs, f" of {source}")
    warn_of_scaled_images(described.model, inputs, source)
    labels = {} if y is None else _read_labels(described.outputs, y, len(inputs[0]), source)
    return Examples(inputs, labels, source)


def generate_examples(described: Interface) -> Examples:
    """Generates 64 examples that show whether a file computes the same as the model.

    Images are colored areas with noise, because images of plain noise all look the same to a
    model. Other floats have magnitudes from 1 to 255. Integers that go into an Embedding are valid
    ids, padded at the end with 0 as in most models. Other integers are 0 or 1.
    """
    rng = np.random.default_rng(0)
    inputs = [_generate(rng, one) for one in described.inputs]
    return Examples(inputs, {}, GENERATED)


def _generate(rng: np.random.Generator, described: Input) -> np.ndarray:
    shape = (_COUNT, *described.shape)
    if described.dtype == "uint8" or keras.backend.is_float_dtype(described.dtype):
        array = _images(rng, shape) if len(shape) == 4 else _numbers(rng, shape)
    elif described.ids is not None:
        array = generate_texts(rng, shape, described.ids)
    else:
        array = rng.integers(0, 2, shape)
    return array.astype(described.dtype)


def _read_dataset(dataset: tf.data.Dataset, source: str) -> Any:
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            f"`{source}` must be finite. Received: an endless data set. Limit the number of "
            "batches, for example with `dataset.take(20)`."
        )
    batches = list(dataset.as_numpy_iterator())
    if not batches:
        raise ValueError(f"`{source}` must have at least one example. Received: an empty data set.")
    return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)


def _read_inputs(described: Interface, x: Any, source: str) -> list[np.ndarray]:
    structure = input_structure(described.model)
    if isinstance(structure, Mapping):
        if not isinstance(x, Mapping) or not set(structure) <= set(x):
            received = f"the keys {list(x)}" if isinstance(x, Mapping) else type(x).__name__
            raise ValueError(
                f"`{source}` must be a dict with the inputs {list(structure)}. Received: "
                f"{received}."
            )
        found = [x[name] for name in sorted(structure)]
    else:
        found = list(x) if isinstance(x, list) and len(described.inputs) > 1 else [x]
    if len(found) != len(described.inputs):
        raise ValueError(
            f"`{source}` must be a list of the {len(described.inputs)} inputs "
            f"{described.input_names}. "
            f"Received: {len(found)}."
        )
    arrays = [np.asarray(array) for array in found]
    for array, one in zip(arrays, described.inputs, strict=True):
        if array.shape[1:] != one.shape or not array.ndim:
            raise ValueError(
                f"The examples of `{source}` must have shape {one.shape}. Received: "
                f"an array of shape {array.shape}. Batch a data set first."
            )
    pairs = zip(arrays, described.inputs, strict=True)
    return [array.astype(one.dtype) for array, one in pairs]


def _read_labels(
    outputs: Sequence[Output], y: Any, count: int, source: str
) -> dict[str, np.ndarray]:
    described = {output.name: output for output in outputs}
    if isinstance(y, Mapping):
        checks.check_label_names(described, y, f" of {source}")
    elif len(described) == 1:
        y = {next(iter(described)): y}
    elif isinstance(y, (list, tuple)) and len(y) == len(described):
        y = dict(zip(described, y, strict=True))
    else:
        raise ValueError(
            f"The labels of `{source}` must be a dict with the keys {list(described)}. Received: "
            f"labels of type {type(y).__name__}."
        )
    labels = {name: np.asarray(array) for name, array in y.items()}
    for name, array in labels.items():
        if array.shape[:1] != (count,):
            raise ValueError(
                f"`{source}` must have a label for each of its {count} examples. Received: labels "
                f"of shape {array.shape} for {name!r}."
            )
        task = described[name].task
        if task is not None:
            task.check_labels(array, f"y of {source}")
    return labels


def _images(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    count, height, width, channels = shape
    coarse = rng.uniform(0, 255, (count, 4, 4, channels))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    areas = coarse[:, rows][:, :, columns]
    return np.clip(areas + rng.normal(0, 20, shape), 0, 255)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    sizes = np.geomspace(1, 255, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return sizes * rng.normal(size=shape)


def generate_texts(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> np.ndarray:
    """Generates ids below `size`; each text ends with a random number of zeros as padding."""
    ids = rng.integers(min(1, size - 1), size, shape)
    lengths = rng.integers(1, shape[-1] + 1, (*shape[:-1], 1))
    return np.where(np.arange(shape[-1]) < lengths, ids, 0)
