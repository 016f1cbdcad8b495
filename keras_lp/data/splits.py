"""Splits of files that stay the same when files are added, and leakage between them."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

SPLITS = ("train", "validation", "test")


def split_of(name: str, validation: float, test: float, seed: int) -> str:
    """Returns the split of a file, from a hash of its name and the seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < test:
        return "test"
    return "validation" if share < test + validation else "train"


def check_shares(validation: float, test: float) -> None:
    """Raises `ValueError` unless shares are from 0 to below 1 and leave some for training."""
    for argument, share in (("validation", validation), ("test", test)):
        if not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(
                f"`{argument}` must be a share from 0 to below 1. Received: {argument}={share!r}."
            )
    if validation + test >= 1:
        raise ValueError(
            "`validation` and `test` must leave examples for training. Received: "
            f"validation={validation}, test={test}."
        )


def check_no_leak(files: Sequence[str], splits: Sequence[str]) -> None:
    """Raises `ValueError` if the same content is in two splits.

    Only files of the same size are read.
    """
    if len(set(splits)) < 2:
        return
    by_size: dict[int, list[int]] = defaultdict(list)
    for i, file in enumerate(files):
        by_size[os.path.getsize(file)].append(i)
    for numbers in by_size.values():
        if len({splits[i] for i in numbers}) < 2:
            continue
        seen: dict[bytes, int] = {}
        for i in numbers:
            content = hashlib.sha256(Path(files[i]).read_bytes()).digest()
            first = seen.setdefault(content, i)
            if splits[first] != splits[i]:
                raise ValueError(
                    "An example must be in one split only: a copy in the test split would be "
                    f"known from training. Received: the same content in {files[first]} "
                    f"({splits[first]}) and {files[i]} ({splits[i]}). Remove one of them."
                )


def check_classes(labels: Mapping[str, np.ndarray], names: Mapping[str, list[str]]) -> None:
    """Raises `ValueError` if a class has no example in the training split.

    Args:
        labels: the labels of the training split by task.
        names: the class names by task.
    """
    for task, classes in names.items():
        absent = sorted(set(range(len(classes))) - set(np.unique(labels[task]).tolist()))
        if absent:
            raise ValueError(
                "Each class needs an example in the training split. Received: none for "
                f"{[classes[i] for i in absent][:5]}. Add files, or pass smaller `validation` and "
                "`test` or another `seed`."
            )
