"""Are the default rates of fine-tuning near the best of five?

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

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table, write
from defaults_cases import Setting, settings
from studies import draw, mean_and_spread

import keras_lp as lp

EPOCHS = 10
CASES = {"cifar10_subset": 500, "cmaterdb/bangla": 500, "trec": 300}
RATES = {
    "finetune_model": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "LoRA": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "two-phase": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
HEAD, FOUND = "head", "found"
KEYS = ("problem", "way", "rate", "seed")


def prepare(way: str, model: keras.Model, rate: float) -> keras.Model:
    lora = lp.LoRA() if way == "LoRA" else None
    return lp.finetune_model(model, learning_rate=rate, lora=lora)


def learn(way: str, rate: float | str, setting: Setting, data: Any) -> tuple[keras.Model, float]:
    """Solves the head, and learns on in one way; returns the model and the rate."""
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
        model = prepare(way, model, 1e-3)
        found = lp.find_learning_rate(model, data).valley
        if way == "two-phase":
            return learn(way, 2 * found, setting, data)
        return learn(way, found, setting, data)
    model = prepare(way, model, rate)
    model.fit(*data, epochs=EPOCHS, verbose=0)
    return model, rate


def accuracy(model: keras.Model, data: Any) -> float:
    logits = model.predict(data[0], batch_size=256, verbose=0)
    return float(np.mean(logits.argmax(-1) == data[1]))


def study(every: list[Setting], seeds: int, partial: Path) -> list[dict[str, Any]]:
    """Runs what the file of runs does not have yet."""
    runs = json.loads(partial.read_text()) if partial.exists() else []
    done = {tuple(run[key] for key in KEYS) for run in runs}
    ways = [(HEAD, 0.0), *((way, rate) for way in RATES for rate in (*RATES[way], FOUND))]
    for setting, seed, (way, rate) in itertools.product(every, range(seeds), ways):
        key = setting.problem.name, way, rate, seed
        if key in done:
            continue
        data, _ = draw(setting.problem.train, CASES[setting.problem.name], seed)
        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        model, used = learn(way, rate, setting, data)
        scores = {p: accuracy(model, getattr(setting.problem, p)) for p in ("val", "test")}
        runs.append({**dict(zip(KEYS, key, strict=True)), "used": used, **scores})
        partial.write_text(json.dumps(runs))
        print(runs[-1], flush=True)
    return runs


def select(runs: list[Any], problem: str, way: str, rate: Any, part: str) -> np.ndarray:
    wanted = problem, way, rate
    return np.array([100 * r[part] for r in runs if (r["problem"], r["way"], r["rate"]) == wanted])


def way_table(runs: list[Any], way: str, part: str) -> str:
    columns = [(HEAD, 0.0), *((way, rate) for rate in (*RATES[way], FOUND))]
    rows = [
        [
            f"{problem}, {CASES[problem]}",
            *(
                mean_and_spread(select(runs, problem, name, rate, part), "accuracy")
                for name, rate in columns
            ),
        ]
        for problem in CASES
    ]
    names = [HEAD, *(f"{rate:g}" for rate in RATES[way]), FOUND]
    return table([way, *names], rows)


def report(results: dict[str, Any]) -> str:
    runs = results["runs"]
    parts = __doc__.split("\n\n")
    seeds = len({run["seed"] for run in runs})
    found = [
        f"- {way}, {problem}: "
        + ", ".join(
            f"{run['used']:.1e}"
            for run in runs
            if (run["problem"], run["way"], run["rate"]) == (problem, way, FOUND)
        )
        for way in RATES
        for problem in CASES
    ]
    return "\n\n".join(
        [
            "# Default rates of fine-tuning",
            f"    {results['command']}",
            f"Machine: {results['machine']}.",
            *(part.strip() for part in parts[2:]),
            f"Validation accuracy in per cent, mean and deviation over {seeds} seeds:",
            *(way_table(runs, way, "val") for way in RATES),
            "Test accuracy:",
            *(way_table(runs, way, "test") for way in RATES),
            "Rates that were found, by seed:",
            "\n".join(found),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mobilenet", type=Path, required=True)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune_defaults")
    arguments = parser.parse_args()
    tf.get_logger().setLevel("ERROR")
    with tempfile.TemporaryDirectory() as folder:
        every = settings(arguments.mobilenet, arguments.cifar10, arguments.data_dir, Path(folder))
        every = [setting for setting in every if setting.problem.name in CASES]
        runs = study(every, arguments.seeds, arguments.out.with_suffix(".partial.json"))
    results = {
        "command": f"python benchmarks/finetune_defaults.py --mobilenet {arguments.mobilenet.name} "
        f"--cifar10 {arguments.cifar10.name} --seeds {arguments.seeds}",
        "machine": machine(),
        "runs": runs,
    }
    write(arguments.out, report(results), results)


if __name__ == "__main__":
    main()
