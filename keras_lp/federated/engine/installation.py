"""Checks the dependencies of TensorFlow Federated and lists the commands to install them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shlex
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements-tff.txt"

# Runtime dependencies of TFF as modules. The extra `federated` installs them.
_RUNTIME_MODULES = (
    "attrs",
    "cachetools",
    "tree",
    "portpicker",
    "tqdm",
    "typing_extensions",
    "dp_accounting",
    "google.api",
)
_TFF_MODULES = ("tensorflow_federated", "tensorflow_privacy", "tensorflow_model_optimization")


def missing_modules() -> list[str]:
    """Returns the modules that TFF needs and that are not installed."""
    return [name for name in (*_RUNTIME_MODULES, *_TFF_MODULES) if not is_installed(name)]


def install_commands() -> list[str]:
    """Returns the shell commands that install the missing modules for this interpreter."""
    missing = missing_modules()
    commands = []
    python = shlex.quote(sys.executable)
    pip = f"{python} -m pip install"
    if missing and not _has_pip():
        commands.append(f"{python} -m ensurepip")
    if set(missing) & set(_RUNTIME_MODULES):
        commands.append(f"{pip} 'keras_lp[federated]'")
    if set(missing) & set(_TFF_MODULES):
        commands.append(
            f"{pip} --no-deps --ignore-requires-python -r {shlex.quote(str(REQUIREMENTS))}"
        )
    return commands


def unsupported_platform() -> str | None:
    """Returns the reason why TFF cannot run on this machine, or None."""
    if sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64"):
        return None
    return (
        "TensorFlow Federated has wheels for Linux x86-64 only. Received: "
        f"{platform.system()} {platform.machine()}. Run federated learning in a Linux container "
        "or virtual machine. The rest of keras_lp works on this machine."
    )


def is_installed(name: str) -> bool:
    """Whether a module can be imported. Does not import it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def _has_pip() -> bool:
    try:  # not by `find_spec`: setuptools hooks into that name and warns
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
