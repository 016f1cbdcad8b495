"""How long transfer learning takes, how much memory, and how long the import takes.

    python benchmarks/transfer_speed.py --pictures cifar10_subset.npz \\
        --mobilenet mobilenet_2_5_224_tf_no_top.h5 --mobilenetv2 mobilenet_v2_no_top.h5

2,000 pictures, resized to 96x96 beforehand, 10 epochs in batches of 32, Adam at 1e-3. Compared are
the recipe of Keras's guide (`base.trainable = False`, `fit`), KerasHub's `ImageClassifier` over
the same frozen network, features cached by hand (`predict`, then `fit` of a Dense layer),
`lp.transfer_model`, and the limit: one `predict` of the features at the best batch size and the
epochs of the head in a bare loop of `tf.function` calls. Each time holds `fit` (or what stands for
it) on a new model, tracing included. All ways take turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table, write

import keras_lp as lp

SIZE, BATCH, EPOCHS, TRAIN, TEST = 96, 32, 10, 2000, 2000
NETWORKS = {"MobileNet": 0.25, "MobileNetV2": 1.0}  # with their alpha
GOALS = {"MobileNet": 0.20, "MobileNetV2": 0.13}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

Arrays = tuple[np.ndarray, np.ndarray]
Predict = Callable[[np.ndarray], np.ndarray]


def network(name: str, weights: str) -> keras.Model:
    """The frozen network of the other ways, with its preprocessing and its pooling."""
    base = getattr(keras.applications, name)(
        input_shape=(SIZE, SIZE, 3), include_top=False, weights=weights, alpha=NETWORKS[name]
    )
    base.trainable = False
    return base


def features_of(base: keras.Model) -> keras.Model:
    """The network from raw pictures to pooled features."""
    inputs = keras.Input((SIZE, SIZE, 3))
    scaled = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    features = keras.layers.GlobalAveragePooling2D()(base(scaled, training=False))
    return keras.Model(inputs, features)


def recipe(name: str, weights: str, x: np.ndarray, y: np.ndarray) -> tuple[float, Predict]:
    """The recipe of Keras's guide to transfer learning."""
    below = features_of(network(name, weights))
    model = keras.Model(below.input, keras.layers.Dense(10)(below.output))
    model.compile("adam", LOSS, metrics=["accuracy"])
    start = time.perf_counter()
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return time.perf_counter() - start, lambda z: model.predict(z, verbose=0)


def kerashub(name: str, weights: str, x: np.ndarray, y: np.ndarray) -> tuple[float, Predict]:
    """KerasHub's classifier, on pictures that were rescaled beforehand."""
    import keras_hub

    model = keras_hub.models.ImageClassifier(
        backbone=network(name, weights), num_classes=10, preprocessor=None, pooling="avg"
    )
    model.compile("adam", LOSS, metrics=["accuracy"])
    x = x.astype("float32") / 127.5 - 1
    start = time.perf_counter()
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    seconds = time.perf_counter() - start
    return seconds, lambda z: model.predict(z.astype("float32") / 127.5 - 1, verbose=0)


def by_hand(name: str, weights: str, x: np.ndarray, y: np.ndarray) -> tuple[float, Predict]:
    """Features by `predict`, then `fit` of a Dense layer on them."""
    below = features_of(network(name, weights))
    head = keras.Sequential([keras.Input(below.output_shape[1:]), keras.layers.Dense(10)])
    head.compile("adam", LOSS, metrics=["accuracy"])
    start = time.perf_counter()
    head.fit(below.predict(x, verbose=0), y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    seconds = time.perf_counter() - start
    return seconds, lambda z: head.predict(below.predict(z, verbose=0), verbose=0)


def ours(name: str, weights: str, x: np.ndarray, y: np.ndarray) -> tuple[float, Predict]:
    """`lp.transfer_model`."""
    model = lp.transfer_model(
        name, 10, input_shape=(SIZE, SIZE, 3), weights=weights,
        backbone_kwargs={"alpha": NETWORKS[name]},
    )  # fmt: skip
    start = time.perf_counter()
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return time.perf_counter() - start, lambda z: model.predict(z, verbose=0)


def limit(name: str, weights: str, x: np.ndarray, y: np.ndarray) -> tuple[float, Predict]:
    """One pass of the network at the best batch size, then the head in a bare loop."""
    passes = {}
    for size in (32, 64, 128, 256):
        below = features_of(network(name, weights))
        start = time.perf_counter()
        features = below.predict(x, batch_size=size, verbose=0)
        passes[size] = time.perf_counter() - start
    head = keras.layers.Dense(10)
    head.build(features.shape)
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(head.trainable_variables)
    signature = (tf.TensorSpec((None, features.shape[1])), tf.TensorSpec((None,), tf.int64))

    @tf.function(input_signature=signature)
    def step(batch: tf.Tensor, labels: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = LOSS(labels, head(batch))
        gradients = tape.gradient(loss, head.trainable_variables)
        optimizer.apply_gradients(zip(gradients, head.trainable_variables, strict=True))

    rng = np.random.default_rng(0)
    labels = y.astype("int64")
    start = time.perf_counter()
    for _ in range(EPOCHS):
        order = rng.permutation(len(features))
        for i in range(0, len(features), BATCH):
            rows = order[i : i + BATCH]
            step(tf.constant(features[rows]), tf.constant(labels[rows]))
    seconds = time.perf_counter() - start + min(passes.values())
    return seconds, lambda z: np.asarray(head(below.predict(z, verbose=0)))


WAYS = {
    "Keras guide's recipe": recipe,
    "KerasHub ImageClassifier, frozen": kerashub,
    "Keras, features cached by hand": by_hand,
    "keras_lp.transfer_model": ours,
    "limit: one pass and a bare loop": limit,
}


def speed(weights: dict[str, str], train: Arrays, test: Arrays, repeats: int) -> dict:
    """Returns seconds and test accuracies of every network and way, one a repeat (its seed)."""
    results = {}
    for name in weights:
        runs = results[name] = {way: {"seconds": [], "accuracy": []} for way in WAYS}
        for seed in range(repeats):
            for way, run in WAYS.items():
                keras.backend.clear_session()
                keras.utils.set_random_seed(seed)
                seconds, predict = run(name, weights[name], *train)
                accuracy = float(np.mean(predict(test[0]).argmax(-1) == test[1]))
                runs[way]["seconds"].append(seconds)
                runs[way]["accuracy"].append(accuracy)
                print(f"{name}, {way}: {seconds:.1f} s, {100 * accuracy:.1f} %", flush=True)
    return results


MEMORY = """
import os, sys, threading, time
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
import keras_lp as lp

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 2**20  # GiB

peak = 0.0

def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.01)

weights, pooling, memory, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def picture(i):
    pixels = tf.random.stateless_uniform((96, 96, 3), [i, 0], 0, 256, tf.int32)
    return tf.cast(pixels, tf.uint8), i % 10

model = lp.transfer_model(
    "MobileNet", 10, input_shape=(96, 96, 3), weights=weights, pooling=pooling,
    backbone_kwargs={"alpha": 0.25}, cache_features=True, cache_memory=memory,
)
before = resident()
threading.Thread(target=watch, daemon=True).start()
model.fit(tf.data.Dataset.range(count).map(picture).batch(32), epochs=2, verbose=0)
print(before, peak - before)
"""


def memory(weights: str, count: int) -> list[dict]:
    """Peak memory of a data set of many pictures, above that of the model."""
    rows = []
    for pooling, limit in (("avg", 2**28), ("flatten", 2**26)):
        numbers = 256 if pooling == "avg" else 9 * 256
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY, weights, pooling, str(limit),
             str(count)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        before, above = map(float, result.stdout.split()[-2:])
        row = {"pooling": pooling, "cache_memory": limit, "features": 4 * numbers * count}
        rows.append({**row, "model_gib": before, "above_gib": above})
        print(rows[-1], flush=True)
    return rows


def imports(repeats: int) -> dict[str, list[float]]:
    """Seconds of `import keras` and `import keras_lp`, each in processes of its own."""
    seconds: dict[str, list[float]] = {"keras": [], "keras_lp": []}
    for _ in range(repeats + 1):
        for package in seconds:
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", f"import {package}"], check=True, capture_output=True
            )
            seconds[package].append(time.perf_counter() - start)
    return {package: values[1:] for package, values in seconds.items()}  # the first warms the disk


def markdown(results: dict, memories: list[dict], imported: dict, command: str) -> str:
    """The report."""
    lines = [
        "# Transfer learning: time, memory and import",
        "",
        f"    {command}",
        "",
        f"Machine: {machine('keras-hub')}.",
        "",
        f"{TRAIN:,} pictures of {SIZE}x{SIZE}, {EPOCHS} epochs, batches of {BATCH}; the times of "
        "`fit` on a new model, tracing included, median of all repeats, in turn; test accuracy: "
        "mean and standard deviation of as many seeds.",
        "",
    ]
    rows = []
    for name, runs in results.items():
        base = statistics.median(runs["Keras guide's recipe"]["seconds"])
        bound = statistics.median(runs["limit: one pass and a bare loop"]["seconds"])
        for way, run in runs.items():
            seconds = statistics.median(run["seconds"])
            mean = 100 * statistics.mean(run["accuracy"])
            deviation = 100 * statistics.stdev(run["accuracy"]) if len(run["accuracy"]) > 1 else 0
            goal = f" (goal {GOALS[name]:.2f})" if run is runs["keras_lp.transfer_model"] else ""
            rows.append(
                [f"{name} {NETWORKS[name]}", way, f"{seconds:.1f}", f"{seconds / base:.2f}{goal}",
                 f"{seconds / bound:.2f}", f"{mean:.1f} ± {deviation:.1f}"]
            )  # fmt: skip
    header = ["network", "way", "seconds", "of the recipe", "of the limit", "test accuracy, %"]
    lines += [table(header, rows), ""]
    if memories:
        lines += [
            "Peak memory above the model's, a `tf.data.Dataset` of pictures and "
            "`cache_features=True`, in a process of its own:",
            "",
            table(
                ["pooling", "features, MiB", "cache_memory, MiB", "peak above, GiB (goal 1.5)"],
                [
                    [
                        row["pooling"],
                        f"{row['features'] / 2**20:,.0f}",
                        f"{row['cache_memory'] / 2**20:,.0f}",
                        f"{row['above_gib']:.2f}",
                    ]
                    for row in memories
                ],
            ),
            "",
        ]
    keras_s, ours_s = (statistics.median(imported[name]) for name in ("keras", "keras_lp"))
    lines += [
        f"`import keras_lp` takes {ours_s:.2f} s and `import keras` {keras_s:.2f} s: "
        f"{ours_s / keras_s:.2f}x (goal 1.05), medians of {len(imported['keras'])} processes each, "
        "in turn.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pictures", type=Path, required=True, help="npz: train_images, train_labels, test_..."
    )
    parser.add_argument("--mobilenet", help="weights file of MobileNet 0.25 without its top")
    parser.add_argument("--mobilenetv2", help="weights file of MobileNetV2 without its top")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pictures-in-memory", type=int, default=50_000, help="0 leaves it out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()

    stored = np.load(arguments.pictures)
    arrays = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        images = stored[f"{split}_images"][:count]
        images = np.asarray(keras.ops.image.resize(images.astype("float32"), (SIZE, SIZE)))
        arrays[split] = (images.round().astype("uint8"), stored[f"{split}_labels"][:count])
    weights = {"MobileNet": arguments.mobilenet, "MobileNetV2": arguments.mobilenetv2}
    weights = {name: file for name, file in weights.items() if file}

    imported = imports(7)
    results = speed(weights, arrays["train"], arrays["test"], arguments.repeats)
    count = arguments.pictures_in_memory
    memories = memory(weights["MobileNet"], count) if count and "MobileNet" in weights else []
    names = {flag: Path(file).name for flag, file in vars(arguments).items()
             if flag in ("pictures", "mobilenet", "mobilenetv2") and file}  # fmt: skip
    command = "python benchmarks/transfer_speed.py " + " ".join(
        f"--{flag} {file}" for flag, file in names.items()
    )
    numbers = {"machine": machine("keras-hub"), "speed": results, "memory": memories,
               "import": imported}  # fmt: skip
    write(
        arguments.out / "transfer_speed",
        markdown(results, memories, imported, command),
        numbers,
    )


if __name__ == "__main__":
    main()
