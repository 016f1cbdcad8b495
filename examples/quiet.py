"""Removes log lines of TensorFlow and LiteRT about the machine from standard error.

`TF_CPP_MIN_LOG_LEVEL` hides most of it. TensorFlow writes some lines before it reads that variable,
and LiteRT has no such variable. Standard error therefore goes through a process that leaves out
those lines and passes on all others, errors too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys

LINES = "|".join(
    [
        "WARNING: All log messages before absl::InitializeLog",
        # No GPU, linked twice, oneDNN.
        r"[IWE]\d{4} \S+ +\d+ (cudart_stub|computation_placer|port)\.cc:",
        "INFO: Created TensorFlow Lite XNNPACK delegate for CPU",
    ]
)
FILTER = """
import re, sys
hidden = re.compile(sys.argv[1].encode())
for line in sys.stdin.buffer:
    if not hidden.match(line):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


def hide_machine_notes() -> None:
    """Call this before TensorFlow is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    process = subprocess.Popen(
        [sys.executable, "-ISc", FILTER, LINES],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C ends the example, and its traceback still passes
    )
    original = os.dup(2)
    os.dup2(process.stdin.fileno(), 2)
    process.stdin.close()

    def restore() -> None:
        sys.stderr.flush()
        os.dup2(original, 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)  # until the last line has passed

    atexit.register(restore)
