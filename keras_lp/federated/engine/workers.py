"""Rounds on TFF workers of other machines."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keras_lp.federated.engine.contexts import async_context, sync_context, unlimited_messages
from keras_lp.federated.engine.tff_import import import_tff
from keras_lp.utils.warn import warn

_ASK = 1.0  # seconds between two questions to the workers whether they are there
_SENT = ("*.frozen", "*.rows")

_current: RemoteWorkers | None = None


class _Gone(Exception):  # noqa: N818
    """Raised when workers do not answer.

    Args:
        connections: those workers.
    """

    def __init__(self, connections: Sequence[_Connection]) -> None:
        super().__init__()
        self.connections = connections


class RemoteWorkers:
    """TFF workers of other machines, which share the blocks of a round.

    A call is a function without effects, so it is repeated with the other workers if some of them
    do not answer.

    Args:
        addresses: `"host:port"` of each worker.
        timeout: seconds without an answer after which a worker is left out.
    """

    def __init__(self, addresses: Sequence[str], timeout: float) -> None:
        self._timeout = timeout
        self._absent = list(addresses)
        self._connections: list[_Connection] = []
        self._context: Any = None
        self._questions = concurrent.futures.ThreadPoolExecutor(2 * len(addresses))
        self._return(timeout)
        if self._absent:
            self.close()
            raise ConnectionError(
                "All workers must answer at the start. Received: no answer from "
                f"{self._absent}. Start them with `python -m keras_lp.federated.worker`."
            )

    def __len__(self) -> int:
        return len(self._connections)

    def run(self, function: Callable[[], Any], folder: Path | None, blocks: int) -> Any:
        """Returns what a function that calls TFF computations returns.

        Args:
            function: the function.
            folder: the folder of the files that clients read, which are sent first.
            blocks: number of blocks.
        """
        if self._absent:
            self._return(_ASK)
        while True:
            try:
                return self._watched(lambda: self._call(function, folder, blocks))
            except _Gone as gone:
                self._leave_out(gone.connections)

    def close(self) -> None:
        """Empties the files on the workers and ends the connections."""
        for connection in self._connections:
            with contextlib.suppress(Exception):
                self._watched(connection.empty)
            connection.close()
        self._connections = []
        self._questions.shutdown(wait=False)

    def _call(self, function: Callable[[], Any], folder: Path | None, blocks: int) -> Any:
        first = 0
        for i, connection in enumerate(self._connections):
            # TFF gives consecutive clients to each worker.
            count = math.ceil((blocks - first) / (len(self._connections) - i))
            if folder is not None:
                connection.send(folder, range(first, first + count))
            first += count
        tff = import_tff()
        if self._context is None:
            contexts = [connection.context() for connection in self._connections]
            native = tff.backends.native
            self._context = native.create_mergeable_comp_execution_context(contexts)
        tff.framework.set_default_context(self._context)  # of this thread
        return function()

    def _watched(self, function: Callable[[], Any]) -> Any:
        """Runs a function in a thread while the workers answer.

        TFF itself would wait forever for a worker that is gone.
        """
        result: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        while not concurrent.futures.wait([result], _ASK).done:
            asked = [(one, self._ask(one, self._timeout)) for one in self._connections]
            for _, answer in asked:
                concurrent.futures.wait([result, answer], return_when="FIRST_COMPLETED")
            gone = [one for one, answer in asked if answer.done() and not answer.result()]
            if gone and not result.done():
                raise _Gone(gone)
        return result.result()

    def _ask(self, connection: _Connection, seconds: float) -> concurrent.futures.Future[bool]:
        return self._questions.submit(connection.answers, seconds)

    def _leave_out(self, gone: Sequence[_Connection]) -> None:
        addresses = [one.address for one in gone]
        survivors = [one.address for one in self._connections if one not in gone]
        for connection in self._connections:  # ends what the others are still computing for
            connection.close()
        self._absent += addresses
        if not survivors:
            raise ConnectionError(
                f"A worker must answer within {self._timeout:g} seconds. Received: no answer from "
                f"any of {addresses}. Start them again; with `checkpoint_dir`, `fit` continues."
            )
        warn(f"{addresses} did not answer within {self._timeout:g} seconds and are left out.")
        self._connections = [_Connection(address) for address in survivors]
        self._context = None

    def _return(self, seconds: float) -> None:
        """Takes workers back that answer again."""
        tried = [_Connection(address) for address in self._absent]
        asked = [(one, self._ask(one, seconds)) for one in tried]
        found = [one for one, answer in asked if answer.result()]
        for connection in tried:
            if connection not in found:
                connection.close()
        if found:
            self._absent = [one.address for one in tried if one not in found]
            self._connections += found
            self._context = None


class _Connection:
    """A connection to a worker.

    Args:
        address: `"host:port"`.
    """

    def __init__(self, address: str) -> None:
        import grpc

        tff = import_tff()
        self.address = address
        self._channel = grpc.insecure_channel(address, unlimited_messages())
        # Questions have a connection of their own: they do not wait behind large messages.
        self._questions = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self._stub = tff.framework.RemoteExecutorGrpcStub(self._channel)
        self._sent: dict[Path, tuple[int, int]] = {}
        self._write: Any = None

    def answers(self, seconds: float) -> bool:
        """Returns whether the worker answers within some seconds."""
        import grpc

        ask = self._questions.unary_unary("/keras_lp/ask")
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                ask(b"", timeout=left, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:  # it does not know the question
                    return True
            except ValueError:  # the connection was closed meanwhile
                return False
            time.sleep(0.1)  # it may be starting again
        return False

    def context(self) -> Any:
        """Returns an asynchronous context of TFF on this worker."""
        return async_context(lambda: self._stub)

    def send(self, folder: Path, blocks: range) -> None:
        """Sends the files of a folder that changed: of all blocks, and the rows of some."""
        for path in sorted(path for pattern in _SENT for path in folder.glob(pattern)):
            if path.suffix == ".rows" and int(path.name.split(".")[0]) not in blocks:
                continue
            stat = path.stat()
            version = (stat.st_mtime_ns, stat.st_size)
            if self._sent.get(path) != version:
                self._put(path, path.read_bytes())
                self._sent[path] = version

    def empty(self) -> None:
        """Empties the files that were sent: TFF cannot delete them."""
        for path in self._sent:
            self._put(path, b"")

    def close(self) -> None:
        """Ends the connection, with the calls that wait for an answer."""
        self._channel.close()
        self._questions.close()

    def _put(self, path: Path, content: bytes) -> None:
        import numpy as np
        import tensorflow as tf

        tff = import_tff()
        if self._write is None:
            context = sync_context(lambda: self._stub)

            @tff.tensorflow.computation(np.str_, np.str_)
            def write(name: Any, value: Any) -> Any:
                with tf.control_dependencies([tf.io.write_file(name, value)]):
                    return tf.constant(0)

            self._write = context, write
        context, write = self._write
        tff.framework.set_default_context(context)
        write(f"{on_worker(path.parent)}/{path.name}", content)


def remote() -> RemoteWorkers | None:
    """Returns the workers of other machines, None if rounds run on this one."""
    return _current


def on_worker(folder: Path) -> str:
    """Returns the path of a folder of files as the workers see it.

    On other machines, it is relative to the folder that `worker_process` runs in.
    """
    return str(folder) if _current is None else folder.name


@contextlib.contextmanager
def using(workers: RemoteWorkers) -> Iterator[None]:
    """Runs rounds on these workers."""
    global _current
    before, _current = _current, workers
    try:
        yield
    finally:
        workers.close()
        _current = before
