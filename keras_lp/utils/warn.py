"""Warnings that point at the user's line."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from pathlib import Path

import keras

# Of this package, of Keras, which calls its callbacks, and of decorators made by contextlib.
_SKIPPED = (
    str(Path(__file__).parents[1]) + os.sep,
    str(Path(keras.__file__).parent) + os.sep,
    contextlib.__file__,
)


def warn(message: str) -> None:
    """Warns about the user's line, whatever the number of calls in between."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)
