r"""How should a feature map become a vector? Average, maximum or all of it.

    TFDS_DATA_DIR=... python benchmarks/pooling.py --mobilenet mobilenet_2_5_224_tf_no_top.h5 \
        --mobilenetv2 mobilenet_v2_1.0_224_from_int8_no_top.h5 --cifar10 cifar10_subset.npz

The head is solved (`lp.fit_head`) on frozen features of four small networks, each trained for
another task first, and of two large ones with ImageNet weights. The accuracy is that on test
pictures. A seed changes the training pictures.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from lib.arguments import command, parser
from lib.journal import Run
from lib.machine import machine
from lib.networks import SIZE, Build, pretrain
from lib.problems import BANGLA, Arrays, cifar10_problem, draw, script_problem, xray_problem
from lib.results import RESULTS, page, table, write
from lib.scores import mean_and_deviation, select, unique

import keras_lp as lp

POOLINGS = ("avg", "max", "flatten")
SIZES = (100, 500)
TESTED = 500  # pictures

Parts = tuple[Arrays, Arrays]  # training and test pictures


def digits(channels: int) -> tuple[keras.Model, Parts]:
    """Returns a network for the digits 0 to 4 of the package, and the digits 5 to 9."""
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
    """Returns a network for the first five classes of fashion_mnist, and the other classes."""
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


def cases(given: argparse.Namespace, folder: Path) -> list[tuple[str, Build, Parts]]:
    """Returns the name, the builder and the training and test pictures of each case."""
    found: list[tuple[str, Build, Parts]] = []
    for channels in (8, 32):
        backbone, parts = digits(channels)
        build = partial(lp.transfer_model, backbone, 5)
        found.append((f"digits, {channels} channels", build, parts))
    backbone, parts = clothes(given.data_dir)
    found.append(("fashion_mnist", partial(lp.transfer_model, backbone, 5), parts))
    pretrain("mnist", given.data_dir, folder / "mnist.keras")
    problem = script_problem(BANGLA, given.data_dir)
    build = partial(lp.transfer_model, folder / "mnist.keras", 10)
    found.append(("mnist to bangla", build, (problem.train, problem.test)))
    pictures = [cifar10_problem(given.cifar10), xray_problem(given.data_dir)]
    networks = [("MobileNet", given.mobilenet, 0.25), ("MobileNetV2", given.mobilenetv2, 1.0)]
    for name, weights, alpha in networks:
        options = {"weights": weights, "backbone_kwargs": {"alpha": alpha}, "image_size": SIZE}
        for problem in pictures:
            shape = {"input_shape": problem.train[0].shape[1:]}
            build = partial(lp.transfer_model, name, len(problem.labels), **shape, **options)
            found.append((f"{name}, {problem.name}", build, (problem.train, problem.test)))
    return found


def learn(name: str, model: lp.Model, pooling: str, parts: Parts, size: int, seed: int) -> Run:
    train, test = parts
    shape = model.get_layer("pooling").input.shape[1:]
    data, _ = draw(train, size, seed)
    history = lp.fit_head(model, data, verbose=0).history
    return {
        "case": name,
        "map": "x".join(map(str, shape)),
        "numbers": math.prod(shape),
        "pooling": pooling,
        "examples": size,
        "seed": seed,
        "accuracy": model.evaluate(*test, verbose=0, return_dict=True)["accuracy"],
        "l2": history["l2"][0],
    }


def study(given: argparse.Namespace) -> list[Run]:
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name, build, (train, test) in cases(given, Path(folder)):
            parts = train, tuple(part[:TESTED] for part in test)
            for pooling in POOLINGS:
                model = build(pooling=pooling)
                runs += [
                    learn(name, model, pooling, parts, size, seed)
                    for size in SIZES
                    for seed in range(given.seeds)
                ]
                print(name, pooling, f"accuracy {runs[-1]['accuracy']:.3f}", flush=True)
    return runs


def report(results: dict[str, Any]) -> str:
    runs, rows = results["runs"], []
    for name, size in unique(runs, "case", "examples"):
        own = select(runs, case=name, examples=size)
        row = [name, own[0]["map"], f"{own[0]['numbers']:,}", str(size)]
        for pooling in POOLINGS:
            found = [100 * run["accuracy"] for run in select(own, pooling=pooling)]
            row.append(mean_and_deviation(found))
        rows.append(row)
    return page(
        "Pooling: how a feature map becomes a vector",
        results["command"],
        results["machine"],
        __doc__,
        "Test accuracy of a solved head in per cent, mean and standard deviation over "
        f"{len(unique(runs, 'seed'))} seeds. The study took {results['seconds'] / 60:.0f} minutes.",
        table(["case", "feature map", "numbers", "examples", *POOLINGS], rows),
    )


def main() -> None:
    arguments = parser(__doc__, seeds=3, data_dir=True, out=RESULTS / "pooling")
    arguments.add_argument("--mobilenet", type=Path, required=True, help="h5 file, alpha 0.25")
    arguments.add_argument("--mobilenetv2", type=Path, required=True, help="h5 file")
    arguments.add_argument("--cifar10", type=Path, required=True, help="npz file")
    given = arguments.parse_args()
    start = time.time()
    runs = study(given)
    results = {
        "command": command(__file__, given, "mobilenet", "mobilenetv2", "cifar10", "seeds"),
        "machine": machine(),
        "seconds": round(time.time() - start),
        "runs": runs,
    }
    write(given.out, report(results), results)


if __name__ == "__main__":
    main()
