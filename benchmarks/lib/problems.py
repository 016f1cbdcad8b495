"""Data sets as the studies use them: one task, with training, validation and test examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

import keras_lp as lp

CIFAR, XRAY, BANGLA = "cifar10_subset", "pneumonia_mnist", "cmaterdb/bangla"
XRAY_LABELS = ["normal", "pneumonia"]
CIFAR_HELD_OUT, SCRIPT_HELD_OUT = 1000, 500  # training pictures that are for validation

Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class Problem:
    """What is learned; `train` may hold more examples than a study uses."""

    name: str
    labels: list[str]
    train: Arrays
    val: Arrays
    test: Arrays


def draw(data: Arrays, count: int, seed: int) -> tuple[Arrays, Arrays]:
    """Draws `count` examples at random, each class in its share; returns them and the rest."""
    x, y = data
    if count == len(y):
        return data, (x[:0], y[:0])
    chosen, rest = train_test_split(
        np.arange(len(y)), train_size=count, random_state=seed, stratify=y
    )
    return (x[chosen], y[chosen]), (x[rest], y[rest])


def cifar10_problem(path: Path) -> Problem:
    """Returns cifar10_subset from its npz file; the validation pictures are always the same."""
    with np.load(path) as arrays:
        train, test = (
            (arrays[f"{split}_images"], arrays[f"{split}_labels"].astype("int64"))
            for split in ("train", "test")
        )
        names = [str(name) for name in arrays["names"]]
    val, train = draw(train, CIFAR_HELD_OUT, seed=0)
    return Problem(CIFAR, names, train, val, test)


def xray_problem(data_dir: str | None) -> Problem:
    """Returns pneumonia_mnist."""
    parts = {
        split: lp.load_dataset(XRAY, split=split, batch_size=-1, data_dir=data_dir)
        for split in ("train", "val", "test")
    }
    return Problem(XRAY, XRAY_LABELS, **parts)


def script_problem(name: str, data_dir: str | None) -> Problem:
    """Returns digits of cmaterdb: white on black in one channel, as mnist has them."""
    parts = {}
    for split in ("train", "test"):
        x, y = lp.load_dataset(name, split=split, batch_size=-1, data_dir=data_dir)
        parts[split] = 255 - x[..., :1], y
    val, train = draw(parts["train"], SCRIPT_HELD_OUT, seed=0)
    return Problem(name, [str(digit) for digit in range(10)], train, val, parts["test"])


def scaled(name: str, split: str = "train") -> Arrays:
    """Returns a data set of pictures with values from 0 to 1 and labels of `int32`."""
    x, y = lp.load_dataset(name, split=split, batch_size=-1)
    return x.astype("float32") / 255, y.astype("int32")
