"""Keeps the personal weights of clients in files, one version per round.

A file consists of its SHA-256 and a NumPy array. It is written under a temporary name and then
renamed, so a killed program leaves no half-written file.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import weakref
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from keras_lp.federated.checkpoints import digest
from keras_lp.utils.files import named_errors


class ClientStore:
    """Personal weights by client.

    Memory does not grow with the number of clients. A client has one file, and one more for each
    later checkpoint to which training could still return.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._temporary = False

    def open(self, folder: Path | None, round_number: int) -> Path:
        """Uses a folder, forgets what was written after a round, and returns the folder.

        Args:
            folder: the folder; None uses a temporary one, which is deleted with this object.
            round_number: the number of completed rounds.
        """
        if folder is None and not self._temporary:  # the files of checkpoints stay as they are
            folder = Path(tempfile.mkdtemp(prefix="keras_lp_"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._temporary = True
        elif folder is not None:
            self._temporary = False
        if folder is not None and folder != self._folder:
            folder.mkdir(parents=True, exist_ok=True)
            if self._folder is not None:
                shutil.copytree(self._folder, folder, dirs_exist_ok=True)
            self._folder = folder
        used = self._opened
        newer = [path for path in used.glob("*.[0-9]*") if _round(path) > round_number]
        for path in (*newer, *used.glob("*.partial")):
            path.unlink()
        return used

    def read(self, client: Hashable) -> np.ndarray | None:
        """Returns the newest weights of a client, None if it has none.

        Raises:
            ValueError: if the file is damaged.
        """
        paths = self._versions(client)
        if not paths:
            return None
        content = paths[-1].read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError(
                f"What a client keeps must be as it was written. Received: {paths[-1]}, which is "
                f"damaged. Delete it: client {client!r} goes on from an older file, or from the "
                "beginning."
            )
        values: np.ndarray = np.load(io.BytesIO(content[32:]), allow_pickle=False)
        return values

    def write(self, client: Hashable, values: np.ndarray, round_number: int, earliest: int) -> None:
        """Writes the weights of a client after a round, and deletes older ones.

        Args:
            client: the id of the client.
            values: its weights.
            round_number: the round.
            earliest: the first completed round to which training could return.
        """
        buffer = io.BytesIO()
        np.save(buffer, values)
        content = buffer.getvalue()
        path = self._opened / f"{_key(client)}.{round_number:07d}"
        partial = path.with_suffix(".partial")
        with named_errors(path), partial.open("wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(partial, path)
        kept = [old for old in self._versions(client) if _round(old) <= earliest]
        for old in kept[:-1]:
            old.unlink()

    def _versions(self, client: Hashable) -> list[Path]:
        return sorted(self._opened.glob(f"{_key(client)}.[0-9]*"))

    @property
    def _opened(self) -> Path:
        return self._folder or self.open(None, 0)


def _key(client: Hashable) -> str:
    """Returns a name for files, the same for equal ids of NumPy and Python."""
    parts = client if isinstance(client, tuple) else (client,)
    plain = [part.item() if isinstance(part, np.generic) else part for part in parts]
    return digest(repr(tuple(plain) if isinstance(client, tuple) else plain[0]))


def _round(path: Path) -> int:
    return int(path.suffix[1:])
