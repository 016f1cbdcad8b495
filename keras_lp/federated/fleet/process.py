"""The process of a node that lives on between messages."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from keras_lp.federated.fleet.app import node_name
from keras_lp.federated.fleet.messages import pack, receive, send, unpack
from keras_lp.federated.fleet.node import Node, Refusal

_IDLE = 3600.0  # seconds without a message after which the process ends


def serve(folder: Path, address: Path, parent: int) -> None:
    """Answers messages until the parent ends or nothing came for an hour.

    Args:
        folder: the app folder with `data.py`.
        address: path of the socket, in a folder of this user alone.
        parent: id of the process with which this one ends.
    """
    load = _load_function(folder)
    state: dict[str, Any] = {"node": None, "run": None, "last": time.monotonic(), "busy": 0}
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        partial = address.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        listening.bind(str(partial))
        listening.listen()
        partial.rename(address)  # it exists only once it answers
        threading.Thread(target=_watch, args=(state, address, parent), daemon=True).start()
        lock = threading.Lock()
        while True:
            connection, _ = listening.accept()
            state["last"] = time.monotonic()
            threading.Thread(
                target=_answer, args=(connection, state, load, lock, address), daemon=True
            ).start()


def _answer(
    connection: socket.socket, state: dict[str, Any], load: Any, lock: Any, address: Path
) -> None:
    with connection, lock, contextlib.suppress(OSError):
        state["busy"] = 1
        try:
            asked, arrays = unpack(receive(connection))
            run = asked["node"]["run_id"]
            if state["run"] != run:  # the data may have changed
                context = _context(asked["node"])
                state["node"] = Node(lambda: load(context), node_name(context))
                state["run"] = run
            answer = state["node"].answer(asked["values"], arrays)
        except ConnectionError:
            return
        except Refusal as error:
            answer = {"error": str(error)}, []
        except Exception as error:  # its text may quote the data, so it stays here
            traceback.print_exc()
            where = f"the log of the node has the details: {address.with_suffix('.log')}"
            answer = {"error": f"{type(error).__name__}; {where}"}, []
        finally:
            state["busy"], state["last"] = 0, time.monotonic()
        send(connection, pack(*answer))


def _context(node: dict[str, Any]) -> Any:
    from flwr.app import Context, RecordDict

    return Context(
        run_id=node["run_id"],
        node_id=node["node_id"],
        node_config=node["node_config"],
        state=RecordDict(),
        run_config=node["run_config"],
    )


def _watch(state: dict[str, Any], address: Path, parent: int) -> None:
    while Path(f"/proc/{parent}").exists() or _alive(parent):
        if not state["busy"] and time.monotonic() > state["last"] + _IDLE:
            break
        time.sleep(1.0)
    address.unlink(missing_ok=True)
    os._exit(0)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
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
