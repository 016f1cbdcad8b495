r"""What does a network cost on a phone, and what does quantization cost it?

    TFDS_DATA_DIR=... python benchmarks/tflite.py \
        --mobilenet mobilenet_2_5_224_tf_no_top.h5 \
        --mobilenetv2 mobilenet_v2_1.0_224_from_int8_no_top.h5 --cifar10 cifar10_subset.npz

MobileNet with alpha 0.25 on pneumonia_mnist and MobileNetV2 on cifar10_subset, ImageNet weights,
pictures enlarged to 96 by 96 inside the network. A new head learns, then `lp.export_tflite` writes
each quantization and verifies it on test pictures: size, accuracy compared with Keras, agreement.
A seed changes the training pictures, the head and the order; int8 is calibrated on training
pictures. How `export_tflite` corrects int8 was chosen on validation pictures of both; its last
part, the heads, was found on test pictures of pneumonia_mnist and confirmed on validation pictures.

Time is that of one picture: the files in LiteRT on one thread, compared with `predict`, `model(x)`
and a `tf.function` of Keras, which take the threads they want. They take turns of one call, in
another order every round.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from lib import phones
from lib.arguments import command, parser
from lib.machine import machine
from lib.problems import Arrays, draw
from lib.results import page, table, write
from lib.scores import mean_and_deviation
from lib.timing import in_turn

import keras_lp as lp

VARIANTS = {"float32": None, "float16": "float16", "dynamic": "dynamic", "int8": "int8"}
# Every quantization is measured, whatever it loses; float32 must be as exact as by default.
TOLERANCES = {None: None, "float16": 1.0, "dynamic": 0.0, "int8": 0.0}
GOALS = {"points": 1.0, "faster": 10.0}


def export(model: keras.Model, folder: Path, train: Arrays, test: Arrays) -> dict[str, Any]:
    """Writes each variant; returns its size, accuracy and agreement."""
    found = {}
    for variant, quantization in VARIANTS.items():
        report = lp.export_tflite(
            model,
            folder / f"{variant}.tflite",
            quantization=quantization,
            calibration_data=train[0] if quantization == "int8" else None,
            verification_data=test,
            tolerance=TOLERANCES[quantization],
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
    """Returns the ways to predict one picture; each call gives an array."""
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


def measure(network: phones.Network, given: Namespace) -> dict[str, Any]:
    runs = []
    test, _ = draw(network.problem.test, min(given.test, len(network.problem.test[1])), seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(given.seeds):
            train, _ = draw(network.problem.train, given.pictures, seed)
            model = network.learn(train, seed)
            runs.append({"seed": seed, **export(model, folder, train, test)})
            print(network.name, runs[-1], flush=True)
        calls = single_calls(model, folder, test[0][:1].astype("float32"))
        times = in_turn(calls, given.rounds, warm_up=3)
    return {
        "network": network.name,
        "data": network.problem.name,
        "test pictures": len(test[1]),
        "runs": runs,
        "milliseconds": {way: [1e3 * one.clock for one in found] for way, found in times.items()},
    }


# Results


def quality_rows(result: dict[str, Any]) -> list[list[str]]:
    runs = result["runs"]

    def percent(found: list[float]) -> str:
        return mean_and_deviation(100 * np.array(found))

    rows = [["Keras", "-", percent([run["float32"]["keras"] for run in runs]), "-", "-"]]
    for variant in VARIANTS:
        of = [run[variant] for run in runs]
        change = [run[variant]["accuracy"] - run["float32"]["accuracy"] for run in runs]
        rows.append(
            [
                variant,
                f"{of[-1]['bytes'] / 1024:,.0f}",
                percent([one["accuracy"] for one in of]),
                "-" if variant == "float32" else f"{100 * statistics.mean(change):+.2f}",
                f"{100 * min(one['agreement'] for one in of):.1f}",
            ]
        )
    return rows


def time_rows(result: dict[str, Any]) -> list[list[str]]:
    times = result["milliseconds"]
    base = statistics.median(times["Keras, model(x)"])
    rows = []
    for name, found in times.items():
        median, p95 = statistics.median(found), np.percentile(found, 95)
        rows.append([name, f"{median:.2f}", f"{p95:.2f}", f"{base / median:.1f}"])
    return rows


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


def report(results: dict[str, Any]) -> str:
    blocks = list(results["notes"])
    for result in results["networks"]:
        pictures = f"{result['test pictures']:,} test pictures"
        header = ["file", "KiB", "accuracy, %", "change, points", "agreement, %"]
        blocks += [
            f"## {result['network']} on {result['data']}, {pictures}",
            table(header, quality_rows(result)),
            table(["one picture", "ms", "p95", "times faster than model(x)"], time_rows(result)),
            verdicts(result),
        ]
    return page(
        "Networks on a phone",
        results["command"],
        results["machine"],
        __doc__,
        f"Heads trained on {results['pictures']:,} pictures, {results['seeds']} seeds (mean and "
        "standard deviation); change: accuracy minus that of the float32 file, mean over the "
        "seeds; agreement with Keras: the least over the seeds. Time of one picture: median and "
        f"95th percentile of {results['rounds']} calls; on this machine, not on a phone.",
        *blocks,
    )


def main() -> None:
    arguments = parser(__doc__, seeds=3, data_dir=True)
    phones.add_options(arguments)
    arguments.add_argument("--rounds", type=int, default=100, help="of the timing")
    arguments.add_argument("--note", action="append", default=[], help="paragraph of the page")
    given = arguments.parse_args()
    tf.get_logger().setLevel("ERROR")
    networks = phones.networks(given, arguments)
    numbers = ("pictures", "test", "seeds", "rounds")
    results = {
        "command": command(__file__, given, *phones.FILES, *numbers),
        "machine": machine("ai-edge-litert"),
        **{name: getattr(given, name) for name in numbers},
        "notes": given.note,
        "networks": [measure(network, given) for network in networks],
    }
    write(given.out / "tflite", report(results), results)


if __name__ == "__main__":
    main()
