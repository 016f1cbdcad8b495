"""What the examples do about data sets of TensorFlow Datasets (TFDS) that are absent."""

from __future__ import annotations

import contextlib
import socket
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

HOST = "storage.googleapis.com"  # where TFDS looks first


def load(name: str, *, split: str | list[str], data_dir: str | None) -> Any:
    """`tfds.load`, which without a network tries for minutes."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.info.splits and not has_network():
        raise ConnectionError(
            f"{name} is not in {builder.data_dir}, and there is no network to download it. "
            "Pass --data-dir or set TFDS_DATA_DIR."
        )
    return tfds.load(name, split=split, data_dir=data_dir)


def has_network() -> bool:
    if urllib.request.getproxies():
        return True
    try:
        socket.create_connection((HOST, 443), timeout=10).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def ended_without_data() -> Iterator[None]:
    """Ends the program with one line and exit code 2 where data cannot be downloaded."""
    try:
        yield
    except ConnectionError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
