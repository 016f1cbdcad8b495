"""Loads data sets by name as `(input, labels)`, the form that the builders take."""

from __future__ import annotations

import os
import socket
import urllib.request
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.utils.arguments import check_choice, check_positive
from keras_lp.utils.names import near

_HOST, _SECONDS = "storage.googleapis.com", 10  # where TFDS looks first
_INSTALL = "Install it: pip install 'keras_lp[data]'"


def load_dataset(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    batch_size: int | None = 32,
    download: bool = True,
) -> Any:
    """Loads a data set of TensorFlow Datasets (TFDS), or the `"digits"` of scikit-learn.

    Args:
        name: a TFDS name such as `"fashion_mnist"` or `"glue/sst2"`, or `"digits"`: the 1,797
            handwritten digits of scikit-learn, which need no network. They are split into 1,437
            training and 360 test examples, stratified by digit.
        split: `"train"`, `"test"`, ..., or for TFDS also a slice such as `"train[:10%]"`.
        data_dir: folder of the TFDS data. Defaults to None: the environment variable
            `TFDS_DATA_DIR`, else TFDS's own folder.
        batch_size: a number returns batches, as `fit` takes them. None returns single examples,
            as `lp.partition` and `lp.mix` take them. -1 returns the whole split as a pair of
            NumPy arrays, as in TFDS. Defaults to 32.
        download: whether to download a data set that is not in `data_dir`. Defaults to True.

    Returns:
        A `tf.data.Dataset` of `(input, labels)`, or arrays for `batch_size=-1`. Images are
        `(height, width, channels)` uint8 from 0 to 255, as stored; texts are strings. One label
        feature gives class numbers. Several give a dict by name, in which dashes become
        underscores (`label-coarse` of trec is `label_coarse`).

    Raises:
        ValueError: if the name or split is unknown, or the data set has no class labels.
        ConnectionError: if a data set has to be downloaded and there is no network.
        ImportError: if a package of the extra `data` is not installed.

    Example:

    >>> import keras_lp as lp
    >>> x, y = lp.load_dataset("digits", split="test", batch_size=-1)
    >>> x.shape, x.dtype.name, y[:3].tolist()
    ((360, 8, 8, 1), 'uint8', [7, 6, 3])
    """
    if name == "digits":
        dataset = tf.data.Dataset.from_tensor_slices(_digits(split))
    else:
        dataset = _from_tfds(name, split, data_dir, download)
    if batch_size is None:
        return dataset
    if batch_size != -1:
        check_positive("batch_size", batch_size, integer=True)
        return dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE)
    whole = dataset.batch(max(1, int(dataset.cardinality()))).get_single_element()
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), whole)


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise ImportError(f'The data set "digits" comes with scikit-learn. {_INSTALL}') from error
    check_choice("split", split, ["train", "test"])
    images, labels = datasets.load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype("uint8")  # 0..16 before
    train, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    chosen = train if split == "train" else test
    return images[chosen], labels[chosen].astype("int64")


def _from_tfds(
    name: str, split: str, data_dir: str | os.PathLike[str] | None, download: bool
) -> tf.data.Dataset:
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
    base = split.split("[")[0]
    check_choice("split", base, [*builder.info.splits, "all"])
    inputs, labels = _roles(name, builder.info.features)

    def pair(example: dict[str, Any]) -> tuple[Any, Any]:
        classes = {key.replace("-", "_"): tf.cast(example[key], tf.int64) for key in labels}
        return example[inputs], classes if len(labels) > 1 else next(iter(classes.values()))

    dataset = builder.as_dataset(split=split, shuffle_files=False)
    return dataset.map(pair, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


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


def _roles(name: str, features: Any) -> tuple[str, list[str]]:
    """Returns the name of the input feature and the names of the label features.

    Label features are class labels, and integers with a name feature (`intent` and
    `intent_name` in clinc_oos).
    """
    import tensorflow_datasets as tfds

    kinds = dict(features.items())
    labels = [
        key
        for key, kind in kinds.items()
        if isinstance(kind, tfds.features.ClassLabel) or f"{key}_name" in kinds
    ]
    inputs = [
        key
        for key, kind in kinds.items()
        if isinstance(kind, (tfds.features.Image, tfds.features.Text))
        and key.removesuffix("_name") not in labels
    ]
    if len(inputs) != 1 or not labels:
        raise ValueError(
            "load_dataset takes data sets with one image or text and class labels. Received: "
            f"name={name!r} with the features {sorted(kinds)}. Load it with tfds.load and map it "
            "to (input, labels)."
        )
    return inputs[0], labels
