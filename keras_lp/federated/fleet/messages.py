"""Messages between server and nodes: JSON values and arrays.

This file needs only NumPy: the process that Flower starts for each message loads it without
importing keras_lp, which would import TensorFlow.
"""

from __future__ import annotations

import io
import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

Content = tuple[dict[str, Any], list[np.ndarray]]


def pack(values: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> bytes:
    """Returns the bytes of JSON values and arrays."""
    file = io.BytesIO()
    text = np.frombuffer(json.dumps(values).encode(), "uint8")
    numbered: dict[str, Any] = {f"array_{i}": np.asarray(a) for i, a in enumerate(arrays)}
    np.savez(file, json=text, **numbered)
    return file.getvalue()


def unpack(content: bytes) -> Content:
    """Reverses `pack`; nothing is unpickled."""
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        values = json.loads(archive["json"].tobytes())
        arrays = [archive[f"array_{i}"] for i in range(len(archive.files) - 1)]
    return values, arrays


def send(connection: socket.socket, content: bytes) -> None:
    """Sends bytes and their length."""
    connection.sendall(struct.pack("<Q", len(content)) + content)


def receive(connection: socket.socket) -> bytes:
    """Receives what `send` sent.

    Raises:
        ConnectionError: the other side ended.
    """
    (length,) = struct.unpack("<Q", _exactly(connection, 8))
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        part = connection.recv(min(2**20, length - len(content)))
        if not part:
            raise ConnectionError("The process of the node ended.")
        content += part
    return bytes(content)


def to_record(values: dict[str, Any], arrays: Sequence[np.ndarray]) -> Any:
    """Returns Flower's form of a message."""
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

    return RecordDict(
        {
            "values": ConfigRecord({"json": json.dumps(values)}),
            "arrays": ArrayRecord([np.asarray(array) for array in arrays]),
        }
    )


def from_record(record: Any) -> Content:
    """Reverses `to_record`."""
    return json.loads(record["values"]["json"]), record["arrays"].to_numpy_ndarrays()
