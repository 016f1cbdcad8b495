"""`python -m keras_lp.tflite inspect FILE` prints the contents of a `.tflite` file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_lp.tflite.contents import inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the contents of each file; exits with status 1 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m keras_lp.tflite")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("inspect", help="print the contents of a .tflite file")
    command.add_argument("files", nargs="+", metavar="FILE")
    for file in parser.parse_args(arguments).files:
        try:
            print(inspect(file))
        except (OSError, ValueError) as error:
            parser.exit(1, f"{file}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
