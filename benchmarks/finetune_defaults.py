r"""Are the default rates of fine-tuning near the best of five?

    TFDS_DATA_DIR=... python benchmarks/finetune_defaults.py \
        --mobilenet mobilenet_2_5_224_tf_no_top.h5 --cifar10 cifar10_subset.npz

500 pictures of cifar10_subset with MobileNet (alpha 0.25, ImageNet weights, 96 pixels), 500 digits
of cmaterdb/bangla with a small network that learned mnist, and 300 questions of trec with a small
text network that learned clinc_oos. The head is solved by `lp.fit_head`, then 10 epochs of each way
at each rate:

- finetune_model: `lp.finetune_model(model, learning_rate=rate)` and `fit`.
- LoRA: `lp.finetune_model(model, lora=lp.LoRA(), learning_rate=rate)` and `fit`.
- two-phase: `lp.fit_two_phase(model, data, epochs=10, learning_rate=rate)`, the validation split
  given, so that the best epoch stays.

"found" takes the valley of `lp.find_learning_rate` for the model with its solved head. A seed
changes the examples and the order. Rates are compared on the validation split.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from lib.arguments import command, parser
from lib.journal import Journal, Run
from lib.machine import machine
from lib.networks import Setting, accuracy, settings
from lib.problems import BANGLA, CIFAR, draw
from lib.results import RESULTS, page, table, write
from lib.scores import mean_and_deviation, select, unique

import keras_lp as lp

EPOCHS = 10
CASES = {CIFAR: 500, BANGLA: 500, "trec": 300}
RATES = {
    "finetune_model": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "LoRA": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "two-phase": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
HEAD, FOUND = "head", "found"
WAYS = [(HEAD, 0.0), *((way, rate) for way in RATES for rate in (*RATES[way], FOUND))]


def prepare(way: str, model: keras.Model, rate: float) -> keras.Model:
    lora = lp.LoRA() if way == "LoRA" else None
    return lp.finetune_model(model, learning_rate=rate, lora=lora)


def fit(way: str, rate: float | str, setting: Setting, data: Any) -> tuple[keras.Model, float]:
    """Solves the head and trains on in one way; returns the model and the rate."""
    model = setting.build()
    if way == "two-phase" and rate != FOUND:
        val = setting.problem.val
        lp.fit_two_phase(
            model, data, epochs=EPOCHS, learning_rate=rate, validation_data=val, verbose=0
        )
        return model, rate
    lp.fit_head(model, data, verbose=0)
    if way == HEAD:
        return model, 0.0
    if rate == FOUND:
        found = lp.find_learning_rate(prepare(way, model, 1e-3), data).valley
        return fit(way, 2 * found if way == "two-phase" else found, setting, data)
    model = prepare(way, model, rate)
    model.fit(*data, epochs=EPOCHS, verbose=0)
    return model, rate


def learn(setting: Setting, way: str, rate: float | str, seed: int) -> Run:
    problem = setting.problem
    data, _ = draw(problem.train, CASES[problem.name], seed)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    model, used = fit(way, rate, setting, data)
    run = {"used": used, "val": accuracy(model, problem.val), "test": accuracy(model, problem.test)}
    print(problem.name, way, rate, seed, run, flush=True)
    return run


def study(every: list[Setting], seeds: int, journal: Journal) -> None:
    for setting, seed, (way, rate) in itertools.product(every, range(seeds), WAYS):
        key = {"problem": setting.problem.name, "way": way, "rate": rate, "seed": seed}
        journal.run(functools.partial(learn, setting, way, rate, seed), **key)


def way_table(runs: list[Run], way: str, part: str) -> str:
    columns = [(HEAD, 0.0), *((way, rate) for rate in (*RATES[way], FOUND))]
    rows = []
    for problem, count in CASES.items():
        found = [select(runs, problem=problem, way=name, rate=rate) for name, rate in columns]
        cells = [mean_and_deviation([100 * run[part] for run in of]) for of in found]
        rows.append([f"{problem}, {count}", *cells])
    return table([way, HEAD, *(f"{rate:g}" for rate in RATES[way]), FOUND], rows)


def report(results: dict[str, Any]) -> str:
    runs = results["runs"]
    found = []
    for way, problem in itertools.product(RATES, CASES):
        used = [run["used"] for run in select(runs, problem=problem, way=way, rate=FOUND)]
        found.append(f"- {way}, {problem}: {', '.join(f'{rate:.1e}' for rate in used)}")
    return page(
        "Default rates of fine-tuning",
        results["command"],
        results["machine"],
        __doc__,
        "Validation accuracy in per cent, mean and standard deviation over "
        f"{len(unique(runs, 'seed'))} seeds:",
        *(way_table(runs, way, "val") for way in RATES),
        "Test accuracy:",
        *(way_table(runs, way, "test") for way in RATES),
        "Rates that were found, by seed:",
        "\n".join(found),
    )


def main() -> None:
    arguments = parser(__doc__, seeds=3, data_dir=True, out=RESULTS / "finetune_defaults")
    arguments.add_argument("--mobilenet", type=Path, required=True, help="h5 file, alpha 0.25")
    arguments.add_argument("--cifar10", type=Path, required=True, help="npz file")
    given = arguments.parse_args()
    tf.get_logger().setLevel("ERROR")
    journal = Journal(given.out.with_suffix(".partial.json"))
    with tempfile.TemporaryDirectory() as folder:
        every = settings(given.mobilenet, given.cifar10, given.data_dir, Path(folder))
        every = [setting for setting in every if setting.problem.name in CASES]
        study(every, given.seeds, journal)
    results = {
        "command": command(__file__, given, "mobilenet", "cifar10", "seeds"),
        "machine": machine(),
        "runs": journal.runs,
    }
    write(given.out, report(results), results)


if __name__ == "__main__":
    main()
