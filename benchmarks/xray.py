"""Does transfer help, and with how many pictures? Transfer against training from scratch.

    TFDS_DATA_DIR=... python benchmarks/xray.py --weights mobilenet_2_5_224_tf_no_top.h5
    TFDS_DATA_DIR=... python benchmarks/xray.py --study scripts

Two studies, each over several numbers of training pictures and several seeds:

- xray: ImageNet to chest X-rays, MobileNet with alpha 0.25 at 96 by 96 pixels on pneumonia_mnist:
  normal or pneumonia, 624 test pictures, the 524 of the split `val` for validation.
- scripts: the digits of mnist to those of two other scripts, cmaterdb/bangla and
  cmaterdb/devanagari, with a small network. A negative control: the same from fashion_mnist, whose
  clothes have little to do with digits. Each network to transfer from trains for one epoch.
  Pictures of cmaterdb are inverted (white on black, as in mnist) and have one channel; those of the
  sources are enlarged from 28 to 32 pixels. 500 of the training pictures are for validation. All
  heads see the features flattened.

"From scratch" is the same network, untrained, all of it trained. There BatchNormalization averages
with a momentum of 0.9: at the 0.99 of Keras the statistics lag behind in so few steps.

Every approach gets the same pictures and steps: 8 epochs of 1,000 pictures, fewer ones repeated, in
batches of 40; Adam, its rate falling to zero along a cosine. Nothing is augmented; in the loss each
class counts the same. The rate is one of three for each approach and number of pictures: the best
on the validation pictures with the first seed. A seed changes the training pictures (drawn at
random, each class in its share), the initial weights and the order. The test split chooses nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from lib.arguments import command, parser
from lib.journal import Run
from lib.machine import machine
from lib.networks import SIZE, pretrain, short_averages, untrained
from lib.plots import curves, panels
from lib.problems import XRAY, XRAY_LABELS, Problem, script_problem, xray_problem
from lib.results import page, write
from lib.scores import VERDICTS, unique
from lib.study import (
    METRICS,
    Approach,
    Case,
    difference_table,
    learn,
    rate_table,
    score_table,
    sweep,
)

import keras_lp as lp

SHOWN, BATCH, EPOCHS = 1000, 40, 8  # pictures of an epoch
LOW, HIGH = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)  # rates; which were seen on `val`, one seed
SCRATCH = "from scratch"
SCRIPTS = ("cmaterdb/bangla", "cmaterdb/devanagari")
SOURCES = ("mnist", "fashion_mnist")
XRAY_SIZES, SCRIPT_SIZES = (40, 200, 1000), (100, 200, 500, 1000)


@dataclasses.dataclass(frozen=True)
class Study:
    """The texts of a study, the files of its results, and (problem, metric) of each panel."""

    title: str
    file: str
    panels: tuple[tuple[str, str], ...]
    unit: str
    per: int = 1  # the unit counts pictures divided by this

    def cases(self, runs: list[Run], problem: str, metric: str) -> list[Case]:
        sizes = unique(runs, "examples")
        labels = [f"{n // self.per:,} {self.unit}" for n in sizes]
        return [Case(problem, n, metric, w) for n, w in zip(sizes, labels, strict=True)]


STUDIES = {
    "xray": Study(
        "ImageNet to chest X-rays",
        "xray",
        ((XRAY, "balanced_accuracy"), (XRAY, "auc")),
        "pictures",
    ),
    "scripts": Study(
        "Digits to digits of other scripts",
        "scripts_transfer",
        tuple((name, "accuracy") for name in SCRIPTS),
        "a class",
        per=10,
    ),
}


def cosine(rate: float) -> keras.optimizers.schedules.CosineDecay:
    return keras.optimizers.schedules.CosineDecay(rate, EPOCHS * SHOWN // BATCH)


def approach(name: str, rates: Sequence[float], build: Callable[..., lp.Model]) -> Approach:
    def fit(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> lp.Model:
        model = build(learning_rate=cosine(rate))
        model.fit(x, y, epochs=EPOCHS, **options)
        return model

    return Approach(name, rates, fit)


def xray_approaches(weights: Path) -> list[Approach]:
    build = functools.partial(
        lp.transfer_model,
        "MobileNet",
        XRAY_LABELS,
        input_shape=(28, 28, 1),
        image_size=SIZE,
        backbone_kwargs={"alpha": 0.25},
    )

    def scratch(**options: Any) -> lp.Model:
        return short_averages(build(weights=None, trainable="all", **options))

    transfer = functools.partial(build, weights=weights)
    return [approach(SCRATCH, HIGH, scratch), approach("transfer", HIGH, transfer)]


def script_approaches(folder: Path) -> list[Approach]:
    """Takes the folder that holds `SOURCE.keras` for each source."""
    found = [approach(SCRATCH, HIGH, untrained)]
    for source in SOURCES:
        path = folder / f"{source}.keras"
        build = functools.partial(lp.transfer_model, path, 10, pooling="flatten")
        found.append(approach(f"transfer from {source}", LOW, build))
    return found


def runs_of(
    problems: Sequence[Problem], approaches: Sequence[Approach], sizes: Sequence[int], seeds: int
) -> list[Run]:
    options = {"shown": SHOWN, "batch_size": BATCH, "verbose": 0}
    return [
        run
        for problem in problems
        for approach in approaches
        for examples in sizes
        for run in sweep(
            functools.partial(learn, problem, approach, examples, **options), approach.rates, seeds
        )
    ]


def results_of(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Runs a study."""
    start, more = time.perf_counter(), {}
    if name == "xray":
        approaches = xray_approaches(given.weights)
        runs = runs_of([xray_problem(given.data_dir)], approaches, XRAY_SIZES, given.seeds)
    else:
        problems = [script_problem(script, given.data_dir) for script in SCRIPTS]
        with tempfile.TemporaryDirectory() as folder:
            paths = {source: Path(folder) / f"{source}.keras" for source in SOURCES}
            more["pretrained"] = {s: pretrain(s, given.data_dir, paths[s]) for s in SOURCES}
            approaches = script_approaches(Path(folder))
            runs = runs_of(problems, approaches, SCRIPT_SIZES, given.seeds)
    given.study = name
    return {
        "command": command(__file__, given, "study", *(["weights"] * (name == "xray")), "seeds"),
        "machine": machine("scikit-learn"),
        "seconds": round(time.perf_counter() - start),
        "epochs": EPOCHS,
        "pictures an epoch": SHOWN,
        "batch": BATCH,
        **more,
        "runs": runs,
    }


def report(results: dict[str, Any]) -> str:
    runs, sources = results["runs"], results.get("pretrained", {})
    study = STUDIES["scripts" if sources else "xray"]
    learned = [f"{100 * found:.1f} % on {source}" for source, found in sources.items()]

    def tables(make: Any, title: str) -> list[str]:
        return [
            make(runs, title.format(p, METRICS[metric][0]), study.cases(runs, p, metric))
            for p, metric in study.panels
        ]

    return page(
        study.title,
        results["command"],
        results["machine"],
        __doc__,
        f"The study took {results['seconds'] / 60:.0f} minutes. Mean and standard deviation over "
        f"{len(unique(runs, 'seed'))} seeds, on the whole test split:",
        *tables(score_table, "{}: test {}"),
        f"![Sample efficiency]({study.file}.png)",
        "## Where transfer helps, and where not",
        f'Minus "from scratch" with the same training pictures, seed by seed. {VERDICTS}',
        *tables(functools.partial(difference_table, baseline=SCRATCH), "{}: {}"),
        "## Rates",
        *dict.fromkeys(tables(rate_table, "{}: rate")),
        "Seconds: median, of one training, with building the model."
        + (f" Accuracy of the networks to transfer from: {', '.join(learned)}." if learned else ""),
    )


def plot(study: Study, runs: list[Run], path: Path) -> None:
    approaches = unique(runs, "approach")
    with panels(path, len(study.panels)) as axes:
        for axis, (problem, metric) in zip(axes, study.panels, strict=True):
            cases = study.cases(runs, problem, metric)
            ticks = [case.examples // study.per for case in cases]
            found = {name: [case.chosen(runs, name) for case in cases] for name in approaches}
            xlabel = "training pictures" + (" a class" if study.per > 1 else "")
            ylabel = f"test {METRICS[metric][0]}"
            curves(axis, ticks, found, title=problem, xlabel=f"{xlabel} (log)", ylabel=ylabel)


def main() -> None:
    arguments = parser(__doc__, seeds=5, data_dir=True)
    arguments.add_argument("--study", choices=list(STUDIES), help="one of them (default: both)")
    arguments.add_argument("--weights", type=Path, help="h5 file of MobileNet, alpha 0.25, no top")
    given = arguments.parse_args()
    if given.study != "scripts" and given.weights is None:
        arguments.error("the study xray needs `--weights`. Pass --weights FILE.")
    tf.get_logger().setLevel("ERROR")
    for name in [given.study] if given.study else STUDIES:
        results, stem = results_of(name, given), given.out / STUDIES[name].file
        write(stem, report(results), results)
        plot(STUDIES[name], results["runs"], stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
