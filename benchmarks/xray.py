"""Does transfer help, and with how many pictures? Transfer against training from scratch.

    TFDS_DATA_DIR=... python benchmarks/xray.py --weights mobilenet_2_5_224_tf_no_top.h5
    TFDS_DATA_DIR=... python benchmarks/xray.py --study scripts

Two studies, each over several numbers of training pictures and several seeds:

- xray: ImageNet to chest X-rays, MobileNet with alpha 0.25 on pneumonia_mnist.
- scripts: the digits of mnist to those of two other scripts, cmaterdb/bangla and
  cmaterdb/devanagari, with a small network. A negative control: the same from
  fashion_mnist, whose clothes have little to do with digits.

"From scratch" is the same network, untrained, all of it learning. All approaches get the same
pictures and steps: an epoch shows 1,000 pictures, so that few ones come again, and the rate falls
to zero along a cosine. Nothing is augmented. The rate is tuned, one of three for each approach and
number of pictures: the best on the validation pictures, with the first seed. A seed changes the
training pictures (drawn at random, each class in its share), the initial weights and the order. A
test split never chooses anything.

Writes for each study tables (Markdown), all runs (JSON) and a plot of sample efficiency (PNG).
"""

from __future__ import annotations

import argparse
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
from common import RESULTS, machine, table, write
from studies import (
    METRICS,
    XRAY_LABELS,
    Approach,
    Case,
    Problem,
    Run,
    difference,
    draw,
    learn,
    normalisations,
    rate_table,
    score_table,
    scores,
    spread,
    sweep,
    unique,
    values,
    xray_problem,
)

import keras_lp as lp

tf.get_logger().setLevel("ERROR")

SHOWN = 1000  # pictures an epoch
BATCH = 40
EPOCHS = 8
LOW = (3e-4, 1e-3, 3e-3)  # rates; which three an approach gets was seen with one seed on `val`
HIGH = (1e-3, 3e-3, 1e-2)
SCRATCH = "from scratch"
XRAY_SIZES = (40, 200, 1000)

SCRIPTS = ("cmaterdb/bangla", "cmaterdb/devanagari")
SOURCES = ("mnist", "fashion_mnist")
A_CLASS = (10, 20, 50, 100)  # examples a class
HELD_OUT = 500  # training pictures of cmaterdb to choose the rate on


def cosine(rate: float) -> keras.optimizers.schedules.CosineDecay:
    return keras.optimizers.schedules.CosineDecay(rate, EPOCHS * SHOWN // BATCH)


def study(
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


# ImageNet to chest X-rays


def xray_approaches(weights: Path) -> list[Approach]:
    def build(rate: float, **options: Any) -> keras.Model:
        return lp.transfer_model(
            "MobileNet",
            XRAY_LABELS,
            input_shape=(28, 28, 1),
            image_size=96,
            backbone_kwargs={"alpha": 0.25},
            learning_rate=cosine(rate),
            **options,
        )

    def scratch(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
        model = build(rate, weights=None, trainable="all")
        # Keras averages the statistics over some 100 steps (0.99), which is too slow for 200: the
        # network then guesses one class for all of `test`.
        for layer in normalisations(model):
            layer.momentum = 0.9
        model.fit(x, y, epochs=EPOCHS, **options)
        return model

    def transfer(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
        model = build(rate, weights=weights)
        model.fit(x, y, epochs=EPOCHS, **options)
        return model

    return [
        Approach(SCRATCH, HIGH, scratch),
        Approach("transfer", HIGH, transfer),
    ]


# mnist, and fashion_mnist as a control, to other scripts


def script_problem(name: str, data_dir: str | None) -> Problem:
    """cmaterdb is black on white in three equal channels: here in one, white on black as mnist."""
    parts = {}
    for split in ("train", "test"):
        x, y = lp.load_dataset(name, split=split, batch_size=-1, data_dir=data_dir)
        parts[split] = 255 - x[..., :1], y
    val, train = draw(parts["train"], HELD_OUT, seed=0)
    return Problem(name, [str(digit) for digit in range(10)], train, val, parts["test"])


def small_network() -> keras.Model:
    """An untrained network without a head, for grey pictures of 32 by 32 from 0 to 255."""
    layers = [keras.Input((32, 32, 1)), keras.layers.Rescaling(1 / 255)]
    for i, (filters, strides) in enumerate([(32, 2), (64, 2), (64, 1)], start=1):
        layers += [
            keras.layers.Conv2D(filters, 3, strides, "same", name=f"block{i}_conv"),
            keras.layers.GroupNormalization(8, name=f"block{i}_norm"),
            keras.layers.ReLU(name=f"block{i}_relu"),
        ]
    return keras.Sequential(layers, name="small_network")


def untrained(**options: Any) -> keras.Model:
    return lp.transfer_model(
        small_network(), 10, pretrained=False, trainable="all", pooling="flatten", **options
    )


def pretrain(source: str, data_dir: str | None, path: Path) -> float:
    """Trains on `source`, enlarged from 28 to 32 pixels, and saves; returns the test accuracy."""
    parts = {}
    for split in ("train", "test"):
        x, y = lp.load_dataset(source, split=split, batch_size=-1, data_dir=data_dir)
        parts[split] = np.asarray(keras.layers.Resizing(32, 32)(x)), y
    keras.utils.set_random_seed(0)
    model = untrained(dropout=0.5)
    model.fit(*parts["train"], batch_size=64, verbose=0)
    model.save(path)
    return scores(model, parts["test"])["accuracy"]


def script_approaches(folder: Path) -> list[Approach]:
    """The folder holds `SOURCE.keras` for each source."""

    def scratch(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
        model = untrained(learning_rate=cosine(rate))
        model.fit(x, y, epochs=EPOCHS, **options)
        return model

    def transfer(path: Path) -> Callable[..., keras.Model]:
        def fit(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
            model = lp.transfer_model(path, 10, pooling="flatten", learning_rate=cosine(rate))
            model.fit(x, y, epochs=EPOCHS, **options)
            return model

        return fit

    return [
        Approach(SCRATCH, HIGH, scratch),
        *(
            Approach(f"transfer from {source}", LOW, transfer(folder / f"{source}.keras"))
            for source in SOURCES
        ),
    ]


# Results


def difference_table(runs: list[Run], title: str, cases: Sequence[Case]) -> str:
    """Each approach minus "from scratch", seed by seed, and where it is not better."""
    rows, without = [], []
    for approach in unique(runs, "approach"):
        if approach == SCRATCH:
            continue
        row = [approach]
        for case in cases:
            change, word = difference(runs, approach, SCRATCH, case)
            row.append(f"{change}, {word}")
            if word != "better":
                without.append(f"{approach} with {case.label}")
        rows.append(row)
    text = table([title, *(case.label for case in cases)], rows)
    return f"{text}\n\nNot better than from scratch: {'; '.join(without) or 'nothing here'}."


def plot(
    runs: list[Run],
    panels: Sequence[tuple[str, str]],
    path: Path,
    per: int = 1,
    xlabel: str = "training pictures",
) -> None:
    """Draws a panel for each (problem, metric): mean and standard deviation by examples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = [("#5f6368", "o-"), ("#1a73e8", "s-"), ("#e8710a", "^--"), ("#12a594", "v:")]
    figure, axes = plt.subplots(1, len(panels), figsize=(9.5, 4), layout="constrained")
    sizes = unique(runs, "examples")
    ticks = [size // per for size in sizes]
    for axis, (problem, metric) in zip(axes, panels, strict=True):
        for approach, (colour, style) in zip(unique(runs, "approach"), styles, strict=False):
            cases = [Case(problem, size, metric, "") for size in sizes]
            found = [values(runs, approach, case) for case in cases]
            mean = np.array([one.mean() for one in found])
            band = np.array([spread(one) for one in found])
            axis.fill_between(ticks, mean - band, mean + band, color=colour, alpha=0.15, lw=0)
            axis.plot(ticks, mean, style, color=colour, label=approach, markersize=5)
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.set(title=problem, xlabel=f"{xlabel} (log)", ylabel=f"test {METRICS[metric][0]}")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"Plot: {path}")


def markdown(
    results: dict[str, Any],
    title: str,
    intro: str,
    plot_name: str,
    panels: Sequence[tuple[str, str]],
    columns: dict[int, str],
    details: str,
) -> str:
    """Puts the tables together.

    Args:
        results: what goes into the JSON file.
        title: the heading.
        intro: what is learned.
        plot_name: the file of the plot, beside this one.
        panels: the pairs of problem and metric.
        columns: the numbers of training pictures, and how they are called.
        details: what only this study does.
    """
    runs = results["runs"]
    seeds = len(unique(runs, "seed"))
    problems = unique(runs, "problem")

    def cases(problem: str, metric: str) -> list[Case]:
        return [Case(problem, n, metric, label) for n, label in columns.items()]

    blocks = [
        f"# {title}",
        f"    {results['command']}",
        f"Machine: {results['machine']}. All of it took {results['seconds'] / 60:.0f} minutes.",
        intro,
        *(
            score_table(runs, f"{problem}: test {METRICS[metric][0]}", cases(problem, metric))
            for problem, metric in panels
        ),
        f"Mean and standard deviation over {seeds} seeds, on the whole test split.",
        f"![Sample efficiency]({plot_name})",
        "## Where transfer helps, and where not",
        'Minus "from scratch" with the same training pictures, seed by seed. "Better" and '
        '"worse": zero is outside the 95 % interval (Student\'s t) of the mean over the seeds. '
        "That covers the seeds; all of them share the test pictures.",
        *(
            difference_table(runs, f"{problem}: {METRICS[metric][0]}", cases(problem, metric))
            for problem, metric in panels
        ),
        "## How",
        "A seed changes the training pictures (drawn at random, each class in its share), the "
        f"initial weights and the order. Every approach gets {EPOCHS} epochs of {SHOWN:,} "
        f"pictures, fewer ones repeated, in batches of {BATCH}: {EPOCHS * SHOWN // BATCH} steps "
        "of Adam, whose rate falls to zero along a cosine. Nothing is augmented; in the loss each "
        "class counts the same. The rate is one of three, chosen for each approach and number of "
        f"pictures by the {METRICS[panels[0][1]][0].split(',')[0]} on validation pictures with the "
        "first seed, never on the test split; which three an approach gets was seen on the same. "
        f"{details}",
        *(
            rate_table(runs, f"{problem}: rate", cases(problem, panels[0][1]))
            for problem in problems
        ),
        "Seconds: median, of one training, with building the model.",
    ]
    return "\n\n".join(blocks)


def results_of(command: str, runs: list[Run], seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "command": f"python benchmarks/xray.py {command}",
        "machine": machine("scikit-learn"),
        "seconds": round(seconds),
        "epochs": EPOCHS,
        "pictures an epoch": SHOWN,
        "batch": BATCH,
        **more,
        "runs": runs,
    }


def report_xray(results: dict[str, Any], out: Path) -> None:
    panels = [("pneumonia_mnist", "balanced_accuracy"), ("pneumonia_mnist", "auc")]
    text = markdown(
        results,
        "ImageNet to chest X-rays",
        "MobileNet (alpha 0.25, 96 by 96 pixels) with ImageNet weights on pneumonia_mnist: normal "
        "or pneumonia, 624 test pictures.",
        "xray.png",
        panels,
        {n: f"{n:,} pictures" for n in unique(results["runs"], "examples")},
        "These are the 524 of the split `val`, more than some of the networks were trained on. "
        "From scratch, BatchNormalization averages its statistics with a momentum of 0.9: "
        "at the 0.99 of Keras they lag too far behind in so few steps.",
    )
    write(out / "xray", text, results)
    plot(results["runs"], panels, out / "xray.png")


def report_scripts(results: dict[str, Any], out: Path) -> None:
    learned = " and ".join(
        f"{100 * accuracy:.1f} % on {source}" for source, accuracy in results["pretrained"].items()
    )
    panels = [(name, "accuracy") for name in SCRIPTS]
    text = markdown(
        results,
        "Digits to digits of other scripts",
        "A small network that was trained on mnist meets the ten digits of Bangla and of "
        "Devanagari. The negative control: the same from fashion_mnist.",
        "scripts_transfer.png",
        panels,
        {n: f"{n // 10} a class" for n in unique(results["runs"], "examples")},
        f"These are {HELD_OUT} held out of the training split. The networks to transfer from were "
        f"trained once, one epoch on all training pictures ({learned}, test "
        "split). Pictures of cmaterdb are inverted (white on black, as in mnist) and have one "
        "channel; those of the sources are enlarged from 28 to 32 pixels. All heads see the "
        "features flattened.",
    )
    write(out / "scripts_transfer", text, results)
    plot(results["runs"], panels, out / "scripts_transfer.png", 10, "training pictures a class")


def run_xray(weights: Path, data_dir: str | None, seeds: int, out: Path) -> None:
    start = time.perf_counter()
    runs = study([xray_problem(data_dir)], xray_approaches(weights), XRAY_SIZES, seeds)
    command = f"--study xray --weights {weights.name} --seeds {seeds}"
    report_xray(results_of(command, runs, time.perf_counter() - start), out)


def run_scripts(data_dir: str | None, seeds: int, out: Path) -> None:
    start = time.perf_counter()
    problems = [script_problem(name, data_dir) for name in SCRIPTS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        learned = {s: pretrain(s, data_dir, folder / f"{s}.keras") for s in SOURCES}
        print(f"Pretrained; accuracy: {learned}", flush=True)
        sizes = [10 * count for count in A_CLASS]
        runs = study(problems, script_approaches(folder), sizes, seeds)
    command = f"--study scripts --seeds {seeds}"
    report_scripts(results_of(command, runs, time.perf_counter() - start, pretrained=learned), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=["xray", "scripts"], help="one of them (else both)")
    parser.add_argument("--weights", type=Path, help="h5 file of MobileNet, alpha 0.25, no top")
    parser.add_argument("--data-dir", help="where TFDS keeps its data (else TFDS_DATA_DIR)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if arguments.study != "scripts" and arguments.weights is None:
        parser.error("the study xray needs --weights FILE")

    if arguments.study != "scripts":
        run_xray(arguments.weights, arguments.data_dir, arguments.seeds, arguments.out)
    if arguments.study != "xray":
        run_scripts(arguments.data_dir, arguments.seeds, arguments.out)


if __name__ == "__main__":
    main()
