"""Scripts that run every case with every seed."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from lib.arguments import command, parser
from lib.journal import Journal, Run
from lib.machine import machine
from lib.results import RESULTS, write
from lib.scores import mean_and_deviation, verdict


def run_seeds(
    script: str,
    doc: str,
    learn: Callable[[str, int], Run],
    names: Iterable[str],
    report: Callable[[dict[str, Any]], str],
    seeds: int = 3,
) -> None:
    """Reads the options, runs the cases and writes the page; a stopped script continues.

    Args:
        script: the file of the script, after which the results are named.
        doc: its docstring.
        learn: `(name, seed) -> run`.
        names: the cases.
        report: function from the results to the page.
        seeds: the default number of seeds. Defaults to 3.
    """
    stem = os.path.splitext(os.path.basename(script))[0]
    arguments = parser(doc, seeds=seeds, data_dir=True, out=RESULTS / stem).parse_args()
    if arguments.data_dir:
        os.environ["TFDS_DATA_DIR"] = arguments.data_dir
    tf.get_logger().setLevel("ERROR")
    journal = Journal(arguments.out.with_suffix(".partial.json"))
    for seed, name in itertools.product(range(arguments.seeds), names):
        run = journal.run(functools.partial(learn, name, seed), name=name, seed=seed)
        print(run, flush=True)
    results = {
        "command": command(script, arguments, "seeds"),
        "machine": machine(),
        "runs": journal.runs,
    }
    write(arguments.out, report(results), results)


def accuracies(runs: Sequence[Run]) -> str:
    """Returns mean and deviation of the accuracies of runs in percent."""
    return mean_and_deviation([100 * run["accuracy"] for run in runs])


def change(runs: Sequence[Run], others: Sequence[Run]) -> str:
    """Returns the mean difference of the accuracies of runs of the same seeds, and its verdict."""
    pairs = zip(runs, others, strict=True)
    differences = np.array([100 * (one["accuracy"] - other["accuracy"]) for one, other in pairs])
    return f"{differences.mean():+.1f}, {verdict(differences)}"
