r"""Are the loaders as fast as what a user would write by hand?

    TFDS_DATA_DIR=... python benchmarks/data.py

An epoch over fashion_mnist (60,000 images, batches of 32), read and not trained on:

- `lp.load_dataset`, and hand-written pipelines over `tfds.load`: without a cache, with the decoded
  examples in a cache, and with the batches in a cache, the fastest. The first pass fills the cache.

10,000 PNG files of 64 by 64 in ten folders: creating the data set and one epoch of batches of 32,
resized to 96 by 96, with `lp.load_folder` (all files in the training split) and with
`keras.utils.image_dataset_from_directory`. `load_folder` also looks for broken files and for copies
in other splits.

Each way in turn, in another order in each round; the ratio is the median of the ratios of the
rounds. Seconds on the clock.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from lib.arguments import command, parser
from lib.machine import machine
from lib.results import RESULTS, page, table, write
from lib.timing import by_kind, in_turn, ratio

import keras_lp as lp

BATCH, FILES, SIZE = 32, 10_000, 96
OURS, HAND, KERAS = "lp.load_dataset", "batches cached by hand", "image_dataset_from_directory"
FOLDER = "lp.load_folder"


def epoch(dataset: Any) -> None:
    for _ in dataset:
        pass


def pipelines(data_dir: str | None) -> dict[str, Callable[[], None]]:
    """Returns an epoch of each data set, which each call reads again."""
    import tensorflow_datasets as tfds

    def load() -> Any:
        return tfds.load("fashion_mnist", split="train", as_supervised=True, data_dir=data_dir)

    made = {
        OURS: lp.load_dataset("fashion_mnist", split="train", data_dir=data_dir),
        "no cache": load().batch(BATCH).prefetch(tf.data.AUTOTUNE),
        "examples cached by hand": load().cache().batch(BATCH).prefetch(tf.data.AUTOTUNE),
        HAND: load().batch(BATCH).cache().prefetch(tf.data.AUTOTUNE),
    }
    return {name: lambda dataset=dataset: epoch(dataset) for name, dataset in made.items()}


def write_files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(FILES):
        path = folder / f"class{i % 10}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 255, (8, 8, 3), dtype="uint8")
        path.write_bytes(tf.io.encode_png(coarse.repeat(8, 0).repeat(8, 1)).numpy())


def folders(folder: Path) -> dict[str, Callable[[], None]]:
    """Returns the loading and an epoch of each way."""

    def ours() -> None:
        epoch(lp.load_folder(folder, split="train", validation=0, test=0, image_size=SIZE))

    def theirs() -> None:
        epoch(
            keras.utils.image_dataset_from_directory(
                folder, image_size=(SIZE, SIZE), batch_size=BATCH, verbose=False
            )
        )

    return {FOLDER: ours, KERAS: theirs}


def report(results: dict[str, Any]) -> str:
    blocks = []
    for title, ours, peer in (
        ("An epoch over fashion_mnist", OURS, HAND),
        ("10,000 files: load and one epoch", FOLDER, KERAS),
    ):
        times = results["seconds"][title]
        middle, low, high = ratio(times[ours], times[peer])
        rows = [[name, f"{np.median(values):.2f}"] for name, values in times.items()]
        blocks += [
            f"## {title}",
            table(["", "seconds"], rows),
            f"{ours} takes **{middle:.2f}x** of {peer} (quartiles {low:.2f} to {high:.2f}).",
        ]
    return page("Loaders", results["command"], results["machine"], __doc__, *blocks)


def main() -> None:
    arguments = parser(__doc__, data_dir=True, out=RESULTS / "data")
    arguments.add_argument("--rounds", type=int, default=7, help="of each way (default: 7)")
    given = arguments.parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        for title, calls in (
            ("An epoch over fashion_mnist", pipelines(given.data_dir)),
            ("10,000 files: load and one epoch", folders(folder)),
        ):
            times = in_turn(calls, given.rounds)
            seconds[title] = {name: by_kind(found)["clock"] for name, found in times.items()}
    results = {
        "command": command(__file__, given, "rounds"),
        "machine": machine("tensorflow-datasets"),
        "seconds": seconds,
    }
    write(given.out, report(results), results)


if __name__ == "__main__":
    main()
