r"""What does one line reach? The defaults of `fit` and `fit_head` against tuned baselines.

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
- best of a sweep: Adam on the same features, standardised, at five rates; the rate and the epoch of
  up to 30 that are best on the validation split.
- two-phase: `lp.fit_two_phase(model, data, epochs=5)`.
- Keras guide: the head for ten epochs at 1e-3, then all layers for ten epochs at 1e-5.

A seed changes the training examples (each class in its share), the initial weights and the order.
The test split chooses nothing. Seconds are processor time and include all that the approach needs,
the features too.

The cost of `fit_head` on 1,000 pictures is compared with one pass of MobileNet over them.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # scikit-learn is faster with one thread here

import keras
import numpy as np
import tensorflow as tf
from lib import heads
from lib.arguments import command, parser
from lib.journal import Journal, Run
from lib.machine import machine
from lib.networks import Setting, settings
from lib.plots import curves, panels
from lib.problems import XRAY, draw
from lib.results import RESULTS, page, table, write
from lib.scores import deviation, mean_and_deviation, select, unique
from lib.timing import in_turn, seconds
from sklearn.metrics import roc_auc_score

import keras_lp as lp

SWEEP = "best of a sweep"
PLOTTED = ("before", "fit", "fit_head", SWEEP, "two-phase")

APPROACHES = {
    "before": heads.before,
    "fit": heads.fit,
    "fit_head": heads.fit_head,
    "scikit-learn": heads.scikit_learn,
    SWEEP: heads.sweep,
    "two-phase": heads.two_phase,
    "Keras guide": heads.keras_guide,
}
BALANCED = {
    "fit, balanced": functools.partial(heads.fit, balanced=True),
    "fit_head, balanced": functools.partial(heads.fit_head, class_weight="balanced"),
}
GOALS = [  # title, approach, peer, points that it may lose; None: one deviation of the approach
    ("`fit` within 2 points of `fit_head`", "fit", "fit_head", 2.0),
    ("`fit_head` within a deviation of the sweep", "fit_head", SWEEP, None),
    ("two-phase at least as good as `fit_head`", "two-phase", "fit_head", 0.0),
]


def learn(setting: Setting, approach: heads.Approach, size: int, seed: int) -> Run:
    """Learns once; returns the time and the scores on the test split."""
    problem = setting.problem
    data, _ = draw(problem.train, size, seed)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    found: list[heads.Predict] = []
    spent = seconds(lambda: found.append(approach(setting, data, problem.val))).processor
    logits, y = found[0](problem.test[0]), problem.test[1]
    run = {
        "seconds": round(spent, 2),
        "score": heads.score(setting, y, logits),
        "accuracy": float(np.mean(y == logits.argmax(-1))),
    }
    if setting.uneven:
        run["auc"] = float(roc_auc_score(y, logits[:, 1] - logits[:, 0]))
    print(setting.problem.name, size, seed, run, flush=True)
    return run


def study(every: list[Setting], seeds: int, journal: Journal) -> None:
    for setting in every:
        approaches = {**APPROACHES, **(BALANCED if setting.uneven else {})}
        for size, seed, name in itertools.product(setting.sizes, range(seeds), approaches):
            key = {"problem": setting.problem.name, "examples": size, "approach": name}
            work = functools.partial(learn, setting, approaches[name], size, seed)
            journal.run(work, **key, seed=seed)


def cost(setting: Setting, repeats: int) -> dict[str, float]:
    """Returns the medians of the processor time of one pass and of two heads."""
    data, _ = draw(setting.problem.train, 1000, 0)
    ways = {
        "pass": lambda model: heads.features(model, data[0]),
        "fit_head(l2=0.1)": lambda model: lp.fit_head(model, data, l2=0.1, verbose=0),
        'fit_head(l2="auto")': lambda model: lp.fit_head(model, data, verbose=0),
    }
    models = {name: setting.build() for name in ways}
    calls = {name: functools.partial(way, models[name]) for name, way in ways.items()}
    times = in_turn(calls, repeats)
    medians = {name: float(np.median(found, axis=0)[1]) for name, found in times.items()}
    return {**medians, "width": models["pass"].get_layer("features").output.shape[-1]}


def values(runs: list[Run], case: tuple[str, int], name: str, key: str = "score") -> np.ndarray:
    problem, size = case
    found = select(runs, problem=problem, examples=size, approach=name)
    return np.array([run[key] for run in found])


def case_table(
    runs: list[Run], names: list[str], cell: Callable[[np.ndarray], str], key: str
) -> str:
    rows = []
    for case in unique(runs, "problem", "examples"):
        found = [values(runs, case, name, key) for name in names]
        rows.append([f"{case[0]}, {case[1]:,}", *(cell(one) if len(one) else "-" for one in found)])
    return table(["", *names], rows)


def goals(runs: list[Run]) -> str:
    """Tells in which rows a goal was missed."""
    lines, cases = [], unique(runs, "problem", "examples")
    for title, name, peer, points in GOALS:
        missed = []
        for case in cases:
            ours, theirs = (100 * values(runs, case, one) for one in (name, peer))
            gap = ours.mean() - theirs.mean()
            if gap < -(max(deviation(ours), 1e-9) if points is None else points):
                missed.append(f"{case[0]}, {case[1]:,} ({gap:+.1f})")
        reached = f"{len(cases) - len(missed)} of {len(cases)} rows"
        lines.append(f"- {title}: {reached}{'; not ' + ', '.join(missed) if missed else ''}.")
    return "\n".join(lines)


def report(results: dict[str, Any]) -> str:
    runs, cost, names = results["runs"], results["cost"], list(APPROACHES)
    uneven = [run for run in runs if "auc" in run]

    def percent(found: np.ndarray) -> str:
        return mean_and_deviation(100 * found)

    return page(
        "What one line reaches",
        results["command"],
        results["machine"],
        __doc__,
        f"Test accuracy in per cent (pneumonia_mnist: balanced accuracy), mean and standard "
        f"deviation over {len(unique(runs, 'seed'))} seeds:",
        case_table(runs, names, percent, "score"),
        "![Scores by number of examples](defaults.png)",
        goals(runs),
        "## Uneven classes",
        "pneumonia_mnist has three pictures with pneumonia for one without, and its test split has "
        "other shares. The optimum of the loss knows the shares of the training split, so it calls "
        "doubtful pictures pneumonia, which lowers the balanced accuracy; a head that starts at 0 "
        "and stops early has hardly learned the shares. The AUC needs no threshold. The last two "
        'columns have `class_weight="balanced"`. Balanced accuracy, then AUC:',
        case_table(uneven, [*names, *BALANCED], percent, "score"),
        case_table(uneven, [*names, *BALANCED], lambda one: mean_and_deviation(one, 3), "auc"),
        "## Processor time",
        "Seconds, median of the seeds:",
        case_table(runs, names, lambda one: f"{np.median(one):.1f}", "seconds"),
        f"One pass of MobileNet over 1,000 pictures takes {cost['pass']:.2f} s; each way in turn, "
        f"median of {results['repeats']}, {cost['width']:,} features:",
        "\n".join(
            f"- `{name}`: {cost[name]:.2f} s, {cost[name] / cost['pass']:.2f} times the pass"
            for name in cost
            if name.startswith("fit_head")
        ),
    )


def plot(runs: list[Run], path: Path) -> None:
    problems = unique(runs, "problem")
    with panels(path, len(problems), size=(3 * len(problems), 3.6)) as axes:
        for axis, problem in zip(axes, problems, strict=True):
            sizes = unique(select(runs, problem=problem), "examples")
            found = {n: [100 * values(runs, (problem, s), n) for s in sizes] for n in PLOTTED}
            measure = "balanced accuracy" if problem == XRAY else "accuracy"
            labels = {"xlabel": "training examples", "ylabel": f"test {measure}, %"}
            curves(axis, sizes, found, title=problem, **labels)


def main() -> None:
    arguments = parser(__doc__, seeds=5, data_dir=True, out=RESULTS / "defaults")
    arguments.add_argument("--mobilenet", type=Path, required=True, help="h5 file, alpha 0.25")
    arguments.add_argument("--cifar10", type=Path, required=True, help="npz file")
    arguments.add_argument("--repeats", type=int, default=5, help="times of each cost")
    studies = ["all", "cost", "report"]
    arguments.add_argument("--study", choices=studies, default="all", help="report: what is done")
    given = arguments.parse_args()
    tf.get_logger().setLevel("ERROR")
    journal = Journal(given.out.with_suffix(".partial.json"))
    with tempfile.TemporaryDirectory() as folder:
        every = settings(given.mobilenet, given.cifar10, given.data_dir, Path(folder))
        costs = cost(every[0], given.repeats)
        print(costs, flush=True)
        if given.study == "cost":
            return
        study([] if given.study == "report" else every, given.seeds, journal)
    results = {
        "command": command(__file__, given, "mobilenet", "cifar10", "seeds"),
        "machine": machine("scikit-learn", "scipy"),
        "repeats": given.repeats,
        "cost": costs,
        "runs": journal.runs,
    }
    write(given.out, report(results), results)
    plot(journal.runs, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
