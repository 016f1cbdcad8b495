"""What does a step of fine-tuning cost with layer rates or LoRA, compared with plain AdamW?

    python benchmarks/finetune_step.py

On MobileNetV2 (96x96, 158 trainable variables) and on a transformer of 12 layers (width 128, 64
tokens), batches of 16: plain `keras.optimizers.AdamW`, `lp.layerwise` over it, and
`keras.optimizers.MultiOptimizer` with an AdamW for each block. Then the transformer with all its
weights and with `lp.LoRA` on its Dense and EinsumDense layers; its peak memory is that of a process
of its own. They take turns, a step each, in another order every round, and a ratio compares steps
of one round, so that what else the machine does falls on all of them; a second AdamW shows how
exact that is. Processor time, of all threads, is what the step itself takes on a busy machine. The
weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from lib.arguments import command, parser
from lib.machine import answer, machine, memory, own_process
from lib.results import page, table, write
from lib.timing import Seconds, in_turn, seconds

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
    """Compiles with Keras's own way: an optimizer for each block."""
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
THE_TRANSFORMER = "the transformer"
WAYS = {"all weights": all_weights, f"lp.LoRA(rank={RANK})": adapters}


Times = dict[str, dict[str, list[Seconds]]]  # of each way the first steps and later ones


def race(build: Callable, ways: dict[str, Callable], repeats: int, rounds: int) -> Times:
    times: Times = {way: {"first": [], "step": []} for way in ways}
    for repeat in range(repeats):
        keras.backend.clear_session()
        gc.collect()
        steps: dict[str, Callable[[], Any]] = {}
        order = np.random.default_rng(repeat).permutation(list(ways))
        for way in map(str, order):
            model, x, y = made(build, ways[way])
            steps[way] = partial(model.train_on_batch, x, y)
            times[way]["first"].append(seconds(steps[way]))
        for way, found in in_turn(steps, rounds, warm_up=2, seed=repeat).items():
            times[way]["step"] += found
    return times


def made(build: Callable, way: Callable) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    keras.utils.set_random_seed(0)
    model, x = build()
    way(model)
    return model, x, np.arange(len(x)) % 10


def time_rows(times: Times, name: str) -> list[list[str]]:
    """Returns a row per way: the median, and the ratios to the first way with their quartiles."""
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
    """Answers with MiB before the model is made and at the peak, bytes, and parameters."""
    before = memory()
    model, x, y = made(transformer, WAYS[way])
    for _ in range(10):
        model.train_on_batch(x, y)
    state = sum(v.value.dtype.size * int(np.prod(v.shape)) for v in model.optimizer.variables)
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "learned.weights.h5"
        (lp.save_adapters if WAYS[way] is adapters else keras.Model.save_weights)(model, file)
        answer(before, memory("VmHWM"), state, file.stat().st_size, trained)


def memory_row(way: str, found: list[float]) -> list[str]:
    before, peak, state, file, count = found
    return [way, f"{count:,.0f}", f"{peak:,.0f}", f"{peak - before:,.0f}",
            f"{state / 1024:,.0f}", f"{file / 1024:,.0f}"]  # fmt: skip


def report(results: dict[str, Any]) -> str:
    rows = {name: time_rows(times, name) for name, times in results["seconds"].items()}
    lora = rows.pop(THE_TRANSFORMER)
    costs = ["first step, s", "ratio", "of processor time", "step, ms", "ratio",
             "of processor time"]  # fmt: skip
    header = ["trained", "parameters trained", "peak memory, MiB", "above the imports, MiB",
              "optimizer, KiB", "file, KiB"]  # fmt: skip
    times = next(iter(results["seconds"].values()))["AdamW"]
    return page(
        "What a step of fine-tuning costs",
        results["command"],
        results["machine"],
        __doc__,
        f"Medians of {len(times['first'])} first steps (tracing) and of {len(times['step'])} later "
        "ones; ratios are medians over the rounds, with their quartiles.",
        f"Layer rates. Goals for `lp.layerwise`: first step at most {GOALS['first']}, step at most "
        f"{GOALS['step']}.",
        table(["network", "optimizer", *costs], [row for part in rows.values() for row in part]),
        "LoRA, compared with all weights.",
        table(["network", "trained", *costs], lora),
        table(header, [memory_row(way, found) for way, found in results["memory"].items()]),
        "The file is what `lp.save_adapters` writes (adapters and head); for all weights, what "
        "`model.save_weights` writes.",
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=5, help="models made of each kind")
    arguments.add_argument("--rounds", type=int, default=30, help="steps of each model")
    arguments.add_argument("--memory", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    tf.get_logger().setLevel("ERROR")
    if given.memory:
        measure_memory(given.memory)
        return
    kept = {}
    for way in WAYS:
        found = [own_process(__file__, "--memory", way) for _ in range(min(3, given.repeats))]
        kept[way] = np.median(found, axis=0).tolist()
    contests = {name: (build, OPTIMIZERS) for name, build in NETWORKS.items()}
    contests[THE_TRANSFORMER] = (transformer, WAYS)
    made(transformer, plain)[0].train_on_batch(np.zeros((1, 64)), np.zeros(1))  # warms up
    times = {}
    for name, (build, ways) in contests.items():
        times[name] = race(build, ways, given.repeats, given.rounds)
        print(*time_rows(times[name], name), sep="\n", flush=True)
    results = {
        "command": command(__file__, given, "repeats", "rounds"),
        "machine": machine(),
        "seconds": times,
        "memory": kept,
    }
    write(given.out / "finetune_step", report(results), results)


if __name__ == "__main__":
    main()
