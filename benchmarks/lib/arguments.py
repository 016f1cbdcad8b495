"""The options that the scripts have in common, and the command that repeats a run."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lib.results import RESULTS


def parser(
    doc: str, seeds: int | None = None, data_dir: bool = False, out: Path = RESULTS
) -> argparse.ArgumentParser:
    """Returns a parser with `--out`, and with `--seeds` and `--data-dir` where they are asked for.

    Args:
        doc: the docstring of the script, which `--help` shows.
        seeds: the default number of seeds. Defaults to None: no such option.
        data_dir: whether the script reads TFDS data.
        out: the default of `--out`: a folder, or a path without a suffix for the results files.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if data_dir:
        made.add_argument("--data-dir", help="folder of the TFDS data (default: TFDS_DATA_DIR)")
    if seeds is not None:
        made.add_argument("--seeds", type=int, default=seeds, help=f"how many (default: {seeds})")
    what = "folder of the results" if out == RESULTS else "path of the results, without a suffix"
    made.add_argument("--out", type=Path, default=out, help=what)
    return made


def command(script: str, arguments: argparse.Namespace, *names: str) -> str:
    """Returns the command with these options, without those that are None or the folders."""
    words = ["python", f"benchmarks/{Path(script).name}"]
    for name in names:
        value = getattr(arguments, name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words.append(f"--{name.replace('_', '-')}")
            shown = [one.name if isinstance(one, Path) else str(one) for one in values]
            words += [shlex.quote(one) for one in shown]
    return " ".join(words)
