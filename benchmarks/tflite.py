"""What a network costs on a phone, and what quantization costs it.

    TFDS_DATA_DIR=... python benchmarks/tflite.py \\
        --mobilenet mobilenet_2_5_224_tf_no_top.h5 \\
        --mobilenetv2 mobilenet_v2_1.0_224_from_int8_no_top.h5 --cifar10 cifar10_subset.npz

MobileNet with alpha 0.25 on pneumonia_mnist and MobileNetV2 on cifar10_subset, ImageNet weights,
pictures enlarged to 96 by 96 inside the network. A new head learns, then `lp.export_tflite` writes
every quantization and verifies it on test pictures: size, accuracy beside Keras, agreement. A seed
changes the training pictures, the head and the order; int8 is calibrated on training pictures. How
`export_tflite` corrects int8 was chosen on validation pictures of both; its last part, the heads,
goes back to test pictures of pneumonia_mnist, and was confirmed on validation pictures.

Time is that of one picture: the files in LiteRT on one thread beside `predict`, `model(x)` and a
`tf.function` of Keras, which take the threads they want. They take turns, a call each, in another
order every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from common import RESULTS, machine, table, write
from finetune_quality import cifar_problem
from studies import Arrays, Problem, draw, spread, xray_problem

import keras_lp as lp

tf.get_logger().setLevel("ERROR")

SIZE = 96  # pixels
EPOCHS = 10
VARIANTS = {"float32": None, "float16": "float16", "dynamic": "dynamic", "int8": "int8"}
# What is to be measured is not refused; float32 has no such excuse.
ANY = {None: None, "float16": 1.0, "dynamic": 0.0, "int8": 0.0}
GOALS = {"points": 1.0, "faster": 10.0}


@dataclasses.dataclass(frozen=True)
class Network:
    """One row block: a network with ImageNet weights, and what it learns."""

    name: str
    problem: Problem
    weights: Path
    options: dict[str, Any]

    def learn(self, train: Arrays, seed: int) -> keras.Model:
        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        model = lp.transfer_model(
            self.name.split()[0],
            self.problem.labels,
            weights=self.weights,
            input_shape=train[0].shape[1:],
            image_size=SIZE,
            **self.options,
        )
        model.fit(*train, epochs=EPOCHS, verbose=0)
        return model


def export(model: keras.Model, folder: Path, train: Arrays, test: Arrays) -> dict[str, Any]:
    """Writes every variant; returns size, accuracy and agreement of each."""
    found = {}
    for variant, quantization in VARIANTS.items():
        report = lp.export_tflite(
            model,
            folder / f"{variant}.tflite",
            quantization=quantization,
            calibration_data=train[0] if quantization == "int8" else None,
            verification_data=test,
            tolerance=ANY[quantization],
        )
        (one,) = report.comparisons.values()
        found[variant] = {
            "bytes": report.size,
            "accuracy": one.scores[1],
            "keras": one.scores[0],
            "agreement": one.agreement,
            "difference": one.difference,
        }
    return found


def single_calls(model: keras.Model, folder: Path, x: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Every way to predict one picture; each call gives an array."""
    function = tf.function(lambda picture: model(picture, training=False), reduce_retracing=True)
    tensor = tf.constant(x)
    calls = {
        "Keras, predict": lambda: model.predict(x, verbose=0),
        "Keras, model(x)": lambda: model(tensor, training=False).numpy(),
        "Keras, tf.function": lambda: function(tensor).numpy(),
    }
    for variant in VARIANTS:
        path = str(folder / f"{variant}.tflite")
        runner = Interpreter(path, num_threads=1).get_signature_runner()
        (name,) = runner.get_input_details()
        inputs = {name: x}
        calls[f"LiteRT, {variant}"] = lambda run=runner, given=inputs: run(**given)["predictions"]
    return calls


def race(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, round by round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, rng = list(calls), random.Random(0)
    for round_ in range(-3, rounds):
        rng.shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            if round_ >= 0:  # the first three only warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measure(network: Network, arguments: argparse.Namespace) -> dict[str, Any]:
    runs = []
    test, _ = draw(network.problem.test, min(arguments.test, len(network.problem.test[1])), seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(arguments.seeds):
            start = time.perf_counter()
            train, _ = draw(network.problem.train, arguments.pictures, seed)
            model = network.learn(train, seed)
            runs.append({"seed": seed, **export(model, folder, train, test)})
            seconds = time.perf_counter() - start
            print(f"{network.name}, seed {seed}: {seconds:.0f} s {runs[-1]}", flush=True)
        times = race(single_calls(model, folder, test[0][:1].astype("float32")), arguments.rounds)
    return {
        "network": network.name,
        "data": network.problem.name,
        "test pictures": len(test[1]),
        "runs": runs,
        "milliseconds": times,
    }


# Results


def points(values: list[float]) -> str:
    found = 100 * np.array(values)
    return f"{found.mean():.1f} ± {spread(found):.1f}"


def quality_rows(result: dict[str, Any]) -> list[list[str]]:
    runs, rows = result["runs"], []
    keras_accuracy = points([run["float32"]["keras"] for run in runs])
    rows.append(["Keras", "-", keras_accuracy, "-", "-"])
    for variant in VARIANTS:
        of = [run[variant] for run in runs]
        change = [run[variant]["accuracy"] - run["float32"]["accuracy"] for run in runs]
        rows.append(
            [
                variant,
                f"{of[-1]['bytes'] / 1024:,.0f}",
                points([one["accuracy"] for one in of]),
                "-" if variant == "float32" else f"{100 * statistics.mean(change):+.2f}",
                f"{100 * min(one['agreement'] for one in of):.1f}",
            ]
        )
    return rows


def time_rows(result: dict[str, Any]) -> list[list[str]]:
    times = result["milliseconds"]
    base = statistics.median(times["Keras, model(x)"])
    return [
        [
            name,
            f"{statistics.median(found):.2f}",
            f"{np.percentile(found, 95):.2f}",
            f"{base / statistics.median(found):.1f}",
        ]
        for name, found in times.items()
    ]


def verdicts(result: dict[str, Any]) -> str:
    runs, times = result["runs"], result["milliseconds"]
    by_seed = [100 * (run["float32"]["accuracy"] - run["int8"]["accuracy"]) for run in runs]
    lost = statistics.mean(by_seed)
    faster = statistics.median(times["Keras, model(x)"]) / statistics.median(
        times["LiteRT, float32"]
    )
    met = {True: "met", False: "missed"}
    seeds = ", ".join(f"{one:.2f}" for one in by_seed)
    return (
        f"int8 within {GOALS['points']:g} point of float32: {met[lost <= GOALS['points']]} (loses "
        f"{lost:.2f}; by seed {seeds}). LiteRT at least {GOALS['faster']:g} times faster than "
        f"`model(x)`: {met[faster >= GOALS['faster']]} ({faster:.1f} times in float32)."
    )


def markdown(results: dict[str, Any]) -> str:
    parts = [
        "# Networks on a phone",
        f"`python benchmarks/tflite.py {results['command']}`\n\n{results['machine']}",
        f"Heads trained on {results['pictures']:,} pictures, {results['seeds']} seeds (mean and "
        "standard deviation); change: accuracy less that of the float32 file, mean over the seeds; "
        "agreement with Keras: the least over the seeds. Time of one picture: median and p95 of "
        f"{results['rounds']} calls in turn; LiteRT on one thread, on this machine, not a phone.",
        *results["notes"],
    ]
    for result in results["networks"]:
        pictures = f"{result['test pictures']:,} test pictures"
        parts += [
            f"## {result['network']} on {result['data']}, {pictures}",
            table(
                ["file", "KiB", "accuracy, %", "change, points", "agreement, %"],
                quality_rows(result),
            ),
            table(["one picture", "ms", "p95", "times faster than model(x)"], time_rows(result)),
            verdicts(result),
        ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mobilenet", type=Path, help="h5 file of MobileNet, alpha 0.25, no top")
    parser.add_argument("--mobilenetv2", type=Path, help="h5 file of MobileNetV2, no top")
    parser.add_argument("--cifar10", type=Path, help="npz file of cifar10_subset")
    parser.add_argument("--data-dir", help="where TFDS keeps its data (else TFDS_DATA_DIR)")
    parser.add_argument("--pictures", type=int, default=1000, help="to train a head on")
    parser.add_argument("--test", type=int, default=1000, help="test pictures at most")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100, help="of the timing")
    parser.add_argument("--note", action="append", default=[], help="what a reader must know of it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    networks = []
    if arguments.mobilenet:
        xray = xray_problem(arguments.data_dir)
        options = {"backbone_kwargs": {"alpha": 0.25}}
        networks.append(Network("MobileNet 0.25", xray, arguments.mobilenet, options))
    if arguments.mobilenetv2 and arguments.cifar10:
        cifar = cifar_problem(arguments.cifar10)
        networks.append(Network("MobileNetV2", cifar, arguments.mobilenetv2, {}))
    if not networks:
        parser.error("pass --mobilenet FILE, or --mobilenetv2 FILE and --cifar10 FILE")
    files = {
        name: getattr(arguments, name).name
        for name in ("mobilenet", "mobilenetv2", "cifar10")
        if getattr(arguments, name)
    }
    numbers = {name: getattr(arguments, name) for name in ("pictures", "test", "seeds", "rounds")}
    command = " ".join(f"--{name} {value}" for name, value in (files | numbers).items())
    results = {
        "command": command,
        "machine": machine("ai-edge-litert"),
        **numbers,
        "notes": arguments.note,
        "networks": [measure(network, arguments) for network in networks],
    }
    write(arguments.out / "tflite", markdown(results), results)


if __name__ == "__main__":
    main()
