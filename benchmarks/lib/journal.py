"""Runs that are kept in a file as they are done, so that a study that was stopped can continue."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
            else:
                old = path.with_suffix(".old.json")
                path.replace(old)
                print(f"Other settings or another machine: the runs so far are kept in {old}.")

    def has(self, **key: Any) -> bool:
        """Whether there is a run with this key."""
        return self._find(key) is not None

    def _find(self, key: Mapping[str, Any]) -> Run | None:
        same = (run for run in self.runs if key.items() <= run.items())
        return next(same, None)

    def run(self, learn: Callable[[], Run], **key: Any) -> Run:
        """Returns the run with this key; calls `learn` if there is none, and keeps the result."""
        found = self._find(key)
        if found is not None:
            return found
        run = {**key, **learn()}
        self.runs.append(run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = self.runs
        if self._settings is not None:
            kept = {"settings": self._settings, "runs": self.runs}
        new = self._path.with_suffix(".new")  # whoever is killed here leaves the old file whole
        new.write_text(json.dumps(kept))
        new.replace(self._path)
        return run
