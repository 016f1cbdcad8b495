"""Which way to learn is best, on the same data, from the same network, at the same cost?

    python -m benchmarks --quick                                  # digits, about 3 minutes
    TFDS_DATA_DIR=... python -m benchmarks --data digits fashion_mnist --seeds 3
    python -m benchmarks --only LoRA                              # some ways; the others are kept

A small network is trained on half of the classes of a data set. Each way then learns the other half
from a few labelled examples, with the same number of epochs and the settings of
`examples/quickstart.py`, which were chosen on training examples of digits. Multitask has one of two
labels of each example. A seed changes the examples, the network and the clients. Accuracy is that
on the test split: mean and standard deviation over the seeds; other figures are medians. Forgotten:
how much lower a solved head for the source classes is on the network afterwards. Bytes: of all
updates and weights, to and from all clients. Times are processor seconds of all cores.

It writes `report.html`, `report.md` and `report.json`. Runs are kept in `report.full.json`, or
`report.quick.json`, and are not run again unless the code of the comparison changed: a comparison
that was stopped goes on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(given: list[str] | None = None) -> None:
    """Runs the comparison with options, by default those of the command line."""
    folder = Path(__file__).resolve().parent
    sys.path[:0] = [str(folder), str(folder.parent / "examples")]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if given is None:
        from quiet import hide_machine_notes

        hide_machine_notes()
    from lib.compare import compare

    compare(__doc__ or "", given)


if __name__ == "__main__":
    main()
