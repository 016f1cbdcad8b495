"""All four paradigms on one data set, over several seeds.

    python benchmarks/paradigms.py --data digits --seeds 3
    TFDS_DATA_DIR=... python benchmarks/paradigms.py --data fashion_mnist --seeds 3

The comparison is that of `examples/quickstart.py`: a small network is trained on the first half of
the classes, then every paradigm learns the other half from 100 labelled pictures, with the same
number of epochs; multitask sees a label of one of its two tasks for each picture. The rates were
chosen once, on training pictures of digits outside these 100, and never on a test split. Writes a
table (Markdown), the numbers (JSON) and a plot (PNG).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import quickstart  # noqa: E402
from common import RESULTS, machine, write  # noqa: E402


def run(data: str, data_dir: str | None, seeds: int) -> list[list[quickstart.Row]]:
    """Returns the rows of every seed."""
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


def summary(runs: list[list[quickstart.Row]]) -> tuple[list[quickstart.Row], list[float]]:
    """Returns mean rows (the median of the seconds) and the accuracies' standard deviations."""
    rows, deviations = [], []
    for of_paradigm in zip(*runs, strict=True):
        accuracies = [row.accuracy for row in of_paradigm]
        rows.append(
            dataclasses.replace(
                of_paradigm[0],
                accuracy=statistics.mean(accuracies),
                seconds=statistics.median(row.seconds for row in of_paradigm),
            )
        )
        deviations.append(statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0)
    return rows, deviations


def markdown(
    data: str, seeds: int, rows: list[quickstart.Row], deviations: list[float], title: str
) -> str:
    """The table, with the command and the machine."""
    lines = [
        f"# {title}",
        "",
        f"    python benchmarks/paradigms.py --data {data} --seeds {seeds}",
        "",
        f"Machine: {machine('tensorflow-federated')}.",
        "",
        "| paradigm | test accuracy, % | trainable | parameters | seconds | bytes sent |",
        "|---|---|---|---|---|---|",
    ]
    for row, deviation in zip(rows, deviations, strict=True):
        sent = f"{row.bytes_sent:,.0f}" if row.bytes_sent else "-"
        accuracy = f"{100 * row.accuracy:.1f} ± {100 * deviation:.1f}"
        lines.append(
            f"| {row.paradigm} | {accuracy} | {row.trainable:,} | {row.total:,} "
            f"| {row.seconds:.1f} | {sent} |"
        )
    lines += [
        "",
        f"Accuracy: mean and standard deviation over {seeds} seeds (the 100 pictures, the network "
        "and the clients change); seconds: median, on the 100 pictures alone. Multitask has a "
        "label of one of its two tasks for each picture. The learning rates were chosen on digits, "
        "on training pictures outside the 100.",
        "",
        f"![Accuracy by paradigm](paradigms_{data.replace('/', '_')}.png)",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, or a TFDS name of pictures")
    parser.add_argument("--data-dir", help="where TFDS keeps its data (else TFDS_DATA_DIR)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()

    runs = run(arguments.data, arguments.data_dir, arguments.seeds)
    rows, deviations = summary(runs)
    stem = arguments.out / f"paradigms_{arguments.data.replace('/', '_')}"
    title = f"{arguments.data}: half of the classes from {quickstart.LABELLED} labelled pictures"
    table = markdown(arguments.data, arguments.seeds, rows, deviations, title)
    numbers = {
        "machine": machine("tensorflow-federated"),
        "runs": [[vars(row) for row in rows] for rows in runs],
    }
    write(stem, table, numbers)
    errors = [100 * deviation for deviation in deviations]
    quickstart.plot(rows, stem.with_suffix(".png"), title, errors)


if __name__ == "__main__":
    main()
