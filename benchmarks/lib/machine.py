"""The machine and the versions of a run, the memory of a process, and processes of their own."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path


def machine(*packages: str) -> str:
    """Names the processor and the versions that the figures were measured with."""
    import tensorflow as tf

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    names = ("keras", "tensorflow", *packages)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    gpus = len(tf.config.list_physical_devices("GPU"))
    hardware = f"{os.cpu_count()} cores of {model}, {gpus} GPU"
    return f"{hardware}; Python {platform.python_version()}, {versions}"


def one_thread() -> None:
    """Makes TensorFlow compute with one thread; for small networks that is as fast."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def memory(kind: str = "VmRSS", pid: int | str = "self") -> float:
    """Returns the MiB of a process as Linux counts them, 0 of one that has ended.

    Args:
        kind: "VmRSS", what it has now, or "VmHWM", the peak.
        pid: of the process. Defaults to this one.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 2**10


def own_process(script: str, *arguments: object) -> list[float]:
    """Runs a script in a process of its own; returns the numbers that it gave to `answer`."""
    command = [sys.executable, "-W", "ignore", script, *map(str, arguments)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    line = next(line for line in printed.splitlines() if line.startswith("RESULT"))
    return [float(value) for value in line.split()[1:]]


def answer(*numbers: float) -> None:
    """Prints numbers for `own_process`."""
    print("RESULT", *numbers)
