"""What do the four paradigms reach on one data set, over several seeds?

    python benchmarks/paradigms.py --data digits --seeds 3
    TFDS_DATA_DIR=... python benchmarks/paradigms.py --data fashion_mnist --seeds 3

The comparison is that of `examples/quickstart.py`: a small network is trained on the first half of
the classes, then each paradigm learns the other half from 100 labelled pictures, with the same
number of epochs; multitask has a label of one of its two tasks for each picture. The rates were
chosen once, on training pictures of digits outside these 100, and never on a test split. A seed
changes the 100 pictures, the network and the clients.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from lib.arguments import command, parser
from lib.machine import machine
from lib.results import page, table, write
from lib.scores import deviation, mean_and_deviation

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import quickstart


def run(data: str, data_dir: str | None, seeds: int) -> list[list[quickstart.Row]]:
    """Returns the rows of each seed."""
    runs = []
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        problem = quickstart.problem(data, seed, data_dir)
        with tempfile.TemporaryDirectory() as folder:
            pretrained = Path(folder) / "pretrained.keras"
            seconds = quickstart.pretrain(problem, pretrained, seed)
            print(f"\nSeed {seed}: pretrained in {seconds:.0f} s", flush=True)
            rows, _ = quickstart.compare(problem, pretrained, seed)
        quickstart.print_table(rows)
        runs.append(rows)
    return runs


def report(results: dict[str, Any]) -> str:
    runs, data, rows = results["runs"], results["data"], []
    for of in zip(*runs, strict=True):
        first = of[0]
        accuracy = mean_and_deviation([100 * row["accuracy"] for row in of])
        seconds = statistics.median(row["seconds"] for row in of)
        sent = f"{first['bytes_sent']:,.0f}" if first["bytes_sent"] else "-"
        sizes = f"{first['trainable']:,}", f"{first['total']:,}"
        rows.append([first["paradigm"], accuracy, *sizes, f"{seconds:.1f}", sent])
    header = ["paradigm", "test accuracy, %", "trainable", "parameters", "seconds", "bytes sent"]
    return page(
        title(data),
        results["command"],
        results["machine"],
        __doc__,
        f"Accuracy: mean and standard deviation over {len(runs)} seeds; seconds: median, on the "
        "100 pictures alone.",
        table(header, rows),
        f"![Accuracy by paradigm]({file_of(data)}.png)",
    )


def title(data: str) -> str:
    return f"{data}: half of the classes from {quickstart.LABELLED} labelled pictures"


def file_of(data: str) -> str:
    return f"paradigms_{data.replace('/', '_')}"


def plot(runs: list[list[quickstart.Row]], path: Path, title: str) -> None:
    rows, errors = [], []
    for of in zip(*runs, strict=True):
        accuracies = [row.accuracy for row in of]
        rows.append(dataclasses.replace(of[0], accuracy=statistics.mean(accuracies)))
        errors.append(100 * deviation(accuracies))
    lines = f"bars: mean, lines: standard deviation over {len(runs)} seeds"
    quickstart.plot(rows, path, title, errors, lines)


def main() -> None:
    arguments = parser(__doc__, seeds=3, data_dir=True)
    arguments.add_argument("--data", default="digits", help="digits, or a TFDS name of pictures")
    given = arguments.parse_args()
    runs = run(given.data, given.data_dir, given.seeds)
    results = {
        "command": command(__file__, given, "data", "seeds"),
        "machine": machine("tensorflow-federated"),
        "data": given.data,
        "runs": [[vars(row) for row in rows] for rows in runs],
    }
    stem = given.out / file_of(given.data)
    write(stem, report(results), results)
    plot(runs, stem.with_suffix(".png"), title(given.data))


if __name__ == "__main__":
    main()
