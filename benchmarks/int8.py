r"""Is the int8 of `export_tflite` as good as that of ai-edge-quantizer?

    TFDS_DATA_DIR=... python benchmarks/int8.py --mobilenet mobilenet_2_5_224_tf_no_top.h5 \\
        --mobilenetv2 mobilenet_v2_1.0_224_from_int8_no_top.h5 --cifar10 cifar10_subset.npz

MobileNet with alpha 0.25 on pneumonia_mnist and MobileNetV2 on cifar10_subset, ImageNet weights,
images enlarged to 96 by 96 inside the network. A new head learns. Then the float32 file is
quantized to int8 weights and activations by `lp.export_tflite(quantization="int8")`, and by
ai-edge-quantizer with its recipe `static_wi8_ai8`; both are calibrated on the same training images.
Seconds are those of the whole call; that of `export_tflite` also converts the model and compares
the file with Keras. A seed changes the training images, the head and the order.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from lib import phones
from lib.arguments import command, parser
from lib.machine import machine
from lib.problems import Arrays, draw
from lib.results import page, table, write
from lib.scores import mean_and_deviation

import keras_lp as lp

OURS, THEIRS = "export_tflite", "ai-edge-quantizer"


def quantized(path: Path, images: np.ndarray) -> bytes:
    """Returns what ai-edge-quantizer makes of a float32 file."""
    from ai_edge_quantizer import quantizer, recipe

    runner = Interpreter(str(path)).get_signature_list()
    ((signature, names),) = runner.items()
    one = quantizer.Quantizer(str(path))
    one.load_quantization_recipe(recipe.static_wi8_ai8())
    examples = [{names["inputs"][0]: image[None].astype("float32")} for image in images]
    return bytes(one.quantize(one.calibrate({signature: examples})).quantized_model)


def predictions(path: Path, images: np.ndarray) -> np.ndarray:
    """Returns the outputs of a file, whose inputs may be int8."""
    run: Any = Interpreter(str(path), num_threads=1).get_signature_runner()
    ((name, details),) = run.get_input_details().items()
    scale, zero = details["quantization"]
    if details["dtype"] == np.int8:
        images = np.clip(np.round(images / scale) + zero, -128, 127)
    return np.concatenate(
        [run(**{name: image[None].astype(details["dtype"])})["predictions"] for image in images]
    )


def measure(network: phones.Network, train: Arrays, test: Arrays, seed: int) -> dict[str, Any]:
    model = network.learn(train, seed)
    expected = model.predict(test[0], verbose=0).argmax(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lp.export_tflite(model, folder / "float32.tflite", verification_data=test[0], verbose=0)
        files, seconds = {"float32": folder / "float32.tflite"}, {}
        start = time.perf_counter()
        files[OURS] = folder / "ours.tflite"
        lp.export_tflite(
            model, files[OURS], quantization="int8", calibration_data=train[0],
            verification_data=test, tolerance=0.0, verbose=0,
        )  # fmt: skip
        seconds[OURS] = time.perf_counter() - start
        start = time.perf_counter()
        files[THEIRS] = folder / "theirs.tflite"
        files[THEIRS].write_bytes(quantized(files["float32"], train[0]))
        seconds[THEIRS] = time.perf_counter() - start
        found = {}
        for kind, path in files.items():
            chosen = predictions(path, test[0]).argmax(1)
            found[kind] = {
                "accuracy": float(np.mean(chosen == test[1])),
                "agreement": float(np.mean(chosen == expected)),
                "bytes": path.stat().st_size,
                "seconds": seconds.get(kind),
            }
    return found


def report(results: dict[str, Any]) -> str:
    blocks = []
    for name, runs in results["networks"].items():
        rows = []
        for kind in ("float32", OURS, THEIRS):
            of = [run[kind] for run in runs]
            accuracy, agreement = (
                mean_and_deviation([100 * one[key] for one in of]) for key in of[0] if key[0] == "a"
            )
            spent = [one["seconds"] for one in of if one["seconds"]]
            size = f"{np.median([one['bytes'] for one in of]) / 1024:,.0f}"
            rows.append(
                [kind, size, accuracy, agreement, f"{np.median(spent):.1f}" if spent else "-"]
            )
        header = ["file", "KiB", "accuracy, %", "agreement with Keras, %", "seconds"]
        blocks += [f"## {name}", table(header, rows)]
    return page("int8 by two tools", results["command"], results["machine"], __doc__, *blocks)


def main() -> None:
    arguments = parser(__doc__, seeds=3, data_dir=True)
    phones.add_options(arguments)
    given = arguments.parse_args()
    tf.get_logger().setLevel("ERROR")
    found: dict[str, list[dict[str, Any]]] = {}
    for network in phones.networks(given, arguments):
        test, _ = draw(network.problem.test, min(given.test, len(network.problem.test[1])), seed=0)
        for seed in range(given.seeds):
            train, _ = draw(network.problem.train, given.pictures, seed)
            run = measure(network, train, test, seed)
            found.setdefault(f"{network.name} on {network.problem.name}", []).append(run)
            print(network.name, run, flush=True)
    results = {
        "command": command(__file__, given, *phones.FILES, "pictures", "test", "seeds"),
        "machine": machine("ai-edge-litert", "ai-edge-quantizer"),
        "networks": found,
    }
    write(given.out / "int8", report(results), results)


if __name__ == "__main__":
    main()
