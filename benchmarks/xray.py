"""Does transfer help, and with how many pictures? Transfer against training from scratch.

    TFDS_DATA_DIR=... python benchmarks/xray.py --weights mobilenet_2_5_224_tf_no_top.h5
    TFDS_DATA_DIR=... python benchmarks/xray.py --study scripts

Two studies, each over several numbers of training pictures and several seeds:

- xray: ImageNet to chest X-rays, MobileNet with alpha 0.25 on pneumonia_mnist.
- scripts: the digits of mnist to those of two other scripts, cmaterdb/bangla and
  cmaterdb/devanagari, with a small network. Two controls: the same from fashion_mnist, whose
  clothes have little to do with digits, and a frozen network that learned nothing.

"From scratch" is the same network, untrained, all of it learning. All approaches get the same
pictures and steps: an epoch shows 1,000 pictures, so that few ones come again, and the rate falls
to zero along a cosine. Nothing is augmented. The rate is tuned, one of three for each approach and
number of pictures: the best in mean balanced accuracy on the validation pictures over the first
two seeds. A seed changes the training pictures (drawn at random, each class in its share), the
initial weights and the order. A test split never chooses anything.

Writes for each study tables (Markdown), all runs (JSON) and a plot of sample efficiency (PNG).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table, write
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import train_test_split

import keras_lp as lp

tf.get_logger().setLevel("ERROR")

SHOWN = 1000  # pictures an epoch
BATCH = 40
EPOCHS = 12
TUNING_SEEDS = 2
LOW = (3e-4, 1e-3, 3e-3)  # rates; which three an approach gets was seen with one seed on `val`
HIGH = (1e-3, 3e-3, 1e-2)
SCRATCH = "from scratch"
METRICS = {"balanced_accuracy": "balanced accuracy", "auc": "AUC"}

XRAY_SIZES = (40, 200, 1000)
XRAY_LABELS = ["normal", "pneumonia"]

SCRIPTS = ("cmaterdb/bangla", "cmaterdb/devanagari")
SOURCES = ("mnist", "fashion_mnist")
A_CLASS = (10, 20, 50, 100)  # examples a class
HELD_OUT = 500  # training pictures of cmaterdb to choose the rate on
PRETRAINING_EPOCHS = 2

Arrays = tuple[np.ndarray, np.ndarray]
Run = dict[str, Any]


@dataclasses.dataclass
class Problem:
    """What is to be learned; `train` holds more pictures than are used."""

    name: str
    labels: list[str]
    train: Arrays
    val: Arrays
    test: Arrays


@dataclasses.dataclass
class Approach:
    """A way to learn it: `fit` takes pictures, labels, the rate and arguments of Keras' `fit`."""

    name: str
    rates: Sequence[float]
    fit: Callable[..., keras.Model]


def draw(data: Arrays, count: int, seed: int) -> tuple[Arrays, Arrays]:
    """Draws `count` pictures at random, each class in its share; returns them and the rest."""
    x, y = data
    chosen, rest = train_test_split(
        np.arange(len(y)), train_size=count, random_state=seed, stratify=y
    )
    return (x[chosen], y[chosen]), (x[rest], y[rest])


def cosine(rate: float, epochs: int = EPOCHS) -> keras.optimizers.schedules.CosineDecay:
    return keras.optimizers.schedules.CosineDecay(rate, epochs * SHOWN // BATCH)


def scores(model: keras.Model, data: Arrays) -> dict[str, float]:
    """Balanced accuracy (with classes of one size: accuracy) and, of two classes, AUC."""
    x, y = data
    logits = model.predict(x, batch_size=256, verbose=0)
    found = {"balanced_accuracy": float(balanced_accuracy_score(y, logits.argmax(-1)))}
    if logits.shape[-1] == 2:
        found["auc"] = float(roc_auc_score(y, logits[:, 1] - logits[:, 0]))
    return found


def learn(problem: Problem, approach: Approach, examples: int, seed: int, rate: float) -> Run:
    """Learns once; returns what was done and the scores."""
    (x, y), _ = draw(problem.train, examples, seed)
    weights = len(y) / (len(problem.labels) * np.bincount(y))  # each class counts the same
    again = np.resize(np.arange(examples), SHOWN)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    start = time.perf_counter()
    options = {"batch_size": BATCH, "class_weight": dict(enumerate(weights)), "verbose": 0}
    model = approach.fit(x[again], y[again], rate, **options)
    return {
        "problem": problem.name,
        "approach": approach.name,
        "examples": examples,
        "seed": seed,
        "rate": rate,
        "seconds": round(time.perf_counter() - start, 1),
        "val": scores(model, problem.val),
        "test": scores(model, problem.test),
    }


def sweep(problem: Problem, approach: Approach, examples: int, seeds: int) -> list[Run]:
    """Chooses the rate on `val`, then learns with every seed; returns all runs."""
    tuning = range(min(TUNING_SEEDS, seeds))
    runs = [
        learn(problem, approach, examples, seed, rate) for seed in tuning for rate in approach.rates
    ]

    def on_val(rate: float) -> float:
        return statistics.mean(r["val"]["balanced_accuracy"] for r in runs if r["rate"] == rate)

    best = max(approach.rates, key=on_val)
    runs += [learn(problem, approach, examples, seed, best) for seed in range(len(tuning), seeds)]
    for run in runs:
        run["chosen"] = run["rate"] == best
    accuracy = cell(runs, problem.name, approach.name, examples)
    seconds = statistics.median(run["seconds"] for run in runs)
    print(
        f"{problem.name:<19} {approach.name:<27} n = {examples:<4}  rate {best:<6g} "
        f"{accuracy} %  {seconds:.0f} s",
        flush=True,
    )
    return runs


def study(
    problems: Sequence[Problem], approaches: Sequence[Approach], sizes: Sequence[int], seeds: int
) -> list[Run]:
    return [
        run
        for problem in problems
        for approach in approaches
        for examples in sizes
        for run in sweep(problem, approach, examples, seeds)
    ]


# ImageNet to chest X-rays


def xray_problem(data_dir: str | None) -> Problem:
    parts = {
        split: lp.load_dataset("pneumonia_mnist", split=split, batch_size=-1, data_dir=data_dir)
        for split in ("train", "val", "test")
    }
    return Problem("pneumonia_mnist", XRAY_LABELS, **parts)


def xray_approaches(weights: Path) -> list[Approach]:
    def build(rate: float, epochs: int = EPOCHS, **options: Any) -> keras.Model:
        return lp.transfer_model(
            "MobileNet",
            XRAY_LABELS,
            input_shape=(28, 28, 1),
            image_size=96,
            backbone_kwargs={"alpha": 0.25},
            learning_rate=cosine(rate, epochs),
            **options,
        )

    def scratch(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
        model = build(rate, weights=None, trainable="all")
        # Keras averages the statistics over some 100 steps (0.99), which is too slow for 300: the
        # network then guesses one class for all of `test`.
        for layer in normalisations(model):
            layer.momentum = 0.9
        model.fit(x, y, epochs=EPOCHS, **options)
        return model

    def transfer(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
        model = build(rate, weights=weights)
        model.fit(x, y, epochs=EPOCHS, **options)
        return model

    def finetune(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
        half = EPOCHS // 2
        model = build(HIGH[1], half, weights=weights)
        model.fit(x, y, epochs=half, **options)
        model = lp.finetune_model(model, learning_rate=cosine(rate, half))
        model.fit(x, y, epochs=half, **options)
        return model

    return [
        Approach(SCRATCH, HIGH, scratch),
        Approach("transfer", HIGH, transfer),
        Approach("transfer, then fine-tuning", LOW, finetune),
    ]


def normalisations(model: keras.Model) -> Iterator[keras.layers.BatchNormalization]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from normalisations(layer)
        elif isinstance(layer, keras.layers.BatchNormalization):
            yield layer


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
    model.fit(*parts["train"], batch_size=64, epochs=PRETRAINING_EPOCHS, verbose=0)
    model.save(path)
    return scores(model, parts["test"])["balanced_accuracy"]


def script_approaches(folder: Path) -> list[Approach]:
    """The folder holds `SOURCE.keras` for each source, and `nothing.keras`."""

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
        Approach("frozen, untrained", LOW, transfer(folder / "nothing.keras")),
    ]


# Results


def values(runs: list[Run], problem: str, approach: str, examples: int, metric: str) -> np.ndarray:
    """Percent on the test split with the chosen rate, by seed."""
    wanted = (problem, approach, examples)
    chosen = [
        run
        for run in runs
        if run["chosen"] and (run["problem"], run["approach"], run["examples"]) == wanted
    ]
    return np.array([100 * run["test"][metric] for run in sorted(chosen, key=lambda r: r["seed"])])


def spread(found: np.ndarray) -> float:
    return float(np.std(found, ddof=1)) if len(found) > 1 else 0.0


def cell(
    runs: list[Run],
    problem: str,
    approach: str,
    examples: int,
    metric: str = "balanced_accuracy",
) -> str:
    found = values(runs, problem, approach, examples, metric)
    return f"{found.mean():.1f} ± {spread(found):.1f}"


def unique(runs: list[Run], key: str) -> list[Any]:
    return list(dict.fromkeys(run[key] for run in runs))


def differences(runs: list[Run], problem: str, metric: str, per: int) -> str:
    """A table of each approach minus "from scratch", seed by seed, and what it says."""
    sizes = unique(runs, "examples")
    rows = []
    for approach in unique(runs, "approach"):
        if approach == SCRATCH:
            continue
        row = [approach]
        for examples in sizes:
            change = values(runs, problem, approach, examples, metric) - values(
                runs, problem, SCRATCH, examples, metric
            )
            row.append(f"{change.mean():+.1f} ({verdict(change)})")
        rows.append(row)
    return table([f"{METRICS[metric]}, points", *(f"{size // per:,}" for size in sizes)], rows)


def verdict(change: np.ndarray) -> str:
    """Whether zero is outside the 95 % interval of the mean difference."""
    if len(change) < 2:
        return "one seed"
    margin = stats.t.ppf(0.975, len(change) - 1) * spread(change) / np.sqrt(len(change))
    if abs(change.mean()) <= margin:
        return "no difference shown"
    return "better" if change.mean() > 0 else "worse"


def rates(runs: list[Run], problem: str, per: int) -> str:
    sizes = unique(runs, "examples")
    rows = []
    for approach in unique(runs, "approach"):
        of = [r for r in runs if r["problem"] == problem and r["approach"] == approach]
        chosen = {run["examples"]: run["rate"] for run in of if run["chosen"]}
        seconds = statistics.median(run["seconds"] for run in of)
        rows.append([approach, *(f"{chosen[size]:g}" for size in sizes), f"{seconds:.1f}"])
    return table(["chosen rate", *(f"{size // per:,}" for size in sizes), "seconds"], rows)


def plot(
    runs: list[Run],
    panels: Sequence[tuple[str, str, str]],
    path: Path,
    per: int = 1,
    xlabel: str = "training pictures",
) -> None:
    """Draws a panel for each (problem, metric, title): mean and standard deviation by examples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = [("#5f6368", "o-"), ("#1a73e8", "s-"), ("#e8710a", "^--"), ("#12a594", "v:")]
    figure, axes = plt.subplots(1, len(panels), figsize=(9.5, 4), layout="constrained")
    sizes = unique(runs, "examples")
    ticks = [size // per for size in sizes]
    for axis, (problem, metric, title) in zip(axes, panels, strict=True):
        for approach, (colour, style) in zip(unique(runs, "approach"), styles, strict=False):
            found = [values(runs, problem, approach, size, metric) for size in sizes]
            mean = np.array([one.mean() for one in found])
            band = np.array([spread(one) for one in found])
            axis.fill_between(ticks, mean - band, mean + band, color=colour, alpha=0.15, lw=0)
            axis.plot(ticks, mean, style, color=colour, label=approach, markersize=5)
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.set(title=title, xlabel=f"{xlabel} (log)", ylabel=f"test {METRICS[metric]}, %")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"Plot: {path}")


def numbers(runs: list[Run], seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "machine": machine("scikit-learn"),
        "seconds": round(seconds),
        "epochs": EPOCHS,
        "pictures an epoch": SHOWN,
        "batch": BATCH,
        "tuning seeds": TUNING_SEEDS,
        **more,
        "runs": runs,
    }


def head(title: str, command: str, seconds: float) -> list[str]:
    return [
        f"# {title}",
        "",
        f"    python benchmarks/xray.py {command}",
        "",
        f"Machine: {machine('scikit-learn')}. All of it took {seconds / 60:.0f} minutes.",
        "",
    ]


def how(seeds: int) -> str:
    return (
        f"Mean and standard deviation over {seeds} seeds, on the whole test split. A seed changes "
        "the training pictures (drawn at random, each class in its share), the initial weights "
        f"and the order. Every approach gets {EPOCHS} epochs of {SHOWN:,} pictures, fewer ones "
        f"repeated, in batches of {BATCH} ({EPOCHS * SHOWN // BATCH} steps of Adam, its rate "
        "falling to zero along a cosine), the same weights of the classes in the loss, and no "
        "augmentation. The rate is one of three, chosen for each approach and number of pictures "
        f"in mean balanced accuracy over the first {TUNING_SEEDS} seeds on"
    )


VERDICTS = (
    'Minus "from scratch" with the same pictures, seed by seed. "Better" and "worse": zero '
    "is outside the 95 % interval (Student's t) of the mean over the seeds; the test pictures "
    "are the same for all seeds, so that this says nothing about others."
)


def run_xray(weights: Path, data_dir: str | None, seeds: int, out: Path) -> None:
    start = time.perf_counter()
    problem = xray_problem(data_dir)
    runs = study([problem], xray_approaches(weights), XRAY_SIZES, seeds)
    seconds = time.perf_counter() - start
    rows = [
        [
            f"{examples:,}",
            approach,
            *(cell(runs, problem.name, approach, examples, metric) for metric in METRICS),
        ]
        for examples in XRAY_SIZES
        for approach in unique(runs, "approach")
    ]
    command = f"--study xray --weights {weights.name} --seeds {seeds}"
    lines = [
        *head("ImageNet to chest X-rays", command, seconds),
        f"MobileNet (alpha 0.25, 96 by 96 pixels) on pneumonia_mnist: normal or pneumonia, "
        f"{len(problem.test[1])} test pictures.",
        "",
        table(["training pictures", "approach", "balanced accuracy, %", "AUC, %"], rows),
        "",
        "![Sample efficiency](xray.png)",
        "",
        "## Where transfer helps, and where not",
        "",
        VERDICTS,
        "",
        *(f"{differences(runs, problem.name, metric, 1)}\n" for metric in METRICS),
        "## How",
        "",
        f"{how(seeds)} the {len(problem.val[1])} pictures of the split `val`; with few training "
        "pictures these are more than were trained on. Fine-tuning is half of the epochs for the "
        "head alone, half for all of it. From scratch, BatchNormalization averages its statistics "
        "with a momentum of 0.9: with the 0.99 of Keras they come too late for so few steps.",
        "",
        rates(runs, problem.name, 1),
        "",
        "Seconds: median, of one training, with building the model.",
    ]
    write(out / "xray", "\n".join(lines), numbers(runs, seconds, weights=weights.name))
    panels = [(problem.name, metric, f"pneumonia_mnist: {METRICS[metric]}") for metric in METRICS]
    plot(runs, panels, out / "xray.png")


def run_scripts(data_dir: str | None, seeds: int, out: Path) -> None:
    start = time.perf_counter()
    problems = [script_problem(name, data_dir) for name in SCRIPTS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        learned = {s: pretrain(s, data_dir, folder / f"{s}.keras") for s in SOURCES}
        print(f"Pretrained; test accuracies: {learned}", flush=True)
        keras.utils.set_random_seed(0)
        untrained().save(folder / "nothing.keras")
        sizes = [10 * count for count in A_CLASS]
        runs = study(problems, script_approaches(folder), sizes, seeds)
    seconds = time.perf_counter() - start
    lines = [
        *head("Digits to digits of other scripts", f"--study scripts --seeds {seeds}", seconds),
        "A small network, trained on mnist, meets the ten digits of two other scripts. The "
        "controls: the same from fashion_mnist, and a frozen network that learned nothing.",
        "",
    ]
    for problem in problems:
        rows = [
            [approach, *(cell(runs, problem.name, approach, size) for size in sizes)]
            for approach in unique(runs, "approach")
        ]
        header = [f"{problem.name}: test accuracy, %", *(f"{n} a class" for n in A_CLASS)]
        lines += [table(header, rows), ""]
    lines += ["![Sample efficiency](scripts_transfer.png)", ""]
    lines += ["## Where transfer helps, and where not", "", VERDICTS, ""]
    for problem in problems:
        lines += [f"{problem.name}:", ""]
        lines += [differences(runs, problem.name, "balanced_accuracy", 10), ""]
    accuracies = " and ".join(f"{100 * value:.1f} % on {s}" for s, value in learned.items())
    lines += [
        "## How",
        "",
        f"{how(seeds)} {HELD_OUT} pictures held out of the training split. The networks were "
        f"trained once, {PRETRAINING_EPOCHS} epochs on all training pictures ({accuracies}, test "
        "split). Pictures of cmaterdb are inverted (white on black, as in mnist) and in one "
        "channel; those of the sources are enlarged from 28 to 32 pixels, without their margin "
        "being cut. All heads see the features flattened.",
        "",
    ]
    for problem in problems:
        lines += [f"{problem.name}:", "", rates(runs, problem.name, 10), ""]
    lines += ["Seconds: median, of one training, with building the model."]
    stem = out / "scripts_transfer"
    write(stem, "\n".join(lines), numbers(runs, seconds, **{"accuracy on source": learned}))
    panels = [(problem.name, "balanced_accuracy", problem.name) for problem in problems]
    plot(runs, panels, stem.with_suffix(".png"), 10, "training pictures a class")


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
