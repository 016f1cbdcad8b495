"""Runs that are kept in a file as they are done, so that a study that was stopped can continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.machine import machine

Run = dict[str, Any]


class Journal:
    """The runs of a study and the JSON file that holds them: a list, or a dict with `settings`."""

    def __init__(self, path: Path, settings: dict[str, Any] | None = None) -> None:
        """Reads the runs of the file; with `settings`, if they and the machine are the same."""
        self.runs: list[Run] = []
        self._path, self._settings = path, settings
        if settings is not None:
            self._settings = {**settings, "machine": machine("scikit-learn")}
        if path.exists():
            found = json.loads(path.read_text())
            if settings is None:
                self.runs = found
            elif found["settings"] == self._settings:
                self.runs = found["runs"]

    def run(self, learn: Callable[[], Run], **key: Any) -> Run:
        """Returns the run with this key; calls `learn` if there is none, and keeps the result."""
        for run in self.runs:
            if all(name in run and run[name] == value for name, value in key.items()):
                return run
        run = {**key, **learn()}
        self.runs.append(run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = self.runs
        if self._settings is not None:
            kept = {"settings": self._settings, "runs": self.runs}
        self._path.write_text(json.dumps(kept))
        return run
