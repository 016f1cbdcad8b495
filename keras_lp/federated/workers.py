"""`federated_workers`: the rounds of a simulation on several machines."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from keras_lp.federated import tff_runtime
from keras_lp.federated.engine.workers import RemoteWorkers, using
from keras_lp.utils.arguments import check_positive


@contextlib.contextmanager
def federated_workers(addresses: Sequence[str], *, timeout: float = 30.0) -> Iterator[None]:
    """Runs the rounds of `FederatedAveraging` on several machines, inside a `with` statement.

    Start a worker on each machine: `python -m keras_lp.federated.worker --port 8500`. The clients
    of a round are divided among the workers; the result is the same as on one machine, apart from
    rounding.

    This is a distributed simulation: this program sends the data of the clients to the workers. For
    devices that keep their data, see `lp.phone_server`.

    A worker that does not answer for `timeout` seconds, because it was killed, paused or cut off,
    is left out with a warning, and the others repeat the round. It takes part again in the next
    round if it answers then. A worker that is slow is waited for.

    Workers listen on 127.0.0.1. Connect to those of other machines through SSH, which also encrypts
    (`ssh -L 8501:127.0.0.1:8500 machine`), or in a closed network with `--host 0.0.0.0`: whoever
    reaches a worker can run any code on its machine.

    Args:
        addresses: `"host:port"` of each worker.
        timeout: seconds without an answer after which a worker is left out. Defaults to 30.

    Raises:
        ValueError: there are no addresses, or one is not `"host:port"`.
        ConnectionError: a worker does not answer at the start, or all are gone.
        ImportError: TensorFlow Federated is not installed.

    Example:

    >>> import keras_lp as lp
    >>> workers = ["127.0.0.1:8501", "127.0.0.1:8502"]
    >>> with lp.federated_workers(workers):  # doctest: +SKIP
    ...     federated.fit(clients, rounds=10)
    """
    listed = list(addresses)
    wrong = [one for one in listed if not re.fullmatch(r"\S+:\d+", str(one))]
    if not listed or wrong or len(set(listed)) < len(listed):
        raise ValueError(
            '`addresses` must be "host:port" of each worker, each once. Received: '
            f"{addresses!r}. Start workers with `python -m keras_lp.federated.worker`."
        )
    check_positive("timeout", timeout)
    tff_runtime.load_tff()
    with using(RemoteWorkers(listed, float(timeout))):
        yield
