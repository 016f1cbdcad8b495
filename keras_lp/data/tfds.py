"""Loads data sets by name as `(input, labels)`, the form that the builders take."""

from __future__ import annotations

import functools
import os
import socket
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.backbones.images import check_image_size
from keras_lp.data.dataset import (
    ClassNames,
    chosen_per_class,
    class_names_of,
    finish,
    resize,
    take,
)
from keras_lp.data.hugging_face import is_hugging_face, read_hugging_face
from keras_lp.data.roles import (
    Feature,
    Label,
    find_roles,
    first_class_label,
    numbers_of_rank,
    read_pair,
)
from keras_lp.utils.arguments import check_choice
from keras_lp.utils.names import near

_HOST, _SECONDS = "storage.googleapis.com", 10  # where TFDS looks first
_INSTALL = "Install it: pip install 'keras_lp[data]'"


def load_dataset(
    name: Any,
    *,
    split: str | None = None,
    inputs: str | None = None,
    labels: str | Sequence[str] | None = None,
    image_size: int | Sequence[int] | None = None,
    examples_per_class: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    batch_size: int | None = 32,
    download: bool = True,
    seed: int = 0,
) -> Any:
    """Loads a data set of TensorFlow Datasets (TFDS), Hugging Face, or scikit-learn's `"digits"`.

    The data set gives the same examples in the same order in each pass. `fit` of a model with a
    frozen backbone therefore computes its features once, without `cache_features=True`. Data sets
    of up to 256 MiB are kept in memory after the first pass.

    Args:
        name: a TFDS name such as `"fashion_mnist"` or `"glue/sst2"`, or `"digits"`: the 1,797
            handwritten digits of scikit-learn, which need no network. They are split into 1,437
            training and 360 test examples, stratified by digit. `"hf:<path>"` or
            `"hf:<path>:<config>"` is a data set of Hugging Face, such as `"hf:nyu-mll/glue:sst2"`,
            a folder of files that it reads, or one that `save_to_disk` wrote. A `Dataset` or
            `DatasetDict` of Hugging Face in memory is a name too.
        split: `"train"`, `"test"`, `"train+test"`, ..., or a slice such as `"train[:10%]"` for
            data sets of TFDS and Hugging Face by name. Required, except for a `Dataset`.
        inputs: name of the feature that is the input. Defaults to None: the only image, text,
            audio or array.
        labels: name or names of the features that are labels. Defaults to None: all class labels.
            A number becomes a float32 label for `lp.Regression`; a sequence of class labels
            becomes a vector of 0 and 1 for `lp.MultiLabel`.
        image_size: (height, width) that images are resized to, or one number for both. Defaults to
            None: as stored.
        examples_per_class: takes this number of random examples of each class (of the first
            label). A larger number contains the examples of a smaller one. Defaults to None: all
            examples.
        data_dir: folder of the TFDS data. Defaults to None: the environment variable
            `TFDS_DATA_DIR`, else TFDS's own folder. For `"hf:..."`: the folder of the cache.
        batch_size: a number returns batches, as `fit` takes them. None returns single examples,
            as `lp.partition` and `lp.mix` take them. -1 returns the whole split as a pair of
            NumPy arrays, as in TFDS. Defaults to 32.
        download: whether to download a data set that is not in `data_dir`. Defaults to True.
        seed: random seed of `examples_per_class`. Defaults to 0.

    Returns:
        A `tf.data.Dataset` of `(input, labels)`, or arrays for `batch_size=-1`. Images are
        `(height, width, channels)` uint8 from 0 to 255; texts are strings. One label feature gives
        class numbers. Several give a dict by name, in which dashes become underscores
        (`label-coarse` of trec is `label_coarse`). The data set has the attribute `class_names`, a
        list that `lp.transfer_model(backbone, dataset.class_names)` takes; a dict of lists for
        several labels; None for numbers.

    Raises:
        ValueError: if the name, the split or a feature is unknown, the input or labels cannot be
            told, or a class has too few examples.
        ConnectionError: if a data set has to be downloaded and there is no network.
        ImportError: if a package of the extra `data`, or `interop` for Hugging Face, is not
            installed.

    Example:

    >>> import keras_lp as lp
    >>> x, y = lp.load_dataset("digits", split="test", batch_size=-1)
    >>> x.shape, x.dtype.name, y[:3].tolist()
    ((360, 8, 8, 1), 'uint8', [7, 6, 3])
    >>> dataset = lp.load_dataset("digits", split="train", examples_per_class=20)
    >>> len(dataset), dataset.class_names[:3]
    (7, ['0', '1', '2'])
    """
    size = check_image_size(image_size)
    class_names: ClassNames
    if is_hugging_face(name):
        dataset, class_names, numbers, split = read_hugging_face(
            name, split, inputs, labels, data_dir, download
        )
    elif split is None:
        raise ValueError(
            f'`split` must be given, such as "train". Received: split=None for {name!r}.'
        )
    elif name == "digits":
        if inputs or labels:
            raise ValueError(
                "`inputs` and `labels` are for TFDS data sets. Received: "
                f"inputs={inputs!r}, labels={labels!r} with the digits."
            )
        x, y = _digits(split)
        dataset, numbers = tf.data.Dataset.from_tensor_slices((x, y)), lambda: y
        class_names = [str(digit) for digit in range(10)]
    else:
        builder = _builder(name, data_dir, download, split)
        input_name, roles = find_roles(name, _features(builder.info.features), inputs, labels)
        dataset = _pairs(builder, split, input_name, roles)
        class_names = _class_names(builder, split, roles)
        numbers = functools.partial(_class_numbers, name, builder, split, roles)
    if examples_per_class is not None:
        dataset = take(dataset, chosen_per_class(numbers(), examples_per_class, seed))
    if size is not None:
        _check_images(name, dataset)
        dataset = resize(dataset, size)
    return finish(dataset, batch_size, class_names, _bytes(dataset), split)


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise ImportError(f'The data set "digits" comes with scikit-learn. {_INSTALL}') from error
    parts = [part.strip() for part in split.split("+")]
    for part in parts:
        check_choice("split", part, ["train", "test"])
    images, labels = datasets.load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype("uint8")  # 0..16 before
    train, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    chosen = np.concatenate([{"train": train, "test": test}[part] for part in parts])
    return images[chosen], labels[chosen].astype("int64")


def _builder(name: str, data_dir: str | os.PathLike[str] | None, download: bool, split: str) -> Any:
    """Returns a TFDS builder whose data are prepared and have the split."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(f"load_dataset needs tensorflow-datasets. {_INSTALL}") from error
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        known = ["digits", *tfds.list_builders()]
        raise ValueError(
            'A data set must be "digits" or one of TensorFlow Datasets. Received: '
            f"name={name!r}.{near(name.split('/')[0], known)} TFDS says: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if download:
        if not builder.info.splits:
            _check_network(name, builder.data_dir)
        builder.download_and_prepare()
    if not builder.info.splits:
        raise ValueError(
            "A data set must be prepared if download=False. Received: "
            f"name={name!r}, which is not in {builder.data_dir}. Pass download=True, or another "
            "`data_dir`."
        )
    for part in split.split("+"):
        check_choice("split", part.split("[")[0].strip(), [*builder.info.splits, "all"])
    return builder


def _features(features: Any) -> dict[str, Feature]:
    """Returns what the features of TFDS are; an integer that another feature names is a class."""
    import tensorflow_datasets as tfds

    def describe(key: str, kind: Any) -> Feature:
        description = type(kind).__name__
        if key.endswith("_name") and key.removesuffix("_name") in features:
            return Feature("name", description)
        if f"{key}_name" in features:
            return Feature("class", description)
        inner = kind.feature if isinstance(kind, tfds.features.Sequence) else kind
        if isinstance(inner, tfds.features.ClassLabel):
            names = [inner.int2str(i) for i in range(inner.num_classes)]
            return Feature("class" if inner is kind else "classes", description, names)
        if isinstance(kind, tfds.features.Image):
            return Feature("image", description)
        if isinstance(kind, tfds.features.Text):
            return Feature("text", description)
        if isinstance(kind, tfds.features.Audio):
            return Feature("audio", description)
        dtype = np.dtype(getattr(kind, "np_dtype", None) or object)
        shape = getattr(kind, "shape", None)
        if shape is None or dtype.kind not in "iufb":
            return Feature("array" if shape else "other", description)
        return Feature(numbers_of_rank(len(shape)), description)

    return {key: describe(key, kind) for key, kind in features.items()}


def _pairs(builder: Any, split: str, inputs: str, roles: Sequence[Label]) -> tf.data.Dataset:
    dataset = builder.as_dataset(split=split, shuffle_files=False)
    pair = read_pair(inputs, roles)
    return dataset.map(pair, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _only(builder: Any, split: str, features: Sequence[str]) -> tf.data.Dataset:
    """Reads some features without decoding the others."""
    import tensorflow_datasets as tfds

    partial = tfds.decode.PartialDecoding(dict.fromkeys(features, True))
    return builder.as_dataset(split=split, shuffle_files=False, decoders=partial)


def _class_numbers(name: str, builder: Any, split: str, roles: Sequence[Label]) -> np.ndarray:
    first = first_class_label(name, roles)
    examples = _only(builder, split, [first]).batch(4096)
    return np.concatenate([example[first].numpy() for example in examples])


def _class_names(builder: Any, split: str, roles: Sequence[Label]) -> ClassNames:
    names = {one.key: one.names for one in roles if one.names is not None}
    others = [one for one in roles if one.names is None and one.is_class]
    if others:
        whole = "train" if "train" in builder.info.splits else split
        wanted = [key for one in others for key in (one.feature, f"{one.feature}_name")]
        batches = list(_only(builder, whole, wanted).batch(4096).as_numpy_iterator())
        for one in others:
            found: dict[int, str] = {}
            for batch in batches:
                pairs = zip(batch[one.feature], batch[f"{one.feature}_name"], strict=True)
                found.update((int(number), text.decode()) for number, text in pairs)
            names[one.key] = [found.get(i, str(i)) for i in range(max(found) + 1)]
    names = {one.key: names[one.key] for one in roles if one.key in names}
    return class_names_of(names, len(roles))


def _check_images(name: str, dataset: tf.data.Dataset) -> None:
    if len(dataset.element_spec[0].shape) != 3:
        raise ValueError(
            "`image_size` is for images. Received: "
            f"{name!r} with inputs of shape {dataset.element_spec[0].shape}."
        )


def _bytes(dataset: tf.data.Dataset) -> int | None:
    """Returns the bytes of all examples, None if their shapes are unknown; a text counts 256."""
    total = 0
    for spec in tf.nest.flatten(dataset.element_spec):
        if not spec.shape.is_fully_defined():
            return None
        total += spec.shape.num_elements() * (256 if spec.dtype == tf.string else spec.dtype.size)
    return total * int(dataset.cardinality())


def _check_network(name: str, folder: str) -> None:
    """Raises at once if there is no network: TFDS would retry for minutes."""
    if urllib.request.getproxies():
        return
    try:
        socket.create_connection((_HOST, 443), timeout=_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"A data set that is not prepared has to be downloaded. Received: name={name!r}, which "
            f"is not in {folder}, and no network ({_HOST}: {error}). Prepare it on a machine with "
            "a network and pass its `data_dir`, or set TFDS_DATA_DIR."
        ) from error
