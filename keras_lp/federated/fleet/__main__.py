"""`python -m keras_lp.federated.fleet init FOLDER` writes a Flower app."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

FILES = {  # in `template`, and in the folder of the app
    "pyproject.txt": "pyproject.toml",
    "README.txt": "README.md",
    "certificates.txt": "certificates.sh",
    "server_app.txt": "fleet/server_app.py",
    "client_app.txt": "fleet/client_app.py",
    "data.txt": "fleet/data.py",
    "init.txt": "fleet/__init__.py",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command."""
    parser = argparse.ArgumentParser(prog="python -m keras_lp.federated.fleet")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    init = commands.add_parser("init", help="write a Flower app for a model")
    init.add_argument("folder", type=Path, help="a new folder")
    init.add_argument("--model", type=Path, required=True, help="a compiled .keras model")
    init.add_argument("--rounds", type=int, default=10, help="defaults to 10")
    node = commands.add_parser("node")  # started by the ClientApp
    node.add_argument("folder", type=Path)
    node.add_argument("address", type=Path)
    node.add_argument("--parent", type=int, required=True)
    given = parser.parse_args(arguments)
    if given.command == "node":
        from keras_lp.federated.fleet.process import serve

        serve(given.folder, given.address, given.parent)
        return 0
    try:
        write_app(given.folder, given.model, given.rounds)
    except (OSError, ValueError, TypeError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{given.folder}: edit fleet/data.py, then follow README.md")
    return 0


def write_app(folder: Path, model: Path, rounds: int) -> None:
    """Writes an app folder with a copy of the model.

    Raises:
        ValueError: if the folder exists, or the model cannot train in a fleet.
    """
    import keras

    from keras_lp.federated.averaging import FederatedAveraging
    from keras_lp.utils.arguments import check_positive
    from keras_lp.utils.files import check_archive

    check_positive("rounds", rounds, integer=True)
    folder = folder.expanduser().absolute()
    if folder.exists():
        raise ValueError(f"`FOLDER` must be new. Received: {folder}, which exists.")
    if not model.is_file():
        raise ValueError(f"`--model` must be a .keras file. Received: {model}, which is not.")
    check_archive(model)
    loaded = keras.saving.load_model(model)
    if not loaded.compiled:
        raise ValueError(f"The model must be compiled. Received: {model}, which is not.")
    FederatedAveraging(loaded)  # raises an error if clients cannot train it
    name = "".join(c if c.isalnum() else "-" for c in folder.name.lower()).strip("-") or "fleet"
    values = {"name": name, "rounds": rounds, "folder": str(folder)}
    for source, target in FILES.items():
        text = (resources.files("keras_lp.federated.fleet") / "template" / source).read_text()
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(text).substitute(values))
    (folder / "certificates.sh").chmod(0o755)
    shutil.copy(model, folder / "model.keras")


if __name__ == "__main__":
    raise SystemExit(main())
