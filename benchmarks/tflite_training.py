"""A training step on the device beside the same step in Keras on the processor.

    python benchmarks/tflite_training.py --mobilenet mobilenet_2_5_224_tf_no_top.h5

MobileNet 0.25 at 96x96, 10 classes, 16 examples a step, SGD: the head on features, the head on
pictures, and the whole network with BatchNormalization frozen. In turn, a step each: LiteRT on one
thread, `train_on_batch`, and one `tf.function` of the same step (what `fit` runs, without its
loop), both on all cores. Medians; without `--mobilenet` the weights are random, which does not
change the time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from common import RESULTS, machine, table, write

import keras_lp as lp
from keras_lp.backbones.features import KEY

BATCH = 16
GOAL = 2.0  # ms, of a head step on features


def network(weights: Path | None, trainable: str) -> keras.Model:
    model = lp.transfer_model(
        "MobileNet",
        10,
        input_shape=(96, 96, 3),
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
    x = rng.uniform(0, 255, (BATCH, 96, 96, 3)).astype("float32")
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
            "LiteRT, 1 thread": device_step(path, "train", {"x": x, "y": y}),
            **keras_steps(model, x, y),
        }
        if trainable == "head":
            features = rng.normal(size=(BATCH, 256)).astype("float32")
            steps["head, on features"] = {
                "LiteRT, 1 thread": device_step(
                    path, "train_features", {"features": features, "y": y}
                ),
                **keras_steps(network(weights, "head"), {KEY: features}, y),
            }
    return steps


def measure(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each step, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 3:
                seconds[name].append(1000 * (time.perf_counter() - start))
    return seconds


def main(mobilenet: Path | None, repeats: int, out: Path) -> None:
    rows, numbers = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for case, steps in cases(mobilenet, Path(folder)).items():
            measured = measure(steps, repeats)
            medians = {name: float(np.median(values)) for name, values in measured.items()}
            base = medians["LiteRT, 1 thread"]
            for name, median in medians.items():
                p95 = float(np.percentile(measured[name], 95))
                numbers[f"{case}: {name}"] = {"median_ms": median, "p95_ms": p95}
                rows.append([case, name, f"{median:.2f}", f"{p95:.2f}", f"{median / base:.1f}"])
    head = numbers["head, on features: LiteRT, 1 thread"]["median_ms"]
    header = ["what trains", "step of 16 examples", "median, ms", "p95, ms", "of LiteRT's"]
    source = "" if mobilenet is None else f" --mobilenet {mobilenet.name}"
    text = (
        "# A training step on the device\n\n"
        f"    python benchmarks/tflite_training.py{source} --repeats {repeats}\n\n"
        f"MobileNet 0.25, 96x96, SGD. {machine('ai-edge-litert')}. In turn, {repeats} steps "
        f"each after 3 that do not count.\n\n{table(header, rows)}\n\n"
        f"A head step on features takes {head:.2f} ms (goal: under {GOAL:g} ms)."
    )
    write(out / "tflite_training", text, numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mobilenet", type=Path, help="file of ImageNet weights without the top")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS)
    main(**vars(parser.parse_args()))
