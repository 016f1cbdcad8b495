"""What a step of fine-tuning costs: layer rates beside plain AdamW, LoRA beside all weights.

    python benchmarks/finetune_step.py

On MobileNetV2 (96x96, 158 trainable variables) and on a transformer of 12 layers (width 128, 64
tokens). The optimizers take turns, a run of steps each, and the medians are compared: plain
`keras.optimizers.AdamW`, `lp.layerwise` over it, and `keras.optimizers.MultiOptimizer` with an
AdamW for each block. Then the transformer with all its weights and with `lp.LoRA`, with the peak
memory of a process of its own. The weights are random: they do not change the time.
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
from keras_lp.blocks import below_head, blocks_of

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
GOALS = {"first": 1.15, "step": 1.03}
BATCH = 16


def mobilenet() -> tuple[keras.Model, np.ndarray]:
    network = keras.applications.MobileNetV2(
        input_shape=(96, 96, 3), include_top=False, weights=None, pooling="avg"
    )
    x = np.random.default_rng(0).normal(size=(BATCH, 96, 96, 3)).astype("float32")
    return keras.Model(network.input, keras.layers.Dense(10, name="head")(network.output)), x


def transformer(
    layers: int = 12, width: int = 128, tokens: int = 64
) -> tuple[keras.Model, np.ndarray]:
    inputs = keras.Input((tokens,), dtype="int32")
    x = keras.layers.Embedding(1000, width, name="embedding")(inputs)
    for i in range(layers):
        name = f"layer{i}"
        attended = keras.layers.MultiHeadAttention(4, width // 4, name=f"{name}_attention")(x, x)
        x = keras.layers.LayerNormalization(name=f"{name}_norm1")(x + attended)
        hidden = keras.layers.Dense(4 * width, activation="gelu", name=f"{name}_up")(x)
        hidden = keras.layers.Dense(width, name=f"{name}_down")(hidden)
        x = keras.layers.LayerNormalization(name=f"{name}_norm2")(x + hidden)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(10, name="head")(x))
    return model, np.random.default_rng(0).integers(0, 1000, (BATCH, tokens))


NETWORKS = {"MobileNetV2": mobilenet, "transformer, 12 layers": transformer}


def plain(model: keras.Model) -> keras.optimizers.Optimizer:
    return keras.optimizers.AdamW(1e-4)


def layered(model: keras.Model) -> keras.optimizers.Optimizer:
    return lp.layerwise(keras.optimizers.AdamW(1e-4), model, layer_decay=0.7)


def several(model: keras.Model) -> keras.optimizers.Optimizer:
    """Keras's own way: an optimizer for each block."""
    blocks = blocks_of(below_head(model))
    known = {id(layer) for block in blocks for layer in block}
    head = [layer for layer in model.layers if layer.weights and id(layer) not in known]
    groups = [(0.7**i, block) for i, block in enumerate(reversed([*blocks, head]))]
    return keras.optimizers.MultiOptimizer(
        [(keras.optimizers.AdamW(1e-4 * rate), layers) for rate, layers in groups]
    )


OPTIMIZERS: dict[str, Callable] = {
    "AdamW": plain,
    "lp.layerwise(AdamW)": layered,
    "MultiOptimizer of AdamW": several,
}


def measure(model: keras.Model, x: np.ndarray, steps: int) -> Callable[[], float]:
    """Returns what runs some steps and gives the seconds of one."""
    y = np.arange(len(x)) % 10

    def run() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            model.train_on_batch(x, y)
        return (time.perf_counter() - start) / steps

    return run


def optimizers(rounds: int, steps: int) -> list[dict]:
    """First step and median of the later ones, for every network and optimizer."""
    rows = []
    for network, build in NETWORKS.items():
        firsts: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
        times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
        for _ in range(3):
            runs = {}
            for name, make in OPTIMIZERS.items():
                keras.utils.set_random_seed(0)
                model, x = build()
                try:
                    model.compile(make(model), LOSS)
                except (AttributeError, ValueError, TypeError) as error:
                    print(f"{name}: {error}", flush=True)
                    continue
                runs[name] = measure(model, x, steps)
                start = time.perf_counter()
                model.train_on_batch(x, np.arange(len(x)) % 10)
                firsts[name].append(time.perf_counter() - start)
            for _ in range(rounds):
                for name, run in runs.items():
                    times[name].append(run())
            keras.backend.clear_session()
        for name in OPTIMIZERS:
            if times[name]:
                row = {"network": network, "optimizer": name, "first": firsts[name],
                       "step": times[name]}  # fmt: skip
                rows.append(row)
                first, step = (statistics.median(row[kind]) for kind in ("first", "step"))
                print(f"{network}, {name}: {first:.2f} s, {1000 * step:.1f} ms", flush=True)
    return rows


def adapters(way: str, steps: int) -> None:
    """Prints step time, peak memory and sizes of the transformer; in a process of its own."""
    model, x = transformer()
    model.compile("adamw", LOSS)
    lora = lp.LoRA(rank=8) if way == "LoRA, rank 8" else None
    model = lp.finetune_model(model, lora=lora, layer_decay=1.0)
    run = measure(model, x, steps)
    run()
    seconds = statistics.median(run() for _ in range(5))
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    state = 4 * sum(int(np.prod(v.shape)) for v in model.optimizer.variables)
    trained = 4 * sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    print("RESULT", seconds, peak, state, trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="turns of each optimizer")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        adapters(arguments.way, arguments.steps)
        return

    rows = optimizers(arguments.rounds, arguments.steps)
    ways: dict[str, list[list[float]]] = {"all weights": [], "LoRA, rank 8": []}
    for _ in range(3):
        for way, found in ways.items():
            command = [sys.executable, __file__, "--way", way, "--steps", str(arguments.steps)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            line = next(li for li in result.stdout.splitlines() if li.startswith("RESULT"))
            found.append([float(value) for value in line.split()[1:]])
    cells = []
    for row in rows:
        base = next(r for r in rows if r["network"] == row["network"] and r["optimizer"] == "AdamW")
        line = [row["network"], row["optimizer"]]
        for kind, unit in (("first", 1), ("step", 1000)):
            value = statistics.median(row[kind])
            ratio = value / statistics.median(base[kind])
            goal = f" (goal {GOALS[kind]:.2f})" if row["optimizer"].startswith("lp.") else ""
            line += [f"{unit * value:.2f}", f"{ratio:.3f}x{goal}"]
        cells.append(line)
    header = ["network", "optimizer", "first step, s", "of AdamW", "step, ms", "of AdamW"]
    medians = {way: np.median(found, axis=0) for way, found in ways.items()}
    lora_rows = [
        [way, f"{1000 * m[0]:.1f}", f"{m[1]:,.0f}", f"{m[2] / 1024:,.0f}", f"{m[3] / 1024:,.0f}"]
        for way, m in medians.items()
    ]
    lora_header = ["transformer, trained", "step, ms", "peak memory, MiB", "optimizer, KiB",
                   "trained weights, KiB"]  # fmt: skip
    text = "\n".join(
        [
            "# What a step of fine-tuning costs",
            "",
            "    python benchmarks/finetune_step.py",
            "",
            f"Machine: {machine()}. Batches of {BATCH}, medians of {len(rows[0]['step'])} runs of "
            f"{arguments.steps} steps in turn, of 3 first steps (tracing), and of 3 processes.",
            "",
            table(header, cells),
            "",
            table(lora_header, lora_rows),
        ]
    )
    write(arguments.out / "finetune_step", text, {"machine": machine(), "steps": rows,
                                                  "adapters": ways})  # fmt: skip


if __name__ == "__main__":
    tf.get_logger().setLevel("ERROR")
    main()
