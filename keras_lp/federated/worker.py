"""`python -m keras_lp.federated.worker` lends this machine to `lp.federated_workers`."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from keras_lp.federated.engine import installation, worker_process

_OPEN = (
    "Whoever reaches this address can run any code on this machine, and the examples of the "
    "clients travel to it without encryption. Use it in a closed network only; elsewhere keep "
    "127.0.0.1 and connect with `ssh -L`."
)

_NOT_ISOLATED = (
    "TFF's worker listens on all addresses, and this system does not allow a network namespace "
    "that would prevent it. In a closed network, pass --host 0.0.0.0."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a worker until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_lp.federated.worker",
        description="Runs rounds for lp.federated_workers on another machine.",
    )
    parser.add_argument("--port", type=int, default=8500, help="defaults to 8500; 0 chooses one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on. Defaults to 127.0.0.1"
    )
    given = parser.parse_args(arguments)
    missing = installation.unsupported_platform() or installation.missing_modules()
    found = importlib.util.find_spec("tensorflow_federated")
    if missing or found is None or found.origin is None:
        parser.exit(1, "A worker needs TFF. Run: python -m keras_lp.federated.check\n")
    binary = Path(found.origin).with_name("data") / "worker_binary"
    try:
        listening = socket.create_server((given.host, given.port))
    except OSError as error:
        parser.exit(1, f"{given.host}:{given.port} cannot be used: {error.strerror}\n")
    is_open = not given.host.startswith("127.") and given.host != "localhost"
    if is_open:
        print(_OPEN, file=sys.stderr, flush=True)
    with listening:
        process, code = _start(listening, "isolate", binary)
        if code == worker_process.NOT_ISOLATED and given.host in ("0.0.0.0", "::"):
            process, code = _start(listening, "share", binary)
        if code == worker_process.NOT_ISOLATED:
            parser.exit(1, f"{_NOT_ISOLATED}\n")
        if code is not None:
            parser.exit(1, f"The worker ended with code {code}.\n")
        address = "{}:{}".format(*listening.getsockname()[:2])
    print(f"ready on {address} (Ctrl-C ends)", flush=True)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: process.terminate())
    return process.wait()


def _start(
    listening: socket.socket, network: str, binary: Path
) -> tuple[subprocess.Popen[str], int | None]:
    """Starts the process of the worker; returns it, and its exit code if it ended at once."""
    process = subprocess.Popen(
        [sys.executable, "-IS", worker_process.__file__, str(listening.fileno()), network, binary],
        pass_fds=[listening.fileno()],
        stdout=subprocess.PIPE,
        text=True,
    )
    ready = process.stdout is not None and process.stdout.readline() == "ready\n"
    return process, None if ready else process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
