"""Data sets of Hugging Face as `tf.data` pairs of input and labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.data.dataset import ClassNames, class_names_of
from keras_lp.data.roles import (
    Feature,
    find_roles,
    first_class_label,
    numbers_of_rank,
    read_pair,
)
from keras_lp.utils.arguments import check_choice
from keras_lp.utils.interop import HUGGING_FACE, is_instance

_PREFIX = "hf:"
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes


def is_hugging_face(name: Any) -> bool:
    """Whether a name begins with `hf:`, or is a data set of Hugging Face."""
    if isinstance(name, str):
        return name.startswith(_PREFIX)
    return is_instance(name, "datasets", HUGGING_FACE)


def read_hugging_face(
    name: Any,
    split: str | None,
    inputs: str | None,
    labels: str | Sequence[str] | None,
    data_dir: str | os.PathLike[str] | None,
    download: bool,
) -> tuple[tf.data.Dataset, ClassNames, Callable[[], np.ndarray], str]:
    """Returns single examples, class names, a function that returns class numbers, and the split.

    The arguments are those of `lp.load_dataset`.
    """
    found, split = _open(name, split, data_dir, download)
    title = name if isinstance(name, str) else type(name).__name__
    kinds = {key: _describe(kind) for key, kind in found.features.items()}
    input_name, roles = find_roles(title, kinds, inputs, labels)
    found = found.select_columns([input_name, *(one.feature for one in roles)])
    if kinds[input_name].kind == "image":
        found = _with_channels(found, input_name)
    found = found.with_format("numpy")
    spec = {key: _spec(found, key) for key in found.features}
    for one in roles:
        if kinds[one.feature].kind in ("number", "vector"):  # a missing one is NaN
            spec[one.feature] = tf.TensorSpec(spec[one.feature].shape, tf.float32)

    def examples() -> Any:
        for row in found:
            yield {key: _shaped(row[key], spec[key]) for key in spec}

    dataset = tf.data.Dataset.from_generator(examples, output_signature=spec)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(found)))
    names = {one.key: one.names for one in roles if one.names is not None}

    def class_numbers() -> np.ndarray:
        return np.asarray(found[first_class_label(title, roles)])

    pairs = dataset.map(read_pair(input_name, roles))
    return pairs, class_names_of(names, len(roles)), class_numbers, split


def _open(
    name: Any, split: str | None, data_dir: str | os.PathLike[str] | None, download: bool
) -> tuple[Any, str]:
    """Returns one `Dataset` and the name of its split."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "A data set of Hugging Face needs datasets. Install it: pip install 'keras_lp[interop]'"
        ) from error
    if isinstance(name, str):
        path, _, config = name.removeprefix(_PREFIX).partition(":")
        if any(os.path.exists(os.path.join(path, file)) for file in _SAVED):
            name = datasets.load_from_disk(path)
        elif split is None:
            raise ValueError(
                f'`split` must be given, such as "train". Received: split=None for {name!r}.'
            )
        else:
            settings = datasets.DownloadConfig(local_files_only=not download)
            cache = None if data_dir is None else os.fspath(data_dir)
            return (
                datasets.load_dataset(
                    path, config or None, split=split, cache_dir=cache, download_config=settings
                ),
                split,
            )
    if isinstance(name, datasets.Dataset):
        if split is not None and split != str(name.split):
            raise ValueError(
                "A Dataset of Hugging Face is one split. Received: "
                f"split={split!r} for a Dataset with split={str(name.split)!r}. Leave `split` out."
            )
        return name, str(name.split or "train")
    if not isinstance(name, datasets.DatasetDict):
        raise TypeError(
            "A data set of Hugging Face must be a Dataset or DatasetDict. Received: "
            f"{type(name).__name__}. Load it without `streaming`."
        )
    parts = [part.strip() for part in (split or "").split("+")]
    for part in parts:
        check_choice("split", part, list(name))
    return datasets.concatenate_datasets([name[part] for part in parts]), "+".join(parts)


def _describe(kind: Any) -> Feature:
    import datasets

    description = type(kind).__name__
    inner = getattr(kind, "feature", None)
    if isinstance(kind, datasets.ClassLabel):
        return Feature("class", description, list(kind.names))
    if isinstance(inner, datasets.ClassLabel):
        return Feature("classes", description, list(inner.names))
    if isinstance(kind, datasets.Image):
        return Feature("image", description)
    if isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string"):
        return Feature("text", description)
    shape = _shape(kind)
    if shape is None:
        return Feature("other", description)
    return Feature(numbers_of_rank(len(shape)), description)


def _shape(kind: Any) -> tuple[int | None, ...] | None:
    """Returns the shape of a feature of numbers, None for other features."""
    import datasets

    if isinstance(kind, datasets.Value):
        numbers = kind.dtype == "bool" or kind.dtype.startswith(("int", "uint", "float"))
        return () if numbers else None
    if hasattr(kind, "shape"):  # Array2D and others
        return tuple(kind.shape)
    if isinstance(getattr(kind, "feature", None), (datasets.Value, datasets.List)):
        inner = _shape(kind.feature)
        return None if inner is None else (None if kind.length < 0 else kind.length, *inner)
    return None


def _with_channels(found: Any, name: str) -> Any:
    """Decodes all images in grey or in colour, as the first one is."""
    import datasets

    mode = found[0][name].mode
    if mode in ("I", "F", "I;16"):
        raise ValueError(
            f"Images must have 8 bits per channel. Received: {name!r} with images of mode "
            f"{mode!r}. Map them to 8 bits first."
        )
    grey = mode in ("1", "L")
    return found.cast_column(name, datasets.Image(mode="L" if grey else "RGB"))


def _spec(found: Any, name: str) -> tf.TensorSpec:
    """Returns the spec of a feature, with the dtype of its first value."""
    import datasets

    kind = found.features[name]
    if isinstance(kind, datasets.ClassLabel):
        return tf.TensorSpec((), tf.int64)
    if isinstance(kind, datasets.Image):
        return tf.TensorSpec((None, None, 1 if kind.mode == "L" else 3), tf.uint8)
    if isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string"):
        return tf.TensorSpec((), tf.string)
    if isinstance(getattr(kind, "feature", None), datasets.ClassLabel):
        return tf.TensorSpec((None,), tf.int64)
    return tf.TensorSpec(_shape(kind), np.asarray(found[0][name]).dtype)


def _shaped(value: Any, spec: tf.TensorSpec) -> Any:
    """Returns a value with a last axis for grey images; absent values are missing labels."""
    if spec.dtype == tf.string:
        return "" if value is None else str(value)
    if value is None and spec.dtype.is_floating:
        value = np.full([size or 0 for size in spec.shape], np.nan)
    array = np.asarray(np.nan if value is None else value)
    if spec.dtype.is_integer and array.dtype.kind == "f":
        array = np.nan_to_num(array, nan=-1)
    if spec.shape.rank == 3 and array.ndim == 2:
        array = array[..., None]
    return array.astype(spec.dtype.as_numpy_dtype)
