"""Progress of long work: a bar in a terminal, lines elsewhere."""

import io
import re
import sys
import time

import pytest
import rich.console

from keras_lp.utils import progress
from keras_lp.utils.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make_terminal(monkeypatch, delay=0):
    """Makes standard output a terminal of 80 columns."""
    monkeypatch.setattr(progress, "_DELAY", delay)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    return terminal


def shown(terminal, text):
    """Waits until a text is in the terminal, which another thread writes to."""
    deadline = time.monotonic() + 10
    while text not in plain(terminal) and time.monotonic() < deadline:
        time.sleep(0.01)
    return text in plain(terminal)


def plain(terminal):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())


def test_a_line_per_step(capsys):
    with Progress("Models trained", 3, verbose=1) as steps:
        for _ in range(3):
            steps.step()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" - ")[0] for line in lines] == [f"Models trained {i}/3" for i in (1, 2, 3)]
    assert all(re.fullmatch(r".* - \d+\.\ds", line) for line in lines)


@pytest.mark.parametrize("count", [1, 7])
def test_many_steps_are_20_lines(count, capsys):
    with Progress("Rates", 210, verbose=2) as steps:
        for _ in range(210 // count):
            steps.step(count)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert lines[-1].startswith("Rates 210/210 - ")


@pytest.mark.parametrize("verbose", [0, False, "auto"])
def test_nothing_outside_of_a_terminal(verbose, capsys):
    with Progress("Work", 2, verbose) as steps:
        steps.step()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("verbose", ["auto", 1, True])
def test_a_bar_in_a_terminal(verbose, monkeypatch):
    terminal = make_terminal(monkeypatch)
    with Progress("Work [1]", 4, verbose, running=lambda: 2) as steps:
        assert shown(terminal, "2/4")
        steps.step()
        assert shown(terminal, "3/4")
        assert "Work [1]" in plain(terminal)
        print("in between")
        assert shown(terminal, "in between\n")
        steps.step(3)
        assert shown(terminal, "4/4")  # never more
    assert "6/4" not in plain(terminal)
    assert terminal.getvalue().endswith("\x1b[1A\x1b[2K")  # it is removed
    assert sys.stdout is terminal


def test_the_bar_ends_with_an_error(monkeypatch):
    terminal = make_terminal(monkeypatch)

    def work():
        with Progress("Work", 4):
            assert shown(terminal, "0/4")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert sys.stdout is terminal
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is back


def test_short_work_shows_no_bar(monkeypatch):
    terminal = make_terminal(monkeypatch, delay=60)
    with Progress("Work", 2) as steps:
        steps.step(2)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(("verbose", "lines"), [(0, 0), (2, 2)])
def test_no_bar_in_a_terminal(verbose, lines, monkeypatch):
    terminal = make_terminal(monkeypatch)
    with Progress("Work", 2, verbose) as steps:
        steps.step()
        steps.step()
    assert terminal.getvalue().count("\n") == lines
    assert "\x1b" not in terminal.getvalue()


def test_a_notebook_without_widgets_gets_lines(monkeypatch, capsys):
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    for verbose, count in (("auto", 0), (1, 2)):
        with Progress("Work", 2, verbose) as steps:
            steps.step()
            steps.step()
        assert capsys.readouterr().out.count("\n") == count
