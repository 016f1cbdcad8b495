"""Progress of long work: a bar in a terminal or notebook, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from keras_lp.utils.arguments import Verbose

_LINES = 20  # at most, if there is no bar
_DELAY = 0.5  # seconds; shorter work shows no bar


def bar_only(verbose: Verbose) -> Verbose:
    """Returns `verbose` for work that another function reports in lines: a bar or nothing."""
    return "auto" if verbose in ("auto", 1) else 0


class Progress:
    """Shows the progress of work inside a context.

    | `verbose` | in a terminal or a notebook with ipywidgets | elsewhere |
    |---|---|---|
    | 0 | nothing | nothing |
    | `"auto"` | a bar, removed at the end | nothing |
    | 1 | the same | a line per step, 20 lines at most |
    | 2 | a line per step, 20 lines at most | the same |

    Args:
        label: name of the work.
        total: number of steps.
        verbose: as in the table.
        running: function that returns the number of steps done in another process, in addition
            to those of `step`; called in another thread. Defaults to None: none.

    Attributes:
        done: number of steps done.

    Example:

    >>> with Progress("Training", 2, verbose=2) as progress:
    ...     for model in ("multitask", "single"):
    ...         progress.step()
    Training 1/2 - 0.0s
    Training 2/2 - 0.0s
    """

    def __init__(
        self,
        label: str,
        total: int,
        verbose: Verbose = "auto",
        running: Callable[[], int] | None = None,
    ) -> None:
        self.done = 0
        self._label = label
        self._total = total
        self._running = running or (lambda: 0)
        self._started = time.monotonic()
        self._bar = self._make_bar() if verbose in ("auto", 1) else None
        self._timer: threading.Timer | None = None
        self._prints = verbose in (1, 2) and self._bar is None

    def __enter__(self) -> Progress:
        if self._bar is not None and self._bar.console.is_jupyter:
            self._bar.start()  # here: what another thread starts shows in another cell
        elif self._bar is not None:
            self._timer = threading.Timer(_DELAY, self._bar.start)
            self._timer.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        if self._bar is not None:
            self._bar.stop()

    def step(self, count: int = 1) -> None:
        """Says that some steps are done."""
        before, self.done = self.done, self.done + count
        lines = min(self._total, _LINES)
        if self._prints and self.done * lines // self._total > before * lines // self._total:
            seconds = time.monotonic() - self._started
            print(f"{self._label} {self.done}/{self._total} - {seconds:.1f}s", flush=True)

    def _make_bar(self) -> Any:
        """Returns rich's bar, None where it cannot be shown."""
        from rich import progress
        from rich.console import Console

        console = Console()
        in_notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        if not (console.is_interactive or in_notebook):
            return None
        steps = self

        class Bar(progress.Progress):
            def get_renderables(self) -> Iterable[Any]:  # 10 times a second, in rich's thread
                for task in self.task_ids:
                    done = min(steps.done + steps._running(), steps._total)
                    self.update(task, completed=done)
                yield from super().get_renderables()

        bar = Bar(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
        )
        bar.add_task(self._label, total=self._total)
        return bar
