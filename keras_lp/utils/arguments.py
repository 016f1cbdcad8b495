"""Checks of single arguments: a choice, a number above 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from keras_lp.utils.names import near

Verbose = bool | Literal["auto", 0, 1, 2]  # as in `keras.Model.fit`


def check_choice(argument: str, value: Any, options: Iterable[Any]) -> None:
    """Raises `ValueError` unless `value` is one of the options."""
    options = list(options)
    if value not in options:
        names = [option for option in options if isinstance(option, str)]
        hint = near(value, names) if isinstance(value, str) else ""
        raise ValueError(
            f"`{argument}` must be one of {options}. Received: {argument}={value!r}.{hint}"
        )


def check_positive(argument: str, value: Any, integer: bool = False) -> None:
    """Raises `ValueError` unless `value` is a number (or an integer) above 0."""
    kinds = (int, np.integer) if integer else (int, float, np.number)
    if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
        rule = "an integer of 1 or more" if integer else "a number above 0"
        raise ValueError(f"`{argument}` must be {rule}. Received: {argument}={value!r}.")
