"""What a training step with several tasks costs.

    python benchmarks/multitask_step.py

Three tasks on the same pictures, with two networks: one whose step is real work (a small
convolutional network on 32x32 pictures) and one so small that the overhead shows. Compared:

- one model of three tasks with three models of one task;
- masked losses and metrics with the same model whose tasks do not mask;
- the whole with a hand-written Keras model with the same losses and metrics;
- each way to balance by gradients with the plain step.

An epoch of `fit` each, in turn, on one thread; a ratio is the median of the ratios of the turns.
It is of the time of the processor, which on one thread is the time that the epoch takes on a free
machine; the time on the clock stands beside it. The weights are random and the labels too: they do
not change the time.

Turns are kept in `partial/` beside the results, so that a run can go on where it ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table, write
from keras import ops
from multitask_common import Journal

import keras_lp as lp

TASKS = {"colour": 10, "shape": 10, "place": 5}
LOSSY = ("uncertainty",)
GRADIENT = ("gradnorm", "pcgrad", "cagrad", "mgda", "imtl_g")
BATCH = 32
STEPS = {"convolutional": 20, "one dense layer": 50}  # of an epoch
KINDS = ("clock", "processor")
Fit = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Unmasked(lp.Classification):
    """A task that trusts that all labels are there."""

    def mask_missing(self, y: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        return y, y_pred, ops.ones(ops.shape(y)[:1])


def convolutional() -> keras.Model:
    layers = [keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255)]
    for filters, strides in [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1)]:
        layers.append(keras.layers.Conv2D(filters, 3, strides, "same", activation="relu"))
    return keras.Sequential(layers, name="convolutional")


def tiny() -> keras.Model:
    layers = [keras.Input((64,)), keras.layers.Dense(64, "relu")]
    return keras.Sequential(layers, name="tiny")


NETWORKS = {"convolutional": (convolutional, "avg"), "one dense layer": (tiny, None)}


def by_hand(backbone: keras.Model, pooling: str | None) -> keras.Model:
    """The same model in plain Keras."""
    features = backbone.outputs[0]
    if pooling:
        features = keras.layers.GlobalAveragePooling2D()(features)
    logits = {name: keras.layers.Dense(n, name=name)(features) for name, n in TASKS.items()}
    model = keras.Model(backbone.inputs[0], logits)
    model.compile(
        "adam",
        {n: keras.losses.SparseCategoricalCrossentropy(from_logits=True) for n in TASKS},
        metrics={n: [keras.metrics.SparseCategoricalAccuracy(name="accuracy")] for n in TASKS},
    )
    return model


def variants(network: str, steps: int) -> dict[str, Fit]:
    """Returns what trains each variant for an epoch."""
    build, pooling = NETWORKS[network]
    random = np.random.default_rng(0)
    count = BATCH * steps
    shape = build().input_shape[1:]
    x = random.uniform(0, 255 if len(shape) == 3 else 1, (count, *shape)).astype("float32")
    y = {name: random.integers(0, n, count) for name, n in TASKS.items()}
    some = {name: np.where(random.uniform(size=count) < 0.5, -1, y[name]) for name in TASKS}
    options = {"pretrained": False, "pooling": pooling}

    def fit(model: keras.Model, labels: Any) -> Fit:
        return lambda: model.fit(x, labels, batch_size=BATCH, shuffle=False, verbose=0) and None

    def multitask(tasks: Any = TASKS, **more: Any) -> keras.Model:
        return lp.multitask_model(build(), tasks, **options, **more)

    singles = [
        fit(lp.transfer_model(build(), n, trainable="all", **options), y[name])
        for name, n in TASKS.items()
    ]
    unmasked = {name: Unmasked(n) for name, n in TASKS.items()}
    equal = multitask()
    return {
        "lp, 3 tasks": fit(equal, y),
        "lp, 3 tasks, half of the labels missing": fit(equal, some),
        "lp, 3 tasks, masks off": fit(multitask(unmasked), y),
        "Keras by hand, 3 tasks": fit(by_hand(build(), pooling), y),
        "three lp models of 1 task": lambda: [one() for one in singles] and None,
        **{f"lp, {way}": fit(multitask(balancing=way), y) for way in (*LOSSY, *GRADIENT)},
    }


def turn(runs: dict[str, Fit], order: int) -> dict[str, Any]:
    """Seconds of an epoch of each variant, on the clock and of the processor."""
    found = {}
    for name in list(runs)[::order]:
        clock, processor = time.perf_counter(), time.process_time()
        runs[name]()
        times = time.perf_counter() - clock, time.process_time() - processor
        found[name] = dict(zip(KINDS, (round(one, 5) for one in times), strict=True))
    return {"seconds": found}


def measure(network: str, rounds: int, journal: Journal) -> dict[str, dict[str, list[float]]]:
    """The seconds of all turns by variant and kind."""
    runs: dict[str, Fit] = {}

    def measured(number: int) -> dict[str, Any]:
        if not runs:
            keras.utils.set_random_seed(0)
            runs.update(variants(network, STEPS[network]))
            for run in runs.values():
                run()
        print(f"{network}: turn {number + 1} of {rounds}", flush=True)
        return turn(runs, order=1 if number % 2 else -1)

    turns = [
        journal.run(lambda n=number: measured(n), network=network, turn=number)["seconds"]
        for number in range(rounds)
    ]
    keras.backend.clear_session()
    return {name: {kind: [one[name][kind] for one in turns] for kind in KINDS} for name in turns[0]}


PAIRS = [  # what, with what, goal
    ("lp, 3 tasks", "three lp models of 1 task", 0.45),
    ("lp, 3 tasks", "lp, 3 tasks, masks off", 1.03),
    ("lp, 3 tasks, half of the labels missing", "lp, 3 tasks, masks off", 1.03),
    ("lp, 3 tasks", "Keras by hand, 3 tasks", 1.02),
    *((f"lp, {way}", "lp, 3 tasks", None) for way in LOSSY),
    *((f"lp, {way}", "lp, 3 tasks", 1 + 0.6 * len(TASKS)) for way in GRADIENT),
]


def ratio(of: dict, name: str, peer: str, kind: str) -> tuple[float, float, float]:
    """The median of the ratios of the turns, and their quartiles."""
    ratios = np.divide(of[name][kind], of[peer][kind])
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return middle, low, high


def ratio_table(of: dict) -> str:
    rows = []
    for name, peer, goal in PAIRS:
        middle, low, high = ratio(of, name, peer, "processor")
        reached = "" if goal is None else "yes" if middle <= goal else "no"
        goal = "" if goal is None else f"{goal:.2f}x"
        clock = f"{ratio(of, name, peer, 'clock')[0]:.2f}x"
        rows.append(
            [name, peer, f"{middle:.3f}x", f"{low:.2f} to {high:.2f}", goal, reached, clock]
        )
    return table(["", "of", "time", "quartiles", "goal", "reached", "on the clock"], rows)


def time_table(of: dict, steps: int) -> str:
    rows = [
        [name, *(f"{1000 * statistics.median(v[k]) / steps:.1f}" for k in reversed(KINDS))]
        for name, v in of.items()
    ]
    return table(["", "step, ms", "on the clock, ms"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="turns of each variant")
    parser.add_argument("--network", choices=NETWORKS, help="this one alone, no report")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    settings = {"steps": STEPS, "batch": BATCH, "tasks": TASKS}
    networks = [arguments.network] if arguments.network else list(NETWORKS)
    results: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds, **settings}
    blocks = [
        "# What a step with several tasks costs",
        f"    python benchmarks/multitask_step.py --rounds {arguments.rounds}",
        f"Machine: {results['machine']}. Batches of {BATCH}, {len(TASKS)} tasks, one thread. Each "
        f"variant takes {arguments.rounds} turns, a `fit` of one epoch each; times are medians, a "
        "ratio is the median of the ratios of the turns. Time is that of the processor: on one "
        "thread it is the time on the clock of a free machine, and this one was busy with other "
        "work.",
    ]
    for network in networks:
        file = f"multitask_step_{network.split()[0]}.json"
        of = measure(network, arguments.rounds, Journal(arguments.out / "partial" / file, settings))
        results[network] = of
        blocks += [
            f"## {network.capitalize()}: {NETWORKS[network][0]().count_params():,} weights",
            ratio_table(of),
            time_table(of, STEPS[network]),
        ]
    text = "\n\n".join(blocks)
    if arguments.network:
        print(text)
    else:
        write(arguments.out / "multitask_step", text, results)


if __name__ == "__main__":
    tf.get_logger().setLevel("ERROR")
    main()
