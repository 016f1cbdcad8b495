"""What does a training step with several tasks cost?

    python benchmarks/multitask_step.py

Three tasks on the same pictures, batches of 32, with two networks: a small convolutional network on
32x32 pictures, and one so small that the overhead shows. Compared:

- one model of three tasks with three models of one task;
- masked losses and metrics with the same model whose tasks do not mask;
- the whole with a hand-written Keras model with the same losses and metrics;
- each way to balance by gradients with the plain step.

Each variant trains an epoch of `fit` per turn, in turn, on one thread. A ratio is the median of the
ratios of the turns, of processor time: on one thread that is the time on the clock of a free
machine. The weights and labels are random: they do not change the time.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from lib import timing
from lib.arguments import command, parser
from lib.journal import Journal
from lib.machine import machine, one_thread
from lib.multitask import model_of, plain_model
from lib.results import page, table, write

import keras_lp as lp

TASKS = {"colour": 10, "shape": 10, "place": 5}
LOSSY = ("uncertainty",)
GRADIENT = ("gradnorm", "pcgrad", "cagrad", "mgda", "imtl_g")
BATCH = 32
STEPS = {"convolutional": 20, "one dense layer": 50}  # of an epoch
Fit = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Unmasked(lp.Classification):
    """A task that takes it that all labels are there."""

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


def variants(network: str, steps: int) -> dict[str, Fit]:
    """Returns what trains each variant for an epoch."""
    build, pooling = NETWORKS[network]
    random = np.random.default_rng(0)
    count = BATCH * steps
    shape = build().input_shape[1:]
    x = random.uniform(0, 255 if len(shape) == 3 else 1, (count, *shape)).astype("float32")
    y = {name: random.integers(0, n, count) for name, n in TASKS.items()}
    some = {name: np.where(random.uniform(size=count) < 0.5, -1, y[name]) for name in TASKS}

    def fit(model: keras.Model, labels: Any) -> Fit:
        return lambda: model.fit(x, labels, batch_size=BATCH, shuffle=False, verbose=0) and None

    def multitask(tasks: Any = TASKS, **options: Any) -> lp.Model:
        return model_of(build, tasks, pooling=pooling, **options)

    singles = [fit(multitask({name: n}), y[name]) for name, n in TASKS.items()]
    metrics = {n: [keras.metrics.SparseCategoricalAccuracy(name="accuracy")] for n in TASKS}
    by_hand = plain_model(build, TASKS, pooling, metrics=metrics)
    unmasked = {name: Unmasked(n) for name, n in TASKS.items()}
    equal = multitask()
    return {
        "lp, 3 tasks": fit(equal, y),
        "lp, 3 tasks, half of the labels missing": fit(equal, some),
        "lp, 3 tasks, masks off": fit(multitask(unmasked), y),
        "Keras by hand, 3 tasks": fit(by_hand, y),
        "three lp models of 1 task": lambda: [one() for one in singles] and None,
        **{f"lp, {way}": fit(multitask(balancing=way), y) for way in (*LOSSY, *GRADIENT)},
    }


def measure(network: str, rounds: int, journal: Journal) -> dict[str, dict[str, list[float]]]:
    """Returns the seconds of all turns by variant and kind."""
    runs: dict[str, Fit] = {}

    def turn(number: int) -> dict[str, Any]:
        if not runs:
            keras.utils.set_random_seed(0)
            runs.update(variants(network, STEPS[network]))
            timing.in_turn(runs, 1)  # traces
        print(f"{network}: turn {number + 1} of {rounds}", flush=True)
        found = timing.in_turn(runs, 1, warm_up=0, seed=number)
        return {"seconds": {name: one._asdict() for name, (one,) in found.items()}}

    turns = [
        journal.run(partial(turn, number), network=network, turn=number)["seconds"]
        for number in range(rounds)
    ]
    keras.backend.clear_session()
    kinds = ("clock", "processor")
    return {name: {kind: [one[name][kind] for one in turns] for kind in kinds} for name in turns[0]}


PAIRS = [  # what, with what, goal
    ("lp, 3 tasks", "three lp models of 1 task", 0.45),
    ("lp, 3 tasks", "lp, 3 tasks, masks off", 1.03),
    ("lp, 3 tasks, half of the labels missing", "lp, 3 tasks, masks off", 1.03),
    ("lp, 3 tasks", "Keras by hand, 3 tasks", 1.02),
    *((f"lp, {way}", "lp, 3 tasks", None) for way in LOSSY),
    *((f"lp, {way}", "lp, 3 tasks", 1 + 0.6 * len(TASKS)) for way in GRADIENT),
]


def ratio_table(of: dict[str, Any]) -> str:
    rows = []
    for name, peer, goal in PAIRS:
        found, base = of[name], of[peer]
        middle, low, high = timing.ratio(found["processor"], base["processor"])
        clock, *_ = timing.ratio(found["clock"], base["clock"])
        reached = ["", ""] if goal is None else [f"{goal:.2f}x", "yes" if middle <= goal else "no"]
        quartiles = f"{low:.2f} to {high:.2f}"
        rows.append([name, peer, f"{middle:.3f}x", quartiles, *reached, f"{clock:.2f}x"])
    return table(["", "of", "time", "quartiles", "goal", "reached", "on the clock"], rows)


def time_table(of: dict[str, Any], steps: int) -> str:
    def shown(seconds: list[float]) -> str:
        return f"{1000 * statistics.median(seconds) / steps:.1f}"

    rows = [[name, shown(one["processor"]), shown(one["clock"])] for name, one in of.items()]
    return table(["", "step, ms", "on the clock, ms"], rows)


def report(results: dict[str, Any]) -> str:
    blocks = []
    for network, (build, _) in NETWORKS.items():
        blocks += [
            f"## {network.capitalize()}: {build().count_params():,} weights",
            ratio_table(results[network]),
            time_table(results[network], STEPS[network]),
        ]
    return page(
        "What a step with several tasks costs",
        results["command"],
        results["machine"],
        __doc__,
        f"Each variant takes {results['rounds']} turns; times are medians.",
        *blocks,
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=20, help="turns of each variant")
    given = arguments.parse_args()
    one_thread()
    tf.get_logger().setLevel("ERROR")
    settings = {"steps": STEPS, "batch": BATCH, "tasks": TASKS}
    results: dict[str, Any] = {
        "command": command(__file__, given, "rounds"),
        "machine": machine(),
        "rounds": given.rounds,
        **settings,
    }
    for network in NETWORKS:
        path = given.out / "partial" / f"multitask_step_{network.split()[0]}.json"
        results[network] = measure(network, given.rounds, Journal(path, settings))
    write(given.out / "multitask_step", report(results), results)


if __name__ == "__main__":
    main()
