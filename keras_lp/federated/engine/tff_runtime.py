"""TensorFlow Federated next to Keras 3: its import, and the worker process that it starts.

TFF 0.87 runs every computation in a C++ process of its own (`worker_binary`). Left alone, TFF
leaves that process behind at exit, holding the pipes of its parent; here it is owned.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).parents[1] / "requirements-tff.txt"

# Several threads may train at once: one imports TFF and starts the worker.
_LOCK = threading.RLock()

# What TFF needs at run time, as modules; the extra `federated` installs them.
_RUNTIME_MODULES = (
    "attrs",
    "cachetools",
    "tree",
    "portpicker",
    "tqdm",
    "typing_extensions",
    "dp_accounting",
    "google.api",
)
_TFF_MODULES = ("tensorflow_federated", "tensorflow_privacy", "tensorflow_model_optimization")


def missing_modules() -> list[str]:
    """Returns the modules that TFF needs and this environment lacks."""
    return [name for name in (*_RUNTIME_MODULES, *_TFF_MODULES) if not _is_installed(name)]


def install_commands() -> list[str]:
    """Returns the shell commands that install what is missing, for this interpreter."""
    missing = missing_modules()
    commands = []
    python = shlex.quote(sys.executable)
    pip = f"{python} -m pip install"
    if missing and not _has_pip():
        commands.append(f"{python} -m ensurepip")
    if set(missing) & set(_RUNTIME_MODULES):
        commands.append(f"{pip} 'keras_lp[federated]'")
    if set(missing) & set(_TFF_MODULES):
        commands.append(
            f"{pip} --no-deps --ignore-requires-python -r {shlex.quote(str(REQUIREMENTS))}"
        )
    return commands


def unsupported_platform() -> str | None:
    """Returns why TFF cannot run on this machine, or None."""
    if sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64"):
        return None
    return (
        "TensorFlow Federated has wheels for Linux x86-64 only. Received: "
        f"{platform.system()} {platform.machine()}. Run the federated part in a Linux container "
        "or virtual machine; the rest of keras_lp works here."
    )


def load_tff() -> Any:
    """Imports TFF, sets this thread's execution context, and returns the module.

    Raises:
        ImportError: TFF, or something that it needs, is not installed, or it has no wheel for
            this machine; the message says what to run.
    """
    reason = unsupported_platform()
    if reason is None and missing_modules():
        reason = (
            f"Federated learning needs TensorFlow Federated. Missing: {missing_modules()}. "
            "Its own metadata cannot be installed next to a current TensorFlow, so run:\n  "
            + "\n  ".join(install_commands())
        )
    if reason is not None:
        raise ImportError(reason)
    with _LOCK:
        tff = _import_tff()
        tff.framework.set_default_context(_execution_context())
    return tff


@functools.cache
def _import_tff() -> Any:
    # Releases after 0.87 support Keras 3 by themselves.
    if importlib.metadata.version("tensorflow-federated").startswith("0.87"):
        _install_placeholders()
    return importlib.import_module("tensorflow_federated")


@functools.cache
def _execution_context() -> Any:
    """What `tff.backends.native.set_sync_local_cpp_execution_context` sets, on our worker."""
    tff = _import_tff()
    native = importlib.import_module("tensorflow_federated.python.core.backends.native.compiler")
    frontend = importlib.import_module(
        "tensorflow_federated.python.core.environments.tensorflow_frontend.tensorflow_computation"
    )
    sync = importlib.import_module(
        "tensorflow_federated.python.core.impl.execution_contexts.sync_execution_context"
    )

    def executor_stack(cardinalities: dict[Any, int]) -> Any:
        cardinalities.setdefault(tff.CLIENTS, 0)
        executor = tff.framework.RemoteExecutor(load_worker().stub())
        executor.set_cardinalities(cardinalities)
        return executor

    return sync.SyncExecutionContext(
        executor_fn=tff.framework.ResourceManagingExecutorFactory(executor_stack),
        compiler_fn=native.desugar_and_transform_to_native,
        transform_args=frontend.transform_args,
        transform_result=frontend.transform_result,
    )


@functools.cache
def load_worker() -> Worker:
    """Returns the one worker of this process."""
    return Worker()


class Worker:
    """TFF's C++ process, started when first needed, and again when it has died.

    It is killed at exit, and by the kernel if this process dies first; it holds none of our
    pipes.

    Attributes:
        process: the process, None before the first start.
        restarts: how often it was started again.
        bytes_sent: sizes of all messages to it: weights and computations (data are in files).
        bytes_received: sizes of all messages from it.
    """

    # PR_SET_PDEATHSIG (1) with SIGKILL (9), set by a launcher between fork and exec: a
    # `preexec_fn` is not safe with TensorFlow's threads.
    _LAUNCH = (
        "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
    )
    _SECONDS_TO_START = 60
    _RESTARTS_A_CALL = 3

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = self.bytes_sent = self.bytes_received = 0
        self._allowed = self._RESTARTS_A_CALL
        self._stub: Any = None
        atexit.register(self.end)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Lets the worker die a few times in a call of TFF, which starts again each time.

        TFF itself would try without end.
        """
        self._allowed = self.restarts + self._RESTARTS_A_CALL
        yield

    def stub(self) -> Any:
        """Returns the connection to a running worker."""
        with _LOCK:
            while self._stub is None or not self._stub.is_ready:
                self._count_restart()
                self.end()
                self._start()
            return self._stub

    def end(self) -> None:
        """Kills the process, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()  # SIGTERM would leave it alive for seconds
            self.process.wait()

    def _count_restart(self) -> None:
        if self.process is None:
            return
        if self.restarts >= self._allowed:
            raise RuntimeError(
                "TFF's worker process must live through a round. Received: "
                f"{self._RESTARTS_A_CALL + 1} deaths in one, the last with exit code "
                f"{self.process.poll()}. It may lack memory: sample fewer clients a round."
            )
        self.restarts += 1

    def _start(self) -> None:
        import grpc
        import portpicker

        tff = _import_tff()
        binary = Path(tff.__file__).with_name("data") / "worker_binary"
        port = portpicker.pick_unused_port()
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", self._LAUNCH, str(binary), f"--port={port}"],
            # Left to itself TensorFlow 2.14 has oneDNN off on some processors, where convolutions
            # then take 2.5 times longer.
            env={"TF_ENABLE_ONEDNN_OPTS": "1", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        unlimited = [(f"grpc.max_{kind}message_length", -1) for kind in ("", "send_", "receive_")]
        channel = grpc.insecure_channel(f"localhost:{port}", unlimited)
        counted = grpc.intercept_channel(channel, _counting_interceptor(self))
        self._stub = tff.framework.RemoteExecutorGrpcStub(counted)
        deadline = time.monotonic() + self._SECONDS_TO_START
        while not self._stub.is_ready:
            code = self.process.poll()
            if code is not None and code < 0:  # killed: tried again, as in a round
                return
            if code is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    "TFF's worker process must start and answer. Received: exit code "
                    f"{code} from {binary}. Run it by hand to see why: "
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


def _has_pip() -> bool:
    try:  # not by `find_spec`: setuptools hooks into that name and warns
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


# --- TFF 0.87 on a current TensorFlow ---------------------------------------------------------


def _install_placeholders() -> None:
    """Puts empty modules where TFF 0.87 imports what it does not need to run."""

    def unavailable(*_: Any, **__: Any) -> None:
        raise ImportError("This part of TFF needs packages that are not installed.")

    _placeholder("tensorflow_federated.python.core.environments.jax", computation=unavailable)
    _placeholder(
        "tensorflow_federated.python.learning.programs.vizier_program_logic",
        train_model_with_vizier=unavailable,
    )
    if not _is_installed("distutils"):  # Python 3.12 and later

        class LooseVersion:
            def __init__(self, version: str) -> None:
                self.version = tuple(int(part) for part in version.split(".")[:2])

            def __lt__(self, other: LooseVersion) -> bool:
                return self.version < other.version

        version = _placeholder("distutils.version", LooseVersion=LooseVersion)
        _placeholder("distutils", version=version, __path__=[])
    if not _is_installed("tensorflow_probability"):
        _placeholder("tensorflow_probability")
    _import_dp_queries()
    # Its own `__init__` wants tf_keras; TFF uses one sub-package.
    spec = importlib.util.find_spec("tensorflow_model_optimization")
    _placeholder(
        "tensorflow_model_optimization",
        __path__=list(spec.submodule_search_locations),
        __spec__=spec,
    )


def _import_dp_queries() -> None:
    """Imports tensorflow-privacy's queries alone; the rest of it wants TensorFlow 1 estimators."""
    sys.skip_tf_privacy_import = True  # the package's own switch
    privacy = importlib.import_module("tensorflow_privacy")
    del sys.skip_tf_privacy_import
    queries = (
        "dp_query",
        "gaussian_query",
        "no_privacy_query",
        "normalized_query",
        "quantile_estimator_query",
        "quantile_adaptive_clip_sum_query",
        "quantile_adaptive_clip_tree_query",
        "restart_query",
        "tree_aggregation_query",
        "tree_range_query",
        "distributed_discrete_gaussian_query",
        "distributed_skellam_query",
    )
    for name in queries:
        module = importlib.import_module(f"tensorflow_privacy.privacy.dp_query.{name}")
        setattr(privacy, name, module)
        for attribute, value in vars(module).items():
            if isinstance(value, type) and not attribute.startswith("_"):
                setattr(privacy, attribute, value)


def _placeholder(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # `find_spec` wants one
    vars(module).update(attributes)
    sys.modules[name] = module
    return module
