"""The process of `python -m keras_lp.federated.worker`: TFF's worker behind one address.

TFF's worker listens on all addresses of its machine. This process therefore gives it a network of
its own that has nothing but itself (a network namespace of Linux), and passes the connections of
one listening socket on to it. It uses the standard library only, because the namespace of a user
can be left only by a process with one thread.

Arguments: the descriptor of the listening socket, `isolate` or `share`, and the path of the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from typing import Any

_NEWNET, _NEWUSER = 0x40000000, 0x10000000
NOT_ISOLATED = 3  # exit code
_PDEATHSIG = 1
_FOLDER = "keras_lp_worker_"  # of the files that `workers.py` sends, and the process id


def isolate() -> None:
    """Moves this process into a network of its own, in which only 127.0.0.1 exists."""
    import fcntl  # not on Windows

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNET) and libc.unshare(_NEWUSER | _NEWNET):
        raise OSError(ctypes.get_errno(), "no network namespace")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        up = struct.pack("16sH", b"lo", 1)
        fcntl.ioctl(control, 0x8914, up)  # SIOCSIFFLAGS


def start(binary: str, port: int, folder: str | None = None) -> subprocess.Popen[bytes]:
    """Starts TFF's worker, which the kernel ends with this process. It inherits no pipes.

    Args:
        binary: path of the worker.
        port: the port to listen on.
        folder: the folder to run in. Defaults to None: that of this process.
    """
    # PR_SET_PDEATHSIG is set by a launcher between fork and exec, because `preexec_fn` is not safe
    # with the threads of TensorFlow.
    launch = (
        f"import ctypes, os, sys; ctypes.CDLL(None).prctl({_PDEATHSIG}, {int(signal.SIGKILL)}); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return subprocess.Popen(
        [sys.executable, "-ISc", launch, binary, f"--port={port}"],
        # By default, TensorFlow 2.14 disables oneDNN on some processors, which makes convolutions
        # 2.5 times slower.
        env={"TF_ENABLE_ONEDNN_OPTS": "1", **os.environ},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


async def forward(listening: socket.socket, port: int) -> None:
    """Passes connections on to the worker."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while part := await reader.read(2**18):
                writer.write(part)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner = await asyncio.open_connection("127.0.0.1", port)
        except OSError:  # it is starting
            writer.close()
            return
        await asyncio.gather(pump(reader, inner[1]), pump(inner[0], writer))

    server = await asyncio.start_server(connected, sock=listening)
    async with server:
        await server.serve_forever()


async def keep_running(binary: str, port: int, folder: str) -> None:
    """Starts the worker again whenever it has died."""
    process = start(binary, port, folder)
    try:
        while True:
            await asyncio.sleep(0.5)
            if process.poll() is not None:
                process = start(binary, port, folder)
    finally:
        process.kill()
        process.wait()


async def serve(listening: socket.socket, port: int, binary: str, folder: str) -> None:
    """Runs until it is cancelled."""
    await asyncio.gather(forward(listening, port), keep_running(binary, port, folder))


def remove_left_folders() -> None:
    """Removes the folders of processes of this user that were killed."""
    for entry in os.scandir(tempfile.gettempdir()):
        name = entry.name.removeprefix(_FOLDER).partition("_")[0]
        if not entry.name.startswith(_FOLDER) or not name.isdecimal():
            continue
        if not entry.is_symlink() and not os.path.exists(f"/proc/{name}"):
            shutil.rmtree(entry.path, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Runs the worker until SIGTERM or SIGINT."""
    descriptor, network, binary = arguments
    os.umask(0o077)  # the data of clients are for this user alone
    remove_left_folders()
    ctypes.CDLL(None).prctl(_PDEATHSIG, int(signal.SIGTERM))
    listening = socket.socket(fileno=int(descriptor))
    port = 10000
    if network == "isolate":
        try:
            isolate()
        except OSError:
            return NOT_ISOLATED
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory(prefix=f"{_FOLDER}{os.getpid()}_") as folder:
        task: asyncio.Task[Any] = loop.create_task(serve(listening, port, binary, folder))
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, task.cancel)
        print("ready", flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
