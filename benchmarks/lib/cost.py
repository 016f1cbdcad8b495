"""What a run costs: floating-point operations, memory, and the time of a file on one example."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lib.machine import memory


def forward_flops(model: keras.Model) -> int:
    """Returns the floating-point operations of a prediction for one example, as TensorFlow counts.

    Convolutions, products of matrices and elementwise operations count; a multiplication and an
    addition are two.
    """
    inputs = model.inputs[0]
    spec = tf.TensorSpec((1, *inputs.shape[1:]), inputs.dtype)
    graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(spec).graph
    profiler = tf.compat.v1.profiler
    options = profiler.ProfileOptionBuilder.float_operation()
    found = profiler.profile(
        graph, options=profiler.ProfileOptionBuilder(options).with_empty_output().build()
    )
    return int(found.total_float_ops)


def processor_seconds() -> float:
    """Returns the processor time of this process and its children: TFF trains in one of them."""
    found = os.times()
    total = found.user + found.system + found.children_user + found.children_system
    times, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], times[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    young = {os.getpid()}
    while young:
        young = {pid for pid, parent in parents.items() if parent in young}
        total += sum(times[pid] for pid in young) / os.sysconf("SC_CLK_TCK")
    return total


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Adds `MiB` to the dict at the end: the peak of the process above what it had before.

    Free memory first goes back to the system, and Linux begins to look for a new peak. On other
    systems the dict stays empty.
    """
    found: dict[str, float] = {}
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = None
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        before = memory()
    yield found
    if before is not None:
        found["MiB"] = max(0.0, memory("VmHWM") - before)


def latency(path: str, x: np.ndarray, repeats: int = 30) -> float:
    """Returns the milliseconds of a file for one example in LiteRT on one thread, a median."""
    from ai_edge_litert.interpreter import Interpreter

    run: Any = Interpreter(path, num_threads=1).get_signature_runner()
    (name, details), *_ = run.get_input_details().items()
    times = []
    for i in range(repeats + 1):
        example = np.asarray(x[i % len(x)][None], details["dtype"])
        start = time.perf_counter()
        run(**{name: example})
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])
