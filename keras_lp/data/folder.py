"""Loads image and sound files from folders or a table of labels."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keras_lp.backbones.images import check_image_size
from keras_lp.data.dataset import by_name, class_names_of, finish
from keras_lp.data.files import (
    IMAGES,
    OTHERS,
    SOUNDS,
    common_rate,
    is_whole,
    read_images,
    read_sounds,
    wave_of,
)
from keras_lp.data.splits import SPLITS, check_classes, check_no_leak, check_shares, split_of
from keras_lp.utils.arguments import check_choice
from keras_lp.utils.names import near
from keras_lp.utils.warn import warn

_LABEL = "label"


def load_folder(
    path: str | os.PathLike[str],
    *,
    split: Literal["train", "validation", "test"],
    validation: float = 0.15,
    test: float = 0.15,
    labels: str | Sequence[str] | None = None,
    image_size: int | Sequence[int] = 224,
    channels: Literal[1, 3] = 3,
    batch_size: int | None = 32,
    seed: int = 0,
) -> Any:
    """Loads image or wav files with their labels.

    A folder has one folder of files per class. A CSV file has a column of paths, relative to the
    CSV file, and a column of labels per task: numbers for `lp.Regression`, else class names. An
    empty cell is a missing label.

    A hash of the name of each file, relative to `path`, determines its split, so files that are
    added do not move others. Each class is divided in the same shares, up to chance. The data set
    gives the same examples in the same order in each pass; training files are in random order.
    `fit` of a model with a frozen backbone computes its features once. Data sets of up to 256 MiB
    are kept in memory after the first pass.

    Files that are empty, cut off, or of another format than PNG, JPEG, GIF, BMP and WAV are left
    out with a warning. They are not decoded: a file that is damaged inside raises an error when
    its batch is read. Hidden files and folders are ignored.

    Args:
        path: folder or CSV file. The first column of a CSV file has the paths; its first row has
            the names of the columns.
        split: `"train"`, `"validation"` or `"test"`.
        validation: share of the validation split, from 0 to below 1. Defaults to 0.15.
        test: share of the test split. Defaults to 0.15.
        labels: for a CSV file: the column or columns that are labels. Defaults to None: all but
            the first.
        image_size: (height, width) that images are resized to, or one number for both. Defaults to
            224.
        channels: 3 for colour, 1 for grey. Defaults to 3.
        batch_size: a number returns batches; None single examples, -1 arrays. Defaults to 32.
        seed: seed of the splits and of the order. Defaults to 0.

    Returns:
        A `tf.data.Dataset` of `(input, labels)`, or arrays for `batch_size=-1`. Images are
        `(height, width, channels)` uint8; sounds are float32 `(samples,)` from -1 to 1, padded with
        0 to the longest file. Labels are class numbers, or float32 numbers; -1 or NaN if missing;
        several columns give a dict by name. Attributes: `class_names`, a list, or a dict of lists
        for several columns; `broken`, the paths that were left out; `sample_rate` of sounds.

    Raises:
        ValueError: if there are fewer than two classes, no files, a class without training files,
            the same content in two splits, mixed sample rates, or a CSV file without rows, with an
            unknown column or missing files.
        FileNotFoundError: if `path` does not exist.

    Example:

    >>> import os, tempfile, keras, numpy as np, keras_lp as lp
    >>> folder = tempfile.mkdtemp()
    >>> rng = np.random.default_rng(0)
    >>> for name in ("cat", "dog"):
    ...     os.mkdir(f"{folder}/{name}")
    ...     for i in range(20):
    ...         image = rng.integers(0, 255, (8, 8, 3))
    ...         keras.utils.save_img(f"{folder}/{name}/{i}.png", image, scale=False)
    >>> train = lp.load_folder(folder, split="train", image_size=8)
    >>> train.class_names
    ['cat', 'dog']
    >>> next(iter(train))[0].shape[1:]
    TensorShape([8, 8, 3])
    """
    check_choice("split", split, SPLITS)
    check_choice("channels", channels, [1, 3])
    check_shares(validation, test)
    size = check_image_size(image_size)
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"`path` must be a folder or a CSV file. Received: {path}.")
    if path.is_dir():
        root = path
        names, found, class_names = _from_folder(path)
    else:
        root = path.parent
        names, found, class_names = _from_csv(path, labels)
    files = [os.path.join(root, name) for name in names]
    whole = np.array([is_whole(file) for file in files])
    broken = [file for file, good in zip(files, whole, strict=True) if not good]
    if broken:
        warn(
            f"{len(broken)} of {len(files)} files cannot be read and are left out: {broken[:3]}"
            f"{' and more' if len(broken) > 3 else ''}."
        )
    if not whole.any():
        raise ValueError(f"load_folder needs image or wav files. Received: {path} without any.")
    names = [name for name, good in zip(names, whole, strict=True) if good]
    files = [file for file, good in zip(files, whole, strict=True) if good]
    found = {task: values[whole] for task, values in found.items()}
    splits = [split_of(name, validation, test, seed) for name in names]
    check_no_leak(files, splits)
    rows = np.flatnonzero(np.array(splits) == split)
    if not len(rows):
        raise ValueError(
            f"The split {split!r} must have files. Received: {len(files)} files with "
            f"validation={validation}, test={test}. Pass a larger share, or add files."
        )
    rows = np.random.default_rng(seed).permutation(rows)
    own = {task: values[rows] for task, values in found.items()}
    if split == "train":
        check_classes(own, class_names)
    chosen = [files[i] for i in rows]
    sounds = [file.lower().endswith(SOUNDS) for file in files]
    if any(sounds) and not all(sounds):
        raise ValueError(f"Files must be all images or all sounds. Received: both in {path}.")
    known = class_names_of(class_names, len(found))
    if any(sounds):
        waves = [wave_of(file) for file in files]
        rate = common_rate(files, waves)
        samples = max(wave.samples for wave in waves)
        dataset = read_sounds(chosen, [waves[i] for i in rows], by_name(own), samples)
        bytes_each = 4 * samples
    else:
        rate = None
        height, width = size or (0, 0)
        dataset = read_images(chosen, by_name(own), (height, width), channels)
        bytes_each = height * width * channels
    dataset = finish(dataset, batch_size, known, bytes_each * len(rows), split)
    if batch_size != -1:
        dataset.broken = broken
        if rate is not None:
            dataset.sample_rate = rate
    return dataset


def _listed(folder: str) -> list[str]:
    """Returns the files in a folder and the folders in it that are not hidden.

    Files of other known formats are among them, as they are reported.
    """
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [
            os.path.join(place, name)
            for name in files
            if name[0] != "." and name.lower().endswith((*IMAGES, *SOUNDS, *OTHERS))
        ]
    return sorted(found)


Table = tuple[list[str], dict[str, np.ndarray], dict[str, list[str]]]


def _from_folder(folder: Path) -> Table:
    """Returns the relative paths, the labels and the class names."""
    classes = sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
    )
    names, labels = [], []
    for number, name in enumerate(classes):
        own = _listed(os.path.join(folder, name))
        start = len(os.path.join(folder, ""))
        names += [file[start:].replace(os.sep, "/") for file in own]
        labels += [number] * len(own)
    used = sorted(set(labels))
    if len(used) < 2:
        raise ValueError(
            "A folder needs a folder of files for each of two or more classes. Received: "
            f"{folder} with files in {[classes[i] for i in used]}."
        )
    empty = [name for number, name in enumerate(classes) if number not in used]
    if empty:
        warn(f"Folders without image or wav files are left out: {empty[:5]}.")
    array = np.searchsorted(used, labels).astype("int64")
    return names, {_LABEL: array}, {_LABEL: [classes[number] for number in used]}


def _from_csv(path: Path, labels: str | Sequence[str] | None) -> Table:
    """Returns the relative paths, the labels and the class names."""
    labels = [labels] if isinstance(labels, str) else labels
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    header = [name.strip() for name in header]
    rows = [[cell.strip() for cell in row] for row in rows]
    rows = [row for row in rows if any(row)]
    if len(header) < 2 or not rows:
        raise ValueError(
            "A CSV file needs a column of paths, a column of labels, and rows. Received: "
            f"{path} with the columns {header} and {len(rows)} rows."
        )
    short = next((i for i, row in enumerate(rows) if len(row) != len(header)), None)
    if short is not None:
        raise ValueError(
            f"Each row of a CSV file needs {len(header)} cells. Received: {path}, row "
            f"{short + 2} with {len(rows[short])}."
        )
    for name in labels or []:
        if name not in header[1:]:
            raise ValueError(
                f"`labels` must be columns of {path.name}: {header[1:]}. Received: "
                f"{name!r}.{near(name, header[1:])}"
            )
    names = [Path(row[0]).as_posix() for row in rows]
    absent = [name for name in names if not (path.parent / name).exists()]
    if absent:
        raise ValueError(
            f"The files of {path.name} must exist, relative to its folder. Received: "
            f"{len(absent)} that do not: {absent[:3]}."
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"Each path must be in one row. Received: {twice[0]!r} in several.")
    found: dict[str, np.ndarray] = {}
    class_names: dict[str, list[str]] = {}
    for column in labels or header[1:]:
        at = header.index(column)
        cells = [row[at] for row in rows]
        task = column.replace("-", "_").replace(" ", "_")
        if task in found:
            raise ValueError(f"Columns need different names. Received: {header}.")
        numbers = [_is_number(cell) for cell in cells if cell]
        if any(numbers) and not all(numbers):
            other = next(cell for cell in cells if cell and not _is_number(cell))
            raise ValueError(
                "A column of labels must be numbers or class names. Received: both in "
                f"{column!r}, such as {other!r}. Leave the cell of a missing label empty."
            )
        if any(numbers):
            found[task] = np.array([float(cell) if cell else np.nan for cell in cells], "float32")
            continue
        classes = sorted({cell for cell in cells if cell})
        if len(classes) < 2:
            raise ValueError(
                f"A column of labels needs two or more classes. Received: {column!r} with "
                f"{classes}."
            )
        known = {name: i for i, name in enumerate(classes)}
        found[task] = np.array([known.get(cell, -1) for cell in cells], "int64")
        class_names[task] = classes
    return names, found, class_names


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
