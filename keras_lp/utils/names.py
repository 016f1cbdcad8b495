"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(name: str, options: Iterable[str]) -> str:
    """Returns " Did you mean ...?" with the options most similar to `name`, else ""."""
    options = list(options)
    lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(lower[match]) for match in close)}?"
