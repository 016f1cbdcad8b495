"""The ClientApp of a fleet: passes each message on to a process of the node that lives on.

Flower starts a process for each message. With TensorFlow, that takes seconds; therefore this file
imports neither keras_lp nor TensorFlow. It is loaded by its path, with `messages.py` next to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_START = 300  # seconds for the process to import TensorFlow and listen


def _messages() -> Any:
    path = Path(__file__).with_name("messages.py")
    spec = importlib.util.spec_from_file_location("keras_lp_messages", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is missing.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def client_app(folder: str | os.PathLike[str]) -> Any:
    """Returns the ClientApp of an app folder.

    Args:
        folder: the folder with `data.py`.
    """
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    messages = _messages()
    app = ClientApp()

    @app.train()
    def work(message: Message, context: Context) -> Message:
        values, arrays = messages.from_record(message.content)
        node = {
            "node_id": context.node_id,
            "node_config": dict(context.node_config),
            "run_config": dict(context.run_config),
            "run_id": context.run_id,
        }
        with _connected(Path(folder), str(context.node_id)) as connection:
            messages.send(connection, messages.pack({"values": values, "node": node}, arrays))
            answer, found = messages.unpack(messages.receive(connection))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return Message(messages.to_record(answer, found), reply_to=message)

    return app


@contextlib.contextmanager
def _connected(folder: Path, node: str) -> Any:
    """Connects to the process of a node, and starts it where it is not running."""
    content = (folder / "data.py").read_bytes() + node.encode() + os.fsencode(folder)
    name = hashlib.sha256(content).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"keras_lp_node_{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid() or place.stat().st_mode & 0o077:
        raise PermissionError(f"{place} must belong to this user alone.")
    address = place / f"{name}.sock"
    with (place / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one message at a time starts it
        connection = _connect(address)
        if connection is None:
            connection = _start(folder, address)
    with connection:
        yield connection


def _connect(address: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(address))
    except OSError:
        connection.close()
        return None
    return connection


def _start(folder: Path, address: Path) -> socket.socket:
    log = address.with_suffix(".log")
    module = [sys.executable, "-m", "keras_lp.federated.fleet"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*module, "node", str(folder), str(address), "--parent", str(_supernode())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline and process.poll() is None:
        connection = _connect(address)
        if connection is not None:
            return connection
        time.sleep(0.05)
    raise RuntimeError(f"The process of the node did not start: {log.read_text()[-2000:]}")


def _supernode() -> int:
    """Returns the process with which the node ends: the one that Flower names, or the parent."""
    arguments = sys.argv
    if "--parent-pid" in arguments:
        return int(arguments[arguments.index("--parent-pid") + 1])
    return os.getppid()
