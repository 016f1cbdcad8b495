"""The worker: the C++ process in which TensorFlow Federated computes.

By default, TFF does not end that process at exit, and it keeps the pipes of its parent open. This
module starts and ends it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_lp.federated.engine.contexts import unlimited_messages
from keras_lp.federated.engine.tff_import import import_tff
from keras_lp.federated.engine.worker_process import start

# If several threads train at once, only one imports TFF and starts the worker.
LOCK = threading.RLock()


@functools.cache
def load_worker() -> Worker:
    """Returns the only worker of this process."""
    return Worker()


class Worker:
    """The C++ process of TFF, started on first use and restarted if it has died.

    It is killed at exit, or by the kernel if this process dies first. It does not inherit pipes.

    Attributes:
        process: the process, None before the first start.
        restarts: number of restarts.
        bytes_sent: bytes of all messages to it: weights and computations (data are in files).
        bytes_received: bytes of all messages from it.
    """

    _SECONDS_TO_START = 60
    _RESTARTS_A_CALL = 3

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = self.bytes_sent = self.bytes_received = 0
        self._allowed = self._RESTARTS_A_CALL
        self._stub: Any = None
        self._channel: Any = None
        atexit.register(self._leave)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Limits the number of restarts of the worker during a TFF call.

        TFF itself would retry forever.
        """
        self._allowed = self.restarts + self._RESTARTS_A_CALL
        yield

    def stub(self) -> Any:
        """Returns the connection to a running worker."""
        with LOCK:
            while self._stub is None or not self._stub.is_ready:
                self._count_restart()
                self.end()
                self._start()
            return self._stub

    def end(self) -> None:
        """Kills the process if it is running."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()  # after SIGTERM it would live for seconds
            self.process.wait()

    def _leave(self) -> None:
        """Ends the process as Python exits.

        The channel is closed first: when its worker goes, gRPC starts a thread, which Python 3.12
        refuses at exit with a traceback.
        """
        if self._channel is not None:
            self._channel.close()
        self.end()

    def _count_restart(self) -> None:
        if self.process is None:
            return
        if self.restarts >= self._allowed:
            raise RuntimeError(
                "The TFF worker process must survive a round. Received: "
                f"{self._RESTARTS_A_CALL + 1} deaths in one round, the last with exit code "
                f"{self.process.poll()}. It may be out of memory: sample fewer clients per round."
            )
        self.restarts += 1

    def _start(self) -> None:
        import grpc
        import portpicker

        tff = import_tff()
        binary = Path(tff.__file__).with_name("data") / "worker_binary"
        port = portpicker.pick_unused_port()
        self.process = start(str(binary), port)
        self._channel = grpc.insecure_channel(f"localhost:{port}", unlimited_messages())
        counted = grpc.intercept_channel(self._channel, _counting_interceptor(self))
        self._stub = tff.framework.RemoteExecutorGrpcStub(counted)
        deadline = time.monotonic() + self._SECONDS_TO_START
        while not self._stub.is_ready:
            code = self.process.poll()
            if code is not None and code < 0:  # killed: try again, as in a round
                return
            if code is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    "The TFF worker process must start and respond. Received: exit code "
                    f"{code} from {binary}. Run it manually to see why: "
                    f"{binary} --port={port}"
                )
            time.sleep(0.01)


def _counting_interceptor(worker: Worker) -> Any:
    import grpc

    class Count(grpc.UnaryUnaryClientInterceptor):
        def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            response = continuation(details, request)
            worker.bytes_sent += request.ByteSize()
            if response.code() is grpc.StatusCode.OK:
                worker.bytes_received += response.result().ByteSize()
            return response

    return Count()
