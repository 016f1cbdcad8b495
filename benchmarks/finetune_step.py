"""What a step of fine-tuning costs: layer rates beside plain AdamW, LoRA beside all weights.

    python benchmarks/finetune_step.py

On MobileNetV2 (96x96, 158 trainable variables) and on a transformer of 12 layers (width 128, 64
tokens): plain `keras.optimizers.AdamW`, `lp.layerwise` over it, and
`keras.optimizers.MultiOptimizer` with an AdamW for each block. Then the transformer with all its
weights and with `lp.LoRA`; its peak memory is that of a process of its own. They take turns, a step
each, in another order every round, and a ratio compares steps of one round, so that what else the
machine does falls on all of them; a second AdamW shows how exact that is. Processor time, of all
threads, is what the step itself takes on a busy machine. The weights are random: they do not
change the time.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table, write

import keras_lp as lp
from keras_lp.backbones.blocks import below_head, blocks_of

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
GOALS = {"first": 1.15, "step": 1.03}
BATCH = 16
RANK = 8


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


def plain(model: keras.Model) -> None:
    model.compile(keras.optimizers.AdamW(1e-4), LOSS)


def layered(model: keras.Model) -> None:
    model.compile(lp.layerwise(keras.optimizers.AdamW(1e-4), model, layer_decay=0.7), LOSS)


def several(model: keras.Model) -> None:
    """Keras's own way: an optimizer for each block."""
    blocks = blocks_of(below_head(model))
    count = len(blocks)
    made = [keras.optimizers.AdamW(1e-4 * 0.7 ** (count - i)) for i in range(count + 1)]
    block_of = {v.path: i for i, block in enumerate(blocks) for la in block for v in la.variables}
    chosen = keras.optimizers.MultiOptimizer(lambda v: made[block_of.get(v.path, count)])
    model.compile(chosen, LOSS)


def all_weights(model: keras.Model) -> None:
    plain(model)
    lp.finetune_model(model, layer_decay=1.0)


def adapters(model: keras.Model) -> None:
    plain(model)
    lp.finetune_model(model, lora=lp.LoRA(rank=RANK))


OPTIMIZERS = {
    "AdamW": plain,
    "AdamW, a second one": plain,
    "lp.layerwise(AdamW)": layered,
    "MultiOptimizer": several,
}
WAYS = {"all weights": all_weights, f"lp.LoRA(rank={RANK})": adapters}


def race(build: Callable, ways: dict[str, Callable], repeats: int, rounds: int) -> dict[str, dict]:
    """Returns first steps and later ones of every way, round by round, each `cost_of_step`."""
    times = {way: {"first": [], "step": []} for way in ways}
    order, rng = list(ways), random.Random(0)
    for _ in range(repeats):
        keras.backend.clear_session()
        gc.collect()
        models = {}
        rng.shuffle(order)
        for way in order:
            model, x, y = made(build, ways[way])
            models[way] = model
            times[way]["first"].append(cost_of_step(model, x, y))
        for round_ in range(-2, rounds):
            rng.shuffle(order)
            for way in order:
                cost = cost_of_step(models[way], x, y)
                if round_ >= 0:  # the first two only warm up
                    times[way]["step"].append(cost)
    return times


def made(build: Callable, way: Callable) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    keras.utils.set_random_seed(0)
    model, x = build()
    way(model)
    return model, x, np.arange(len(x)) % 10


def cost_of_step(model: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns the seconds on the clock and those of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    model.train_on_batch(x, y)
    return time.perf_counter() - clock, time.process_time() - processor


def time_rows(times: dict[str, dict], name: str) -> list[list[str]]:
    """A line a way: the median, and the ratios to the first way with their quartiles."""
    base = next(iter(times.values()))
    rows = []
    for way, found in times.items():
        row = [name, way]
        for kind, unit in (("first", 1), ("step", 1000)):
            costs, ratios = np.array(found[kind]), np.divide(found[kind], base[kind])
            row.append(f"{unit * np.median(costs[:, 0]):.{1 if unit == 1 else 0}f}")
            for low, middle, high in np.percentile(ratios, [25, 50, 75], axis=0).T:
                row.append("1" if found is base else f"{middle:.3f} ({low:.2f} to {high:.2f})")
        rows.append(row)
    return rows


def measure_memory(way: str) -> None:
    """Prints MiB before the model is made, at the peak, and bytes; in a process of its own."""
    before = status("VmRSS")
    model, x, y = made(transformer, WAYS[way])
    for _ in range(10):
        model.train_on_batch(x, y)
    state = sum(v.value.dtype.size * int(np.prod(v.shape)) for v in model.optimizer.variables)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "learned.weights.h5"
        (lp.save_adapters if WAYS[way] is adapters else keras.Model.save_weights)(model, file)
        print("RESULT", before, status("VmHWM"), state, file.stat().st_size, trained(model))


def trained(model: keras.Model) -> int:
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def status(kind: str) -> float:
    """Returns MiB of this process's memory, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 2**10


def memory(way: str, repeats: int) -> list[float]:
    """Returns the medians over some processes."""
    found = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--memory", way]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        line = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
        found.append([float(value) for value in line.split()[1:]])
    return [float(value) for value in np.median(found, axis=0)]


def memory_row(way: str, found: list[float]) -> list[str]:
    before, peak, state, file, count = found
    return [way, f"{count:,.0f}", f"{peak:,.0f}", f"{peak - before:,.0f}",
            f"{state / 1024:,.0f}", f"{file / 1024:,.0f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="models made of each kind")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.memory)
        return

    kept = {way: memory(way, min(3, arguments.repeats)) for way in WAYS}
    contests = {name: (build, OPTIMIZERS) for name, build in NETWORKS.items()}
    contests["the transformer"] = (transformer, WAYS)
    made(transformer, plain)[0].train_on_batch(np.zeros((1, 64)), np.zeros(1))  # warms up
    times, rows = {}, {}
    for name, (build, ways) in contests.items():
        times[name] = race(build, ways, arguments.repeats, arguments.rounds)
        rows[name] = time_rows(times[name], name)
        print("\n".join(" | ".join(row) for row in rows[name]), flush=True)

    header = ["network", "optimizer", "first step, s", "ratio", "of processor time",
              "step, ms", "ratio", "of processor time"]  # fmt: skip
    *compared, lora = rows.values()
    memory_header = ["trained", "parameters trained", "peak memory, MiB", "above the imports, MiB",
                     "optimizer, KiB", "file, KiB"]  # fmt: skip
    text = "\n".join(
        [
            "# What a step of fine-tuning costs",
            "",
            f"    python benchmarks/finetune_step.py --repeats {arguments.repeats} "
            f"--rounds {arguments.rounds}",
            "",
            f"Machine: {machine()}. Batches of {BATCH}. Medians of {arguments.repeats} first steps "
            f"(tracing) and of {arguments.repeats * arguments.rounds} later ones; ratios are "
            "medians over the rounds, with their quartiles.",
            "",
            f"Layer rates. Goals for `lp.layerwise`: first step at most {GOALS['first']}, step at "
            f"most {GOALS['step']}.",
            "",
            table(header, [row for part in compared for row in part]),
            "",
            "LoRA on all Dense and EinsumDense layers of the transformer, beside all its weights.",
            "",
            table(["network", "trained", *header[2:]], lora),
            "",
            table(memory_header, [memory_row(way, found) for way, found in kept.items()]),
            "",
            "The file is what `lp.save_adapters` writes (adapters and head); for all weights, what "
            "`model.save_weights` writes.",
        ]
    )
    write(arguments.out / "finetune_step", text, {"machine": machine(), "seconds": times,
                                                  "memory": kept})  # fmt: skip


if __name__ == "__main__":
    tf.get_logger().setLevel("ERROR")
    main()
