"""How should a feature map become a vector? Average, maximum or all of it.

    TFDS_DATA_DIR=... python benchmarks/pooling.py --mobilenet mobilenet_2_5_224_tf_no_top.h5 \
        --mobilenetv2 mobilenet_v2_1.0_224_from_int8_no_top.h5 --cifar10 cifar10_subset.npz

The head is solved (`lp.fit_head`) on frozen features of four small networks, each trained for
another task first, and of two large ones with ImageNet weights. The accuracy is that on pictures
that nothing was trained on. A seed changes the training pictures.

Writes a table (Markdown) and all runs (JSON).
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from common import RESULTS, machine, table, write
from defaults_cases import cifar10_problem
from studies import draw, xray_problem
from xray import pretrain, script_problem

import keras_lp as lp

POOLINGS = ("avg", "max", "flatten")
SIZES = (100, 500)
TESTED = 500  # pictures

Parts = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def digits(channels: int) -> tuple[keras.Model, Parts]:
    """A network for the embedded digits 0 to 4; the task are 5 to 9."""
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    layers = [
        keras.Input((8, 8, 1)),
        keras.layers.Rescaling(1 / 255),
        keras.layers.Conv2D(channels, 3, padding="same", activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(channels, 3, padding="same", activation="relu"),
    ]
    backbone = _trained(keras.Sequential(layers), x[y < 5], y[y < 5], 5, epochs=10)
    x, y = x[y >= 5], y[y >= 5] - 5
    return backbone, ((x[:600], y[:600]), (x[600:], y[600:]))


def clothes(data_dir: str | None) -> tuple[keras.Model, Parts]:
    """A network for the first five classes of fashion_mnist; the task are the others."""
    parts = [
        lp.load_dataset("fashion_mnist", split=split, batch_size=-1, data_dir=data_dir)
        for split in ("train", "test")
    ]
    layers = [keras.Input((28, 28, 1)), keras.layers.Rescaling(1 / 255)]
    for channels in (16, 32):
        layers += [
            keras.layers.Conv2D(channels, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
        ]
    x, y = parts[0]
    backbone = _trained(keras.Sequential(layers), x[y < 5], y[y < 5], 5, epochs=2)
    return backbone, tuple((x[y >= 5], y[y >= 5] - 5) for x, y in parts)


def _trained(
    backbone: keras.Model, x: np.ndarray, y: np.ndarray, classes: int, epochs: int
) -> keras.Model:
    keras.utils.set_random_seed(0)
    options = {"pretrained": False, "trainable": "all", "pooling": "flatten"}
    lp.transfer_model(backbone, classes, **options).fit(x, y, epochs=epochs, verbose=0)
    return backbone


def cases(arguments: argparse.Namespace, folder: Path) -> list[tuple[str, Callable, Parts]]:
    """The name, the builder and the training and test pictures of each case."""
    found: list[tuple[str, Callable, Parts]] = []
    for channels in (8, 32):
        backbone, parts = digits(channels)
        found.append((f"digits, {channels} channels", _builder(backbone, 5), parts))
    backbone, parts = clothes(arguments.data_dir)
    found.append(("fashion_mnist", _builder(backbone, 5), parts))
    pretrain("mnist", arguments.data_dir, folder / "mnist.keras")
    problem = script_problem("cmaterdb/bangla", arguments.data_dir)
    build = _builder(folder / "mnist.keras", 10)
    found.append(("mnist to bangla", build, (problem.train, problem.test)))
    pictures = [cifar10_problem(arguments.cifar10), xray_problem(arguments.data_dir)]
    networks = [
        ("MobileNet", arguments.mobilenet, {"alpha": 0.25}),
        ("MobileNetV2", arguments.mobilenetv2, {}),
    ]
    for name, weights, options in networks:
        for problem in pictures:
            build = _builder(
                name,
                len(problem.labels),
                weights=weights,
                backbone_kwargs=options,
                input_shape=problem.train[0].shape[1:],
                image_size=96,
            )
            found.append((f"{name}, {problem.name}", build, (problem.train, problem.test)))
    return found


def _builder(backbone: Any, classes: int, **options: Any) -> Callable[..., lp.Model]:
    return lambda pooling: lp.transfer_model(backbone, classes, pooling=pooling, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mobilenet", type=Path, required=True)
    parser.add_argument("--mobilenetv2", type=Path, required=True)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "pooling")
    arguments = parser.parse_args()
    start, runs = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, build, (train, test) in cases(arguments, Path(folder)):
            test = tuple(part[:TESTED] for part in test)
            for pooling in POOLINGS:
                model = build(pooling)
                shape = model.get_layer("pooling").input.shape[1:]
                for size in SIZES:
                    for seed in range(arguments.seeds):
                        data, _ = draw(train, size, seed)
                        history = lp.fit_head(model, data, verbose=0).history
                        accuracy = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
                        runs.append(
                            {
                                "case": name,
                                "map": "x".join(map(str, shape)),
                                "numbers": math.prod(shape),
                                "pooling": pooling,
                                "examples": size,
                                "seed": seed,
                                "accuracy": accuracy,
                                "l2": history["l2"][0],
                            }
                        )
                print(name, pooling, f"{time.time() - start:.0f} s", flush=True)
    results = {"machine": machine(), "seconds": round(time.time() - start), "runs": runs}
    write(arguments.out, markdown(results), results)


def markdown(results: dict[str, Any]) -> str:
    runs, rows = results["runs"], []
    for case in dict.fromkeys(run["case"] for run in runs):
        for size in SIZES:
            own = [run for run in runs if run["case"] == case and run["examples"] == size]
            row = [case, own[0]["map"], f"{own[0]['numbers']:,}", str(size)]
            for pooling in POOLINGS:
                values = [100 * run["accuracy"] for run in own if run["pooling"] == pooling]
                row.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}")
            rows.append(row)
    header = ["case", "feature map", "numbers", "examples", *POOLINGS]
    return "\n\n".join(
        [
            "# Pooling: how a feature map becomes a vector",
            __doc__.split("\n\n")[1],
            f"Machine: {results['machine']}. All of it took {results['seconds'] / 60:.0f} minutes.",
            "Test accuracy of a solved head in per cent, mean and deviation over the seeds.",
            table(header, rows),
        ]
    )


if __name__ == "__main__":
    main()
