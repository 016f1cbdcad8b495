"""The command `python -m benchmarks`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from lib import comparison
from lib.comparison_page import html_page, markdown
from lib.journal import Journal, Run
from lib.machine import machine

FOLDER = Path(__file__).resolve().parents[1]
QUICK = {"examples": [20, 100], "seeds": 2, "pretraining": 30_000}
FULL = {"examples": [20, 50, 100, 400], "seeds": 3, "pretraining": 115_000}


def digest() -> str:
    """Returns a digest of the code on which runs depend."""
    paths = FOLDER / "lib" / "comparison.py", FOLDER.parent / "examples" / "quickstart.py"
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def compare(doc: str, given: list[str] | None = None) -> None:
    """Runs the comparison.

    Args:
        doc: the text of `--help`, whose third paragraph is the method.
        given: the options. Defaults to None: those of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="digits, few examples, two seeds")
    parser.add_argument("--data", nargs="+", default=["digits"], help="digits, or TFDS names")
    parser.add_argument("--data-dir", help="folder of the TFDS data (default: TFDS_DATA_DIR)")
    parser.add_argument("--only", nargs="+", choices=list(comparison.WAYS), help="ways to run")
    parser.add_argument("--seeds", type=int, help="how many (default: 3, with --quick 2)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    arguments = parser.parse_args(given)
    settings = QUICK if arguments.quick else FULL
    seeds = arguments.seeds or settings["seeds"]
    ways = arguments.only or list(comparison.WAYS)
    tf.get_logger().setLevel("ERROR")
    arguments.out.mkdir(parents=True, exist_ok=True)
    code = {"code": digest(), "pretraining": settings["pretraining"]}
    kind = "quick" if arguments.quick else "full"  # a quick run leaves the runs of a full one
    journal = Journal(arguments.out / f"report.{kind}.json", code)
    total = len(arguments.data) * seeds * len(settings["examples"]) * len(ways)
    done, start = 0, time.perf_counter()
    for data, seed in itertools.product(arguments.data, range(seeds)):
        wanted = list(itertools.product(settings["examples"], ways))
        with tempfile.TemporaryDirectory() as folder:
            prepared = functools.cache(
                functools.partial(prepare, data, seed, arguments.data_dir, settings, folder)
            )
            for examples, way in wanted:
                learn = functools.partial(learned, prepared, way, examples)
                key = {"data_set": data, "seed": seed, "examples": examples, "way": way}
                run = journal.run(learn, **key)
                done += 1
                left = (time.perf_counter() - start) / done * (total - done)
                print(
                    f"{done}/{total} {data}, seed {seed}, {examples} examples, {way}: "
                    f"{run['accuracy']:.1%}; about {left / 60:.0f} min left",
                    flush=True,
                )
    write(arguments, journal, doc)


def prepare(
    data: str, seed: int, data_dir: str | None, settings: dict[str, Any], folder: str
) -> tuple[comparison.Case, float]:
    """Returns the problem, the pretrained network and its accuracy on the source classes."""
    keras.utils.set_random_seed(seed)
    most = max(settings["examples"])
    found, source_test = comparison.problem(data, seed, data_dir, most)
    path = Path(folder) / "pretrained.keras"
    comparison.quickstart.pretrain(found, path, seed, settings["pretraining"])
    case = comparison.Case(found, source_test, path, found.train, seed)
    return case, comparison.source_accuracy(path, case)


def learned(prepared: Callable[[], tuple[comparison.Case, float]], way: str, examples: int) -> Run:
    """Returns the run of a way on the first examples."""
    case, before = prepared()
    x, y = case.train
    data = dataclasses.replace(case.data, train=(x[:examples], y[:examples]))
    own = dataclasses.replace(case, data=data, train=data.train)
    return comparison.measure(way, own, before)


def write(arguments: argparse.Namespace, journal: Journal, doc: str) -> None:
    """Writes the page, the Markdown and the numbers."""
    words = ["--quick"] if arguments.quick else ["--data", *arguments.data]
    results = {
        "command": " ".join(["python -m benchmarks", *words]),
        "machine": machine("tensorflow-federated"),
        "method": doc.split("\n\n")[2],
        "runs": journal.runs,
    }
    (arguments.out / "report.json").write_text(json.dumps(results, indent=1))
    (arguments.out / "report.md").write_text(markdown(results))
    (arguments.out / "report.html").write_text(html_page(results))
    print(f"\n{markdown(results)}\nPage: {arguments.out / 'report.html'}")
