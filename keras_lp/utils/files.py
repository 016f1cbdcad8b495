"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK = 2**20  # bytes


@contextlib.contextmanager
def named_errors(path: str | os.PathLike[str], what: str = "This file") -> Iterator[None]:
    """Makes an `OSError` name `path`, the file being written or the temporary folder."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{what} could not be written: {reason}", str(path)) from None


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raises a `ValueError` with the path if the checksums of a `.keras` file do not match."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.testzip()
        reason = None if entry is None else f"the checksum of {entry!r} in it does not match"
    except Exception as error:  # damaged zip files raise various errors
        reason = str(error) or type(error).__name__
    if reason is not None:
        raise ValueError(
            f"A .keras file must be whole. Received: {os.fspath(path)}, which is damaged "
            f"({reason}). Copy it or save it again."
        )


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yields a binary file that replaces `path` once it is completely written.

    Creates the parent folder. If writing fails, `path` is unchanged and nothing else is left.

    Raises:
        OSError: with the path, for example if the disk is full.
    """
    path = Path(path).expanduser()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def check_scratch_space(size: int) -> None:
    """Raises an `OSError` with the temporary folder unless `size` bytes fit into it.

    TensorFlow writes temporary files while it converts a model, and its errors do not mention a
    full disk.

    Args:
        size: number of bytes, which are written and removed again.
    """
    with (
        named_errors(tempfile.gettempdir(), "Temporary files"),
        tempfile.TemporaryFile() as file,
    ):
        for first in range(0, size, _CHUNK):
            file.write(bytes(min(_CHUNK, size - first)))
        file.flush()
