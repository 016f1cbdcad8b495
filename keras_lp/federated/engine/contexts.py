"""The parts of TFF's execution contexts that run computations in a worker."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from keras_lp.federated.engine.tff_import import import_tff

_CORE = "tensorflow_federated.python.core"


def sync_context(stub: Callable[[], Any]) -> Any:
    """Returns a context that waits for results.

    Args:
        stub: returns the connection to a worker.
    """
    module = f"{_CORE}.impl.execution_contexts.sync_execution_context"
    return importlib.import_module(module).SyncExecutionContext(**_parts(stub))


def async_context(stub: Callable[[], Any]) -> Any:
    """Returns an asynchronous context. See `sync_context` for the argument."""
    module = f"{_CORE}.impl.execution_contexts.async_execution_context"
    return importlib.import_module(module).AsyncExecutionContext(**_parts(stub))


def unlimited_messages() -> list[tuple[str, int]]:
    """Returns the options of a gRPC channel without limits of size."""
    return [(f"grpc.max_{kind}message_length", -1) for kind in ("", "send_", "receive_")]


def _parts(stub: Callable[[], Any]) -> dict[str, Any]:
    tff = import_tff()
    native = importlib.import_module(f"{_CORE}.backends.native.compiler")
    frontend = importlib.import_module(
        f"{_CORE}.environments.tensorflow_frontend.tensorflow_computation"
    )

    def executor_stack(cardinalities: dict[Any, int]) -> Any:
        cardinalities.setdefault(tff.CLIENTS, 0)
        executor = tff.framework.RemoteExecutor(stub())
        executor.set_cardinalities(cardinalities)
        return executor

    return {
        "executor_fn": tff.framework.ResourceManagingExecutorFactory(executor_stack),
        "compiler_fn": native.desugar_and_transform_to_native,
        "transform_args": frontend.transform_args,
        "transform_result": frontend.transform_result,
    }
