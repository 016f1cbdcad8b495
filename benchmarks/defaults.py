"""What does one line reach? The defaults of `fit` and `fit_head` against an expert's hour.

    TFDS_DATA_DIR=... python benchmarks/defaults.py --mobilenet mobilenet_2_5_224_tf_no_top.h5 \
        --cifar10 cifar10_subset.npz

Pictures: cifar10_subset and pneumonia_mnist with MobileNet (alpha 0.25, ImageNet weights, 96
pixels), mnist to the digits of cmaterdb/bangla with a small network. Texts: trec and clinc_oos,
each with a small network that learned the other one.

- before: the defaults of the first version: features averaged and as they are, a random head, ten
  epochs of Adam at 1e-3.
- fit: `lp.transfer_model(...)` and `model.fit(..., epochs=10)`, all by default.
- fit_head: `lp.fit_head(model, data)`.
- scikit-learn: `LogisticRegression` on the same features, standardised; the best of 5 strengths by
  the log loss in 3 folds.
- best of a sweep: the oracle. Adam on the same features, standardised, at five rates; the rate and
  the epoch of up to 30 that are best on the validation split.
- two-phase: `lp.fit_two_phase(model, data, epochs=5)`.
- Keras guide: the head for ten epochs at 1e-3, then all layers for ten epochs at 1e-5.

A seed changes the training examples (each class in its share), the initial weights and the order.
The test split chooses nothing. Seconds are processor time with everything that the approach needs,
the features too.

`--study cost` times `fit_head` on 1,000 pictures against one pass of MobileNet over them. A run
that was stopped goes on where it was; `--study report` writes the tables of what it has.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # faster here, and fair to scikit-learn

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, table, write
from defaults_cases import Setting, settings
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from studies import draw, mean_and_spread

import keras_lp as lp
from keras_lp.backbones.features import feature_model

EPOCHS = 10
RATES = (1e-4, 1e-3, 3e-3, 1e-2, 1e-1)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of scikit-learn
LONGEST = 30  # epochs of a run of the sweep
ORACLE = "best of a sweep"

KEYS = ("problem", "examples", "approach", "seed")

Arrays = tuple[np.ndarray, np.ndarray]
Predict = Callable[[np.ndarray], np.ndarray]  # inputs to logits


def features(model: keras.Model, x: np.ndarray) -> np.ndarray:
    return feature_model(model).predict(x, batch_size=64, verbose=0)


def logits_of(model: keras.Model) -> Predict:
    return lambda x: model.predict(x, batch_size=256, verbose=0)


def before(setting: Setting, data: Arrays, val: Arrays) -> Predict:
    model = setting.build(pooling="avg")
    head = _dense(len(setting.problem.labels), 1e-3)
    head.fit(features(model, data[0]), data[1], epochs=EPOCHS, verbose=0)
    return lambda x: head.predict(features(model, x), verbose=0)


def fit(setting: Setting, data: Arrays, val: Arrays, **options: Any) -> Predict:
    model = setting.build()
    model.fit(*data, epochs=EPOCHS, verbose=0, **options)
    return logits_of(model)


def fit_head(setting: Setting, data: Arrays, val: Arrays, **options: Any) -> Predict:
    model = setting.build()
    lp.fit_head(model, data, verbose=0, **options)
    return logits_of(model)


def scikit_learn(setting: Setting, data: Arrays, val: Arrays) -> Predict:
    model, (x, y) = setting.build(), data
    classes = len(setting.problem.labels)
    z = features(model, x).astype("float64")

    def solve(strength: float, rows: np.ndarray) -> Predict:
        solver = LogisticRegression(C=strength, max_iter=200)
        pipeline = make_pipeline(StandardScaler(), solver).fit(z[rows], y[rows])

        def predict(z: np.ndarray) -> np.ndarray:
            found = np.full((len(z), classes), -30.0)  # of classes that were not there
            found[:, solver.classes_] = np.log(np.maximum(pipeline.predict_proba(z), 1e-13))
            return found

        return predict

    def loss(strength: float) -> float:
        folds = KFold(3, shuffle=True, random_state=0).split(z)
        return sum(
            -solve(strength, train)(z[test])[np.arange(len(test)), y[test]].sum()
            for train, test in folds
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        best = solve(min(STRENGTHS, key=loss), np.arange(len(y)))
    return lambda x: best(features(model, x))


def sweep(setting: Setting, data: Arrays, val: Arrays) -> Predict:
    model = setting.build()
    z, held_out = features(model, data[0]), features(model, val[0])
    scaler = StandardScaler().fit(z)
    z, held_out = scaler.transform(z), scaler.transform(held_out)
    best: tuple[float, list[np.ndarray]] = (-1.0, [])
    for rate in RATES:
        head = _dense(len(setting.problem.labels), rate, "zeros")
        for _ in range(LONGEST):
            head.fit(z, data[1], verbose=0)
            score = _score(setting, val[1], head.predict_on_batch(held_out))
            if score > best[0]:
                best = score, head.get_weights()
    head.set_weights(best[1])
    return lambda x: head.predict(scaler.transform(features(model, x)), verbose=0)


def two_phase(setting: Setting, data: Arrays, val: Arrays) -> Predict:
    model = setting.build()
    lp.fit_two_phase(model, data, epochs=5, verbose=0)
    return logits_of(model)


def keras_guide(setting: Setting, data: Arrays, val: Arrays) -> Predict:
    model = setting.build(pooling="avg", learning_rate=1e-3)
    model.fit(*data, epochs=EPOCHS, verbose=0)
    model = lp.finetune_model(
        model, learning_rate=1e-5, layer_decay=1.0, optimizer="adam", weight_decay=None
    )
    model.fit(*data, epochs=EPOCHS, verbose=0)
    return logits_of(model)


APPROACHES = {
    "before": before,
    "fit": fit,
    "fit_head": fit_head,
    "scikit-learn": scikit_learn,
    ORACLE: sweep,
    "two-phase": two_phase,
    "Keras guide": keras_guide,
}
BALANCED = {
    "fit, balanced": lambda setting, data, val: fit(
        setting,
        data,
        val,
        class_weight=dict(enumerate(len(data[1]) / (2 * np.bincount(data[1], minlength=2)))),
    ),
    "fit_head, balanced": functools.partial(fit_head, class_weight="balanced"),
}


def _dense(classes: int, rate: float, start: str = "glorot_uniform") -> keras.Model:
    model = keras.Sequential([keras.layers.Dense(classes, kernel_initializer=start)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    return model


def _score(setting: Setting, y: np.ndarray, logits: np.ndarray) -> float:
    """What the table shows: balanced accuracy where the classes are uneven, else accuracy."""
    found = logits.argmax(-1)
    return float(balanced_accuracy_score(y, found) if setting.uneven else np.mean(y == found))


def study(every: list[Setting], seeds: int, partial: Path) -> list[dict[str, Any]]:
    """Runs everything that the file of runs does not have yet; it grows run by run."""
    runs: list[dict[str, Any]] = json.loads(partial.read_text()) if partial.exists() else []
    done = {tuple(run[key] for key in KEYS) for run in runs}
    for setting in every:
        approaches = {**APPROACHES, **(BALANCED if setting.uneven else {})}
        for size, seed, name in itertools.product(setting.sizes, range(seeds), approaches):
            if (setting.problem.name, size, name, seed) in done:
                continue
            runs.append(learn(setting, size, name, approaches[name], seed))
            partial.write_text(json.dumps(runs))
            print({key: runs[-1][key] for key in (*KEYS, "score", "seconds")}, flush=True)
    return runs


def learn(
    setting: Setting, size: int, name: str, approach: Callable[..., Predict], seed: int
) -> dict[str, Any]:
    """Learns once; returns what was done, the scores on the test split and the time."""
    problem = setting.problem
    data, _ = draw(problem.train, size, seed)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    start = time.process_time()
    predict = approach(setting, data, problem.val)
    seconds = time.process_time() - start
    logits, y = predict(problem.test[0]), problem.test[1]
    run = {
        **dict(zip(KEYS, (problem.name, size, name, seed), strict=True)),
        "seconds": round(seconds, 2),
        "score": _score(setting, y, logits),
        "accuracy": float(np.mean(y == logits.argmax(-1))),
    }
    if setting.uneven:
        run["auc"] = float(roc_auc_score(y, logits[:, 1] - logits[:, 0]))
    return run


def cost(setting: Setting, repeats: int) -> dict[str, float]:
    """Processor time of the ways in turn, and the medians of their ratios to one pass."""
    data, _ = draw(setting.problem.train, 1000, 0)
    ways = {
        "pass": lambda model: feature_model(model).predict(data[0], batch_size=64, verbose=0),
        "fit_head(l2=0.1)": lambda model: lp.fit_head(model, data, l2=0.1, verbose=0),
        'fit_head(l2="auto")': lambda model: lp.fit_head(model, data, verbose=0),
    }
    models = {name: setting.build() for name in ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.process_time()
            way(models[name])
            times[name].append(time.process_time() - start)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}  # but the first
    return {**medians, "width": models["pass"].get_layer("features").output.shape[-1]}


def cases_of(runs: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((run["problem"], run["examples"]) for run in runs))


def select(runs: list[dict[str, Any]], case: tuple[str, int], name: str, key: str) -> np.ndarray:
    return np.array(
        [
            run[key]
            for run in runs
            if (run["problem"], run["examples"]) == case and run["approach"] == name
        ]
    )


def score_table(runs: list[dict[str, Any]], key: str, names: list[str], factor: float = 100) -> str:
    rows = []
    for case in cases_of(runs):
        cells = []
        for name in names:
            try:
                found = factor * select(runs, case, name, key)
            except KeyError:
                found = np.array([])
            metric = "auc" if factor == 1 else "accuracy"
            cells.append(mean_and_spread(found, metric) if len(found) else "-")
        if set(cells) != {"-"}:
            rows.append([f"{case[0]}, {case[1]:,}", *cells])
    return table(["", *names], rows)


def goals(runs: list[dict[str, Any]]) -> str:
    """Which rows reach what was aimed at, and which do not."""
    lines = []
    for title, name, other, margin in [
        ("`fit` within 2 points of `fit_head`", "fit", "fit_head", lambda a, b: 2.0),
        ("`fit_head` within a deviation of the sweep", "fit_head", ORACLE, None),
        ("two-phase at least as good as `fit_head`", "two-phase", "fit_head", lambda a, b: 0.0),
    ]:
        missed = []
        for case in cases_of(runs):
            ours, theirs = (100 * select(runs, case, n, "score") for n in (name, other))
            allowed = margin(ours, theirs) if margin else max(np.std(ours, ddof=1), 1e-9)
            gap = ours.mean() - theirs.mean()
            if gap < -allowed:
                missed.append(f"{case[0]}, {case[1]:,} ({gap:+.1f})")
        total = len(cases_of(runs))
        text = f"{total - len(missed)} of {total} rows"
        lines.append(f"- {title}: {text}{'; not ' + ', '.join(missed) if missed else ''}.")
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    runs, found = results["runs"], results["cost"]
    seeds = len({run["seed"] for run in runs})
    names = list(APPROACHES)
    uneven = [run for run in runs if "auc" in run]
    costs = "\n".join(
        f"- `{name}`: {found[name]:.2f} s, {found[name] / found['pass']:.2f} times the pass"
        for name in found
        if name.startswith("fit_head")
    )
    parts = __doc__.split("\n\n")
    return "\n\n".join(
        [
            "# What one line reaches",
            f"    {results['command']}",
            f"Machine: {results['machine']}. The study took "
            f"{sum(run['seconds'] for run in runs) / 60:.0f} minutes of processor time.",
            *parts[2:5],
            f"Test accuracy in per cent (pneumonia_mnist: balanced accuracy), mean and standard "
            f"deviation over {seeds} seeds:",
            score_table(runs, "score", names),
            "![Scores by number of examples](defaults.png)",
            goals(runs),
            "## Uneven classes",
            "pneumonia_mnist has three pictures with pneumonia for one without, and its test split "
            "is shifted. The optimum of the loss knows the shares, so it calls doubtful pictures "
            "pneumonia, which balanced accuracy punishes; a head that starts at 0 and stops early "
            "has hardly learned them. The AUC needs no threshold. The last two columns weigh the "
            'classes, `class_weight="balanced"`. Balanced accuracy, then AUC:',
            score_table(uneven, "score", [*names, *BALANCED]),
            score_table(uneven, "auc", [*names, *BALANCED], 1),
            "## Processor time",
            "Seconds, median of the seeds:",
            _seconds(runs, names),
            f"One pass of MobileNet over 1,000 pictures takes {found['pass']:.2f} s of processor "
            f"time; each way in turn, median of {results['repeats']}, {found['width']:,} features:",
            costs,
        ]
    )


def _seconds(runs: list[dict[str, Any]], names: list[str]) -> str:
    rows = [
        [
            f"{case[0]}, {case[1]:,}",
            *(f"{np.median(select(runs, case, name, 'seconds')):.1f}" for name in names),
        ]
        for case in cases_of(runs)
    ]
    return table(["", *names], rows)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    problems = list(dict.fromkeys(run["problem"] for run in runs))
    shown = {
        "before": ("#9aa0a6", "o:"),
        "fit": ("#1a73e8", "s-"),
        "fit_head": ("#e8710a", "^-"),
        ORACLE: ("#12a594", "v--"),
        "two-phase": ("#a142f4", "d-"),
    }
    figure, axes = plt.subplots(1, len(problems), figsize=(3 * len(problems), 3.6))
    for axis, problem in zip(axes, problems, strict=True):
        cases = [case for case in cases_of(runs) if case[0] == problem]
        for name, (colour, style) in shown.items():
            means = [100 * select(runs, case, name, "score").mean() for case in cases]
            sizes = [size for _, size in cases]
            axis.plot(sizes, means, style, color=colour, label=name, markersize=5)
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        measure = "balanced accuracy" if problem == "pneumonia_mnist" else "accuracy"
        axis.set(title=problem, xlabel="training examples", ylabel=f"test {measure}, %")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=len(shown), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"Plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mobilenet", type=Path, required=True)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="of the study of cost")
    parser.add_argument("--study", choices=["all", "cost", "report"], default="all")
    parser.add_argument("--out", type=Path, default=RESULTS / "defaults")
    arguments = parser.parse_args()
    tf.get_logger().setLevel("ERROR")
    with tempfile.TemporaryDirectory() as folder:
        every = settings(arguments.mobilenet, arguments.cifar10, arguments.data_dir, Path(folder))
        found = cost(every[0], arguments.repeats)
        print(found, flush=True)
        if arguments.study == "cost":
            return
        runs = study(
            [] if arguments.study == "report" else every,
            arguments.seeds,
            arguments.out.with_suffix(".partial.json"),
        )
    results = {
        "command": f"python benchmarks/defaults.py --mobilenet {arguments.mobilenet.name} "
        f"--cifar10 {arguments.cifar10.name} --seeds {arguments.seeds}",
        "machine": machine("scikit-learn", "scipy"),
        "repeats": arguments.repeats,
        "cost": found,
        "runs": runs,
    }
    write(arguments.out, markdown(results), results)
    plot(runs, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
