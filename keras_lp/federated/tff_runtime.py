"""Loads TensorFlow Federated and connects it to the worker process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_lp.federated.engine import installation
from keras_lp.federated.engine.contexts import sync_context
from keras_lp.federated.engine.tff_import import import_tff
from keras_lp.federated.engine.worker import LOCK, load_worker
from keras_lp.federated.engine.workers import remote


def load_tff() -> Any:
    """Imports TFF, sets the execution context of this thread, and returns the module.

    Raises:
        ImportError: TFF or one of its dependencies is not installed, or TFF has no wheel for this
            machine. The message lists the commands to run.
    """
    reason = installation.unsupported_platform()
    missing = installation.missing_modules() if reason is None else []
    if missing:
        reason = (
            f"Federated learning needs TensorFlow Federated. Missing: {missing}. "
            "Its package metadata conflict with a current TensorFlow, so install it with:\n  "
            + "\n  ".join(installation.install_commands())
        )
    if reason is not None:
        raise ImportError(reason)
    with LOCK:
        tff = import_tff()
        tff.framework.set_default_context(_execution_context())
    return tff


def call(function: Callable[[], Any], folder: Path | None = None, blocks: int = 0) -> Any:
    """Returns what a function that calls TFF computations returns, on this machine or on others.

    Args:
        function: the function, without effects.
        folder: the folder of the files that clients read. Defaults to none.
        blocks: number of blocks. Defaults to none.
    """
    workers = remote()
    if workers is not None:
        return workers.run(function, folder, blocks)
    with load_worker().watch():
        return function()


@functools.cache
def _execution_context() -> Any:
    """Like `tff.backends.native.set_sync_local_cpp_execution_context`, with our worker."""
    return sync_context(lambda: load_worker().stub())
