"""What do the ways to balance tasks do to accuracy, step time and memory?

    TFDS_DATA_DIR=... python benchmarks/multitask_balancing.py

Two problems: mnist + fashion_mnist, where each picture has one of the two labels, and clinc_oos,
where each request has a domain and an intent. Each way of `lp.multitask_model(balancing=...)` is
compared with two single-task models that get the same number of steps and of labels of each task.

Networks are small and untrained. Adam, its rate falling to zero along a cosine in 12 epochs: 1,200
steps, 600 for clinc_oos. A step has 64 labels of each task: 64 pictures of each data set, or 64
requests with both labels. All settings of the ways are the defaults. The rate is one of three for
each way, the best mean accuracy of the tasks on validation examples (5,000 of the training pictures
of each data set; the split `validation` of clinc_oos) with the first seed. A seed changes the
initial weights and the order. The test split chooses nothing.

Times are those of a step, all ways in turn, on one thread. Peak memory is that of a process of its
own, above the memory before the model is built.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from lib import multitask, timing
from lib.arguments import command, parser
from lib.journal import Journal, Run
from lib.machine import answer, machine, memory, one_thread, own_process
from lib.multitask import PICTURES, Problem, Restarted, accuracies, batches, cosine, model_of, take
from lib.results import page, table, write
from lib.scores import VERDICTS, chosen, mean_and_deviation, select, tuned, unique, verdict

NAME = "multitask_balancing"
WAYS = ("equal", "uncertainty", "dwa", "gradnorm", "pcgrad", "cagrad", "mgda", "imtl_g")
SINGLE = "single tasks"
CLINC = "clinc_oos"
RATES = {PICTURES: (1e-3, 3e-3, 1e-2), CLINC: (1e-2, 3e-2, 1e-1)}
LABELS = 64  # of each task in a batch
STEPS = {PICTURES: 100, CLINC: 50}  # of an epoch
EPOCHS = 12  # of `fit`, which DWA looks at


def build(problem: Problem, way: str, tasks: list[str]) -> keras.Model:
    classes = {task: problem.classes[task] for task in tasks}
    return model_of(problem.network, classes, balancing=way)


def study(problem: Problem, journal: Journal, seeds: int) -> None:
    """Learns each task alone, then all with each way."""
    ways = [(SINGLE, [task]) for task in problem.classes]
    for way, tasks in [*ways, *((way, list(problem.classes)) for way in WAYS)]:
        restart = Restarted(partial(build, problem, way, tasks), STEPS[problem.name])
        work = partial(learn, restart, problem, tasks)
        key = {"problem": problem.name, "way": way, "tasks": tasks}
        tuned(journal, work, RATES[problem.name], seeds, validated, **key)


def learn(restart: Restarted, problem: Problem, tasks: list[str], seed: int, rate: float) -> Run:
    model = restart(seed)
    stream = batches(problem, tasks, LABELS, seed)
    start = time.perf_counter()
    for epoch in range(EPOCHS):
        model.optimizer.learning_rate = cosine(rate, epoch / EPOCHS)
        index = [next(stream) for _ in range(STEPS[problem.name])]
        x, y = take(problem.train, np.concatenate(index))
        y = y if len(tasks) > 1 else y[tasks[0]]
        logs = model.fit(x, y, batch_size=len(index[0]), shuffle=False, verbose=0).history
    shown = {
        name: round(values[-1], 4)
        for name, values in logs.items()
        if name.endswith(("_weight", "_cosine"))
    }
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "val": accuracies(model, problem.val, tasks),
        "test": accuracies(model, problem.test, tasks),
        **({"last epoch": shown} if shown else {}),
    }


def step_of(problem: Problem, way: str, tasks: list[str]) -> Callable[[], Any]:
    """Returns what does a step."""
    model = build(problem, way, tasks)
    x, y = take(problem.train, next(batches(problem, tasks, LABELS, 0)))
    return partial(model.train_on_batch, x, y[tasks[0]] if way == SINGLE else y)


def times(problem: Problem, rounds: int, steps: int) -> dict[str, list[float]]:
    """Returns the seconds of a step, in turn."""
    every = {way: [step_of(problem, way, list(problem.classes))] for way in WAYS}
    every[SINGLE] = [step_of(problem, SINGLE, [task]) for task in problem.classes]
    calls = {
        way: lambda some=some: [one() for one in some for _ in range(steps)]
        for way, some in every.items()
    }
    found = timing.in_turn(calls, rounds)
    return {way: [round(one.clock / steps, 5) for one in of] for way, of in found.items()}


def measure_memory(way: str) -> None:
    """Answers with the peak memory above that before the model, in MiB; of black pictures."""
    x, names = np.zeros((1000, 28, 28, 1), "uint8"), PICTURES.split(" + ")
    part = x, dict.fromkeys(names, np.arange(len(x)) % 10)
    classes = dict.fromkeys(names, 10)
    problem = Problem(PICTURES, classes, multitask.small_network, part, part, part)
    before = memory()
    step = step_of(problem, way, names)
    for _ in range(10):
        step()
    answer(memory("VmHWM") - before)


# Results


def validated(run: Run) -> float:
    return statistics.mean(run["val"].values())


def runs_of(runs: list[Run], problem: str, way: str, task: str) -> list[Run]:
    """Returns the runs at the rate that was chosen, by seed."""
    of = [run for run in select(runs, problem=problem, way=way) if task in run["test"]]
    return chosen(of, validated)


def scores(runs: list[Run], problem: str, way: str, task: str) -> np.ndarray:
    """Returns the test accuracies in %, by seed."""
    return np.array([100 * run["test"][task] for run in runs_of(runs, problem, way, task)])


def score_table(runs: list[Run], problem: str, tasks: list[str]) -> str:
    rows = []
    for way in unique(runs, "way"):
        found = {task: scores(runs, problem, way, task) for task in tasks}
        changes = [found[task] - scores(runs, problem, SINGLE, task) for task in tasks]
        shown = [f"{change.mean():+.2f}, {verdict(change)}" for change in changes]
        rates = [f"{runs_of(runs, problem, way, task)[0]['rate']:g}" for task in tasks]
        row = [way, *(mean_and_deviation(one, 2) for one in found.values())]
        row += [""] * len(tasks) if way == SINGLE else shown
        rows.append([*row, " / ".join(dict.fromkeys(rates))])
    header = [problem, *(f"{task}, %" for task in tasks)]
    return table([*header, *(f"{task}: minus single" for task in tasks), "rate"], rows)


def shown_table(runs: list[Run], problem: str, tasks: list[str]) -> str:
    """Returns weights and cosines of the last epoch, means over the seeds."""
    rows = []
    for way in unique(runs, "way"):
        of = [run for run in runs_of(runs, problem, way, tasks[0]) if "last epoch" in run]
        if of:
            names = [*(f"{task}_weight" for task in tasks), "gradient_cosine"]
            values = [[run["last epoch"].get(name) for run in of] for name in names]
            means = [f"{statistics.mean(v):.2f}" if None not in v else "" for v in values]
            rows.append([way, *means])
    header = [f"{problem}, last epoch", *(f"weight of {task}" for task in tasks)]
    return table([*header, "cosine of gradients"], rows)


def cost_table(seconds: dict[str, dict[str, list[float]]], peaks: dict[str, list[float]]) -> str:
    rows = []
    for way in (SINGLE, *WAYS):
        row = [way]
        for of in seconds.values():
            ratio, _, _ = timing.ratio(of[way], of["equal"])
            row += [f"{1000 * statistics.median(of[way]):.1f}", f"{ratio:.2f}x"]
        rows.append([*row, f"{statistics.median(peaks[way]):,.0f}" if way in peaks else ""])
    header = [cell for name in seconds for cell in (f"{name}: step, ms", "of equal")]
    return table(["", *header, "peak memory, MiB"], rows)


def report(results: dict[str, Any]) -> str:
    runs, seconds = results["runs"], results["step seconds"]
    tasks = {name: list(select(runs, problem=name, way="equal")[0]["test"]) for name in seconds}
    pictures = EPOCHS * STEPS[PICTURES] * LABELS
    return page(
        "Ways to balance tasks",
        results["command"],
        results["machine"],
        __doc__,
        f"Test accuracy, mean and standard deviation over {results['seeds']} seeds, {len(runs)} "
        f"trainings. {VERDICTS}",
        *(score_table(runs, problem, of) for problem, of in tasks.items()),
        "Published for mnist + fashion_mnist: single 99.56 / 94.32, joint 99.71 / 95.18; an "
        "independent rerun found 99.60 / 93.94 to 99.56 / 94.20. Those are large networks with a "
        "long budget, that of multitask_published.py. Here a network of "
        f"{results['weights']:,} weights sees {pictures:,} pictures of each data set, "
        f"{pictures / 55000:.2f} of an epoch, so the order of the ways may "
        "differ.",
        "## What the ways do",
        *(shown_table(runs, problem, of) for problem, of in tasks.items()),
        "Weights: of the loss, or of the gradient of the shared parameters; means over the steps "
        "and the seeds.",
        "## What they cost",
        cost_table(seconds, results["memory"]),
        f"Medians of {results['rounds']} runs of {results['steps']} steps in turn; the ratio is "
        f"the median of the ratios of the turns. {SINGLE.capitalize()}: a step of each of the two "
        f"models. Peak memory ({PICTURES}): the median of {len(results['memory']['equal'])} "
        "processes, 10 steps each.",
    )


def main() -> None:
    arguments = parser(__doc__, seeds=3, data_dir=True)
    arguments.add_argument("--rounds", type=int, default=15, help="turns of each way")
    arguments.add_argument("--steps", type=int, default=10, help="steps of a turn")
    arguments.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    one_thread()
    if given.memory_of:
        measure_memory(given.memory_of)
        return
    runs, problems = [], {}
    for name in RATES:
        problems[name] = multitask.load(name, given.data_dir)
        settings = {"rates": list(RATES[name]), "labels": LABELS, "steps": STEPS[name]}
        path = given.out / "partial" / f"{NAME}_{name.split()[0]}.json"
        journal = Journal(path, {**settings, "epochs": EPOCHS})
        study(problems[name], journal, given.seeds)
        runs += journal.runs
    seconds = {}
    for name, problem in problems.items():
        keras.backend.clear_session()
        seconds[name] = times(problem, given.rounds, given.steps)
    results = {
        "command": command(__file__, given, "seeds"),
        "machine": machine("scikit-learn"),
        "weights": problems[PICTURES].network().count_params(),
        **{name: getattr(given, name) for name in ("seeds", "rounds", "steps")},
        "step seconds": seconds,
        "memory": {
            way: [round(own_process(__file__, "--memory-of", way)[0], 1) for _ in range(2)]
            for way in WAYS
        },
        "runs": runs,
    }
    write(given.out / NAME, report(results), results)


if __name__ == "__main__":
    main()
