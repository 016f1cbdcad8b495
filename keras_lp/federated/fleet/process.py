"""The process of a node that lives on between messages."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_lp.federated.fleet.app import node_name
from keras_lp.federated.fleet.messages import Content, pack, receive, send, unpack
from keras_lp.federated.fleet.node import Node, Refusal

_IDLE = 3600.0  # seconds without a message after which the process ends
_LOOK = 1.0  # seconds between two looks for the parent


def serve(folder: Path, address: Path, parent: int) -> None:
    """Answers messages, one at a time, until the parent ends or nothing came for an hour.

    Args:
        folder: the app folder with `data.py`.
        address: path of the socket, in a folder of this user alone.
        parent: id of the process with which this one ends.
    """
    answers = _Answers(_load_function(folder), address.with_suffix(".log"))
    last = time.monotonic()
    partial = address.with_suffix(".partial")
    for path in (partial, address):
        path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(partial))
        listening.listen()
        partial.rename(address)  # it exists only once it answers
        listening.settimeout(_LOOK)
        while _alive(parent) and time.monotonic() < last + _IDLE:
            with contextlib.suppress(TimeoutError):
                connection, _ = listening.accept()
                connection.settimeout(None)
                with connection, contextlib.suppress(OSError):  # the other side ended
                    send(connection, pack(*answers.to(receive(connection))))
                last = time.monotonic()
    address.unlink(missing_ok=True)


class _Answers:
    """Answers the messages of the runs of a node.

    Args:
        load: function from Flower's context to the data of the node.
        log: the file with what this process prints.
    """

    def __init__(self, load: Callable[[Any], Any], log: Path) -> None:
        self._load = load
        self._log = log
        self._node: Node | None = None
        self._run: int | None = None

    def to(self, content: bytes) -> Content:
        """Returns the answer to a message, or a dict with an `error`."""
        try:
            asked, arrays = unpack(content)
            node = self._of_run(asked["node"])
            return node.answer(asked["values"], arrays)
        except Refusal as error:
            return {"error": str(error)}, []
        except Exception as error:  # its text may quote the data, so it stays here
            traceback.print_exc()
            where = f"the log of the node has the details: {self._log}"
            return {"error": f"{type(error).__name__}; {where}"}, []

    def _of_run(self, about: dict[str, Any]) -> Node:
        """Returns the node of a run: between runs, the data may change."""
        if self._node is None or self._run != about["run_id"]:
            context = _context(about)
            self._node = Node(lambda: self._load(context), node_name(context))
            self._run = about["run_id"]
        return self._node


def _context(node: dict[str, Any]) -> Any:
    from flwr.app import Context, RecordDict

    return Context(
        run_id=node["run_id"],
        node_id=node["node_id"],
        node_config=node["node_config"],
        state=RecordDict(),
        run_config=node["run_config"],
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def _load_function(folder: Path) -> Any:
    """Returns the function `load` of `data.py`."""
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("data", folder / "data.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} must have a file data.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load
