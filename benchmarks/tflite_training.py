"""What does a training step on the device cost, compared with the same step in Keras?

    python benchmarks/tflite_training.py --mobilenet mobilenet_2_5_224_tf_no_top.h5

MobileNet 0.25 at 96x96, 10 classes, 16 examples a step, SGD: the head on features, the head on
pictures, and the whole network with BatchNormalization frozen. LiteRT has one thread;
`train_on_batch` and one `tf.function` of the same step (what `fit` runs, without its loop) have all
cores. They take turns, a step each. Without `--mobilenet` the weights are random, which does not
change the time.
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
from ai_edge_litert.interpreter import Interpreter
from lib.arguments import command, parser
from lib.machine import machine
from lib.networks import SIZE
from lib.results import page, table, write
from lib.timing import in_turn

import keras_lp as lp
from keras_lp.backbones.features import KEY

BATCH = 16
DEVICE = "LiteRT, 1 thread"
GOAL = 2.0  # ms, of a head step on features


def network(weights: Path | None, trainable: str) -> keras.Model:
    model = lp.transfer_model(
        "MobileNet",
        10,
        input_shape=(SIZE, SIZE, 3),
        weights=None if weights is None else str(weights),
        backbone_kwargs={"alpha": 0.25},
        trainable="all",
    )
    return lp.finetune_model(
        model, trainable=trainable, layer_decay=1.0, optimizer=keras.optimizers.SGD(1e-3)
    )


def device_step(path: Path, signature: str, examples: dict[str, np.ndarray]) -> Callable[[], None]:
    runner = Interpreter(str(path), num_threads=1).get_signature_runner(signature)
    mask = np.ones(BATCH, "float32")
    return lambda: runner(**examples, mask=mask)


def keras_steps(model: keras.Model, x: object, y: np.ndarray) -> dict[str, Callable[[], object]]:
    data = tf.nest.map_structure(tf.constant, (x, y))
    step = tf.function(model.train_step)
    return {
        "Keras train_on_batch": lambda: model.train_on_batch(x, y),
        "Keras train_step in a tf.function": lambda: step(data)["loss"].numpy(),
    }


def cases(weights: Path | None, folder: Path) -> dict[str, dict[str, Callable[[], object]]]:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (BATCH, SIZE, SIZE, 3)).astype("float32")
    y = rng.integers(0, 10, BATCH).astype("int32")
    steps = {}
    for trainable in ("head", "all"):
        model = network(weights, trainable)
        path = folder / f"{trainable}.tflite"
        report = lp.export_trainable_tflite(
            model, path, trainable=trainable, batch_size=BATCH, learning_rate=1e-3
        )
        print(report)
        name = "head, on pictures" if trainable == "head" else "whole network"
        steps[name] = {
            DEVICE: device_step(path, "train", {"x": x, "y": y}),
            **keras_steps(model, x, y),
        }
        if trainable == "head":
            features = rng.normal(size=(BATCH, 256)).astype("float32")
            steps["head, on features"] = {
                DEVICE: device_step(path, "train_features", {"features": features, "y": y}),
                **keras_steps(network(weights, "head"), {KEY: features}, y),
            }
    return steps


def measure(mobilenet: Path | None, repeats: int) -> dict[str, dict[str, float]]:
    """Returns the milliseconds of each case and step."""
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        for case, steps in cases(mobilenet, Path(folder)).items():
            for name, found in in_turn(steps, repeats, warm_up=3).items():
                times = [1000 * one.clock for one in found]
                median, p95 = (float(np.percentile(times, share)) for share in (50, 95))
                numbers[f"{case}: {name}"] = {"median_ms": median, "p95_ms": p95}
    return numbers


def report(results: dict[str, Any]) -> str:
    rows = []
    numbers = {name: found for name, found in results.items() if isinstance(found, dict)}
    for name, found in numbers.items():
        case, step = name.split(": ")
        base = numbers[f"{case}: {DEVICE}"]["median_ms"]
        median, p95 = found["median_ms"], found["p95_ms"]
        rows.append([case, step, f"{median:.2f}", f"{p95:.2f}", f"{median / base:.1f}"])
    head = numbers[f"head, on features: {DEVICE}"]["median_ms"]
    return page(
        "A training step on the device",
        results["command"],
        results["machine"],
        __doc__,
        table(["what trains", "step of 16 examples", "median, ms", "p95, ms", "of LiteRT's"], rows),
        f"A head step on features takes {head:.2f} ms (goal: under {GOAL:g} ms).",
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--mobilenet", type=Path, help="h5 file of MobileNet, alpha 0.25, no top"
    )
    arguments.add_argument("--repeats", type=int, default=50, help="steps of each")
    given = arguments.parse_args()
    results = {
        "command": command(__file__, given, "mobilenet", "repeats"),
        "machine": machine("ai-edge-litert"),
        **measure(given.mobilenet, given.repeats),
    }
    write(given.out / "tflite_training", report(results), results)


if __name__ == "__main__":
    main()
