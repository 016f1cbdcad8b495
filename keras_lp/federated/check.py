"""Checks whether federated learning works on this machine.

Runs one real round, or prints the commands that install missing packages. Installs nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import time
from collections.abc import Sequence

from keras_lp.federated.engine import installation


def main(arguments: Sequence[str] = ()) -> int:
    """Prints the result of the check; returns 0 if a round ran, else 1."""
    argparse.ArgumentParser(
        prog="python -m keras_lp.federated.check", description=__doc__
    ).parse_args(list(arguments))
    print(f"Python {platform.python_version()} at {sys.executable}, {platform.platform()}")
    for name in ("keras", "tensorflow", "tensorflow-federated"):
        print(f"{name} {_version(name)}")
    reason = installation.unsupported_platform()
    if reason:
        print(f"Not supported: {reason}")
        return 1
    missing = installation.missing_modules()
    if missing:
        print(f"Missing: {', '.join(missing)}. Run:")
        for command in installation.install_commands():
            print(f"  {command}")
        return 1
    start = time.perf_counter()
    try:
        change = _one_round()
    except Exception as error:  # the user runs the check to see any error
        print(f"Installed, but a round failed: {type(error).__name__}: {error}")
        return 1
    print(
        f"One federated round over 2 clients ran in {time.perf_counter() - start:.1f} s and "
        f"changed the weights by {change:.3f}. Federated learning works on this machine."
    )
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _one_round() -> float:
    """Runs one round of a tiny model; returns the largest change of its weights."""
    import keras
    import numpy as np

    from keras_lp.federated.averaging import FederatedAveraging

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    before = model.get_weights()
    x = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.5]], "float32")
    clients = {"a": (x[:2], x[:2].sum(1)), "b": (x[2:], x[2:].sum(1))}
    FederatedAveraging(model).fit(clients, rounds=1, verbose=0)
    return max(
        float(np.abs(new - old).max()) for new, old in zip(model.get_weights(), before, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
