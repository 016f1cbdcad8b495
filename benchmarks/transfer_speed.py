r"""How long does transfer learning take, how much memory, and how long the import?

    python benchmarks/transfer_speed.py --pictures cifar10_subset.npz \
        --mobilenet mobilenet_2_5_224_tf_no_top.h5 \
        --mobilenetv2 mobilenet_v2_1.0_224_from_int8_no_top.h5

2,000 pictures, resized to 96x96 beforehand, 10 epochs in batches of 32, Adam at 1e-3. Compared are
the recipe of Keras's guide (`base.trainable = False`, `fit`), KerasHub's `ImageClassifier` over
the same frozen network, features cached by hand (`predict`, then `fit` of a Dense layer),
`lp.transfer_model`, and the limit: one `predict` of the features at the best batch size and the
epochs of the head in a bare loop of `tf.function` calls. Each time is that of `fit` (or of what
does the same) on a new model, tracing included. All ways take turns; times are medians, accuracies
means and standard deviations over as many seeds, on the test split.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from lib import frozen
from lib.arguments import command, parser
from lib.frozen import ALPHAS, BATCH
from lib.machine import answer, machine, memory, own_process
from lib.networks import SIZE
from lib.problems import Arrays
from lib.results import page, table, write
from lib.scores import mean_and_deviation
from lib.timing import in_turn, seconds

import keras_lp as lp

TRAIN = TEST = 2000  # pictures
GOALS = {"MobileNet": 0.20, "MobileNetV2": 0.13}
RECIPE, OURS = "Keras guide's recipe", "keras_lp.transfer_model"
LIMIT = "limit: one pass and a bare loop"
WAYS = {
    RECIPE: frozen.recipe,
    "KerasHub ImageClassifier, frozen": frozen.kerashub,
    "Keras, features cached by hand": frozen.by_hand,
    OURS: frozen.ours,
    LIMIT: frozen.limit,
}


def speed(weights: dict[str, Path], train: Arrays, test: Arrays, repeats: int) -> dict[str, Any]:
    """Returns seconds and test accuracies of each network and way, one per repeat (its seed)."""
    results = {}
    for name in weights:
        runs = results[name] = {way: {"seconds": [], "accuracy": []} for way in WAYS}
        for seed in range(repeats):
            for way, make in WAYS.items():
                keras.backend.clear_session()
                keras.utils.set_random_seed(seed)
                fit, logits = make(name, weights[name], *train)
                runs[way]["seconds"].append(seconds(fit).clock)
                accuracy = float(np.mean(logits(test[0]).argmax(-1) == test[1]))
                runs[way]["accuracy"].append(accuracy)
                print(f"{name}, {way}: {runs[way]}", flush=True)
    return results


def measure_memory(weights: str, pooling: str, limit: str, count: str) -> None:
    """Answers with the GiB before `fit`, and the peak above that."""

    def picture(i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        pixels = tf.random.stateless_uniform((SIZE, SIZE, 3), [i, 0], 0, 256, tf.int32)
        return tf.cast(pixels, tf.uint8), i % 10

    options = {"backbone_kwargs": {"alpha": 0.25}, "cache_features": True}
    model = lp.transfer_model(
        "MobileNet", 10, input_shape=(SIZE, SIZE, 3), weights=weights, pooling=pooling,
        cache_memory=int(limit), **options,
    )  # fmt: skip
    before = memory() / 2**10
    data = tf.data.Dataset.range(int(count)).map(picture).batch(BATCH)
    model.fit(data, epochs=2, verbose=0)
    answer(before, memory("VmHWM") / 2**10 - before)


def memories(weights: Path, count: int) -> list[dict[str, Any]]:
    """Returns the peak memory of a data set of many pictures, above that of the model."""
    rows = []
    for pooling, limit in (("avg", 2**28), ("flatten", 2**26)):
        numbers = 256 if pooling == "avg" else 9 * 256
        found = own_process(__file__, "--memory-of", weights, pooling, limit, count)
        row = {"pooling": pooling, "cache_memory": limit, "features": 4 * numbers * count}
        rows.append({**row, **dict(zip(("model_gib", "above_gib"), found, strict=True))})
        print(rows[-1], flush=True)
    return rows


def imports(repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of `import keras` and `import keras_lp`, each in its own processes."""
    calls = {
        package: partial(own_process, "-c", f"import {package}; print('RESULT')")
        for package in ("keras", "keras_lp")
    }
    times = in_turn(calls, repeats)
    return {package: [one.clock for one in found] for package, found in times.items()}


def speed_rows(name: str, runs: dict[str, Any]) -> list[list[str]]:
    medians = {way: statistics.median(run["seconds"]) for way, run in runs.items()}
    rows = []
    for way, median in medians.items():
        goal = f" (goal {GOALS[name]:.2f})" if way == OURS else ""
        ratios = f"{median / medians[RECIPE]:.2f}{goal}", f"{median / medians[LIMIT]:.2f}"
        scores = mean_and_deviation(100 * np.array(runs[way]["accuracy"]))
        rows.append([f"{name} {ALPHAS[name]}", way, f"{median:.1f}", *ratios, scores])
    return rows


def memory_table(memories: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            row["pooling"],
            f"{row['features'] / 2**20:,.0f}",
            f"{row['cache_memory'] / 2**20:,.0f}",
            f"{row['above_gib']:.2f}",
        ]
        for row in memories
    ]
    header = ["pooling", "features, MiB", "cache_memory, MiB", "peak above, GiB (goal 1.5)"]
    return table(header, rows)


def report(results: dict[str, Any]) -> str:
    header = ["network", "way", "seconds", "of the recipe", "of the limit", "test accuracy, %"]
    rows = [row for name, runs in results["speed"].items() for row in speed_rows(name, runs)]
    blocks = [table(header, rows)]
    if results["memory"]:
        blocks += [
            "Peak memory above the model's, a `tf.data.Dataset` of pictures and "
            "`cache_features=True`, in a process of its own:",
            memory_table(results["memory"]),
        ]
    imported = results["import"]
    keras_s, ours_s = (statistics.median(imported[name]) for name in ("keras", "keras_lp"))
    blocks.append(
        f"`import keras_lp` takes {ours_s:.2f} s and `import keras` {keras_s:.2f} s: "
        f"{ours_s / keras_s:.2f}x (goal 1.05), medians of {len(imported['keras'])} processes each, "
        "in turn."
    )
    title = "Transfer learning: time, memory and import"
    return page(title, results["command"], results["machine"], __doc__, *blocks)


def main() -> None:
    if sys.argv[1:2] == ["--memory-of"]:
        measure_memory(*sys.argv[2:])
        return
    arguments = parser(__doc__)
    arguments.add_argument(
        "--pictures", type=Path, required=True, help="npz: train_images, train_labels, test_..."
    )
    arguments.add_argument("--mobilenet", type=Path, help="h5 file of MobileNet 0.25, no top")
    arguments.add_argument("--mobilenetv2", type=Path, help="h5 file of MobileNetV2, no top")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--pictures-in-memory", type=int, default=50_000, help="0 leaves it out")
    given = arguments.parse_args()

    arrays = {}
    with np.load(given.pictures) as stored:
        for split, count in (("train", TRAIN), ("test", TEST)):
            images = stored[f"{split}_images"][:count].astype("float32")
            images = np.asarray(keras.ops.image.resize(images, (SIZE, SIZE)))
            arrays[split] = images.round().astype("uint8"), stored[f"{split}_labels"][:count]
    weights = {"MobileNet": given.mobilenet, "MobileNetV2": given.mobilenetv2}
    weights = {name: file for name, file in weights.items() if file}
    count = given.pictures_in_memory if "MobileNet" in weights else 0
    results = {
        "command": command(__file__, given, "pictures", "mobilenet", "mobilenetv2"),
        "machine": machine("keras-hub"),
        "speed": speed(weights, arrays["train"], arrays["test"], given.repeats),
        "memory": memories(weights["MobileNet"], count) if count else [],
        "import": imports(7),
    }
    write(given.out / "transfer_speed", report(results), results)


if __name__ == "__main__":
    main()
