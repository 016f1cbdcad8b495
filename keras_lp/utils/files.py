"""Files that are written whole, or not at all."""

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
    """Makes an `OSError` name the file that was being written, or the folder of such files."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{what} could not be written: {reason}", str(path)) from None


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raises a `ValueError` with the path unless a `.keras` file is whole, by its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.testzip()
        reason = None if entry is None else f"{entry!r} in it does not fit its checksum"
    except Exception as error:  # whatever damaged zip files raise
        reason = str(error) or type(error).__name__
    if reason is not None:
        raise ValueError(
            f"A .keras file must be whole. Received: {os.fspath(path)}, which is damaged "
            f"({reason}). Copy or save it again."
        )


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yields a binary file that takes the place of `path` once all of it is written.

    Its folder is made. Where writing fails, `path` stays as it was and nothing else is left.

    Raises:
        OSError: with the path, where the disk is full or the like.
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
    """Raises an `OSError` with the folder of temporary files unless `size` bytes fit into it.

    TensorFlow writes such files while it converts a model, and its errors do not say that the
    disk is full.

    Args:
        size: in bytes; as many are written and removed again.
    """
    with (
        named_errors(tempfile.gettempdir(), "Temporary files"),
        tempfile.TemporaryFile() as file,
    ):
        for first in range(0, size, _CHUNK):
            file.write(bytes(min(_CHUNK, size - first)))
        file.flush()
