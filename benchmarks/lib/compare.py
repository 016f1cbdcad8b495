"""The command `python -m benchmarks`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from lib import cases, measures, peers
from lib.comparison_page import html_page, markdown
from lib.journal import Journal, Run
from lib.machine import machine, one_thread
from lib.ways import SKEWED, WAYS

FOLDER = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
        examples: numbers of labelled examples.
        middle: the number with which rates and peers are compared.
        seeds: how many.
        pretraining: images that a network sees before.
        seen: how many examples each way sees, repeated ones included.
    """

    examples: tuple[int, ...]
    middle: int
    seeds: int
    pretraining: int
    seen: int


QUICK = Settings((20, 100), 100, 2, 30_000, 2400)  # `seen`: whole epochs of half of the steps
FULL = Settings((20, 100, 1000), 100, 3, 60_000, 8000)


class Task(NamedTuple):
    """One training: what it is kept by, and what does it."""

    key: dict[str, Any]
    learn: Callable[[], Run]


def digest(*names: str) -> str:
    """Returns a digest of keras_lp, the quickstart and files of `lib`, on which runs depend."""
    root = FOLDER.parent
    paths = [FOLDER / "lib" / name for name in names]
    paths += [root / "examples" / "quickstart.py", *sorted((root / "keras_lp").rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def code() -> dict[str, str]:
    """Returns the digests of the code that pretrains, of that of the ways, and of the peers."""
    networks = ("cases.py", "networks.py", "problems.py")
    ways = (*networks, "ways.py", "measures.py", "cost.py")
    return {
        "networks": digest(*networks),
        "way": digest(*ways),
        "peer": digest(*ways, "peers.py", "recipes.py", "flower.py", "rounds.py"),
    }


@functools.lru_cache(maxsize=1)  # one data set and seed at a time stays in memory
def prepared(
    data: str, seed: int, settings: Settings, files: cases.Files, folder: Path
) -> cases.Case:
    most = max(settings.examples)
    return cases.make(data, seed, files, most, settings.pretraining, settings.seen, folder)


@functools.lru_cache(maxsize=1)
def source(*made: Any) -> measures.SourceHead | None:
    return measures.source_head(prepared(*made))


def run_way(name: str, examples: int, *made: Any) -> Run:
    return measures.measure(name, prepared(*made).first(examples), source(*made))


def run_peer(name: str, examples: int, *made: Any) -> Run:
    return peers.measure(name, prepared(*made).first(examples))


def tasks(
    data: str,
    seed: int,
    settings: Settings,
    names: Sequence[str],
    arguments: Any,
    versions: dict[str, str],
) -> Iterator[Task]:
    """Yields the trainings of a data set and a seed."""
    files = cases.Files(arguments.data_dir, arguments.cifar10, arguments.mobilenet)
    name_of = f"{versions['networks']}_{settings.pretraining}_{seed}"
    made = data, seed, settings, files, arguments.out / "report.networks" / name_of
    most = cases.LABELLED.get(data, max(settings.examples))
    for examples, name in itertools.product(settings.examples, names):
        way, peer = WAYS.get(name), peers.PEERS.get(name)
        kind = "way" if way else "peer"
        at_middle = way.rates if way else True
        needs_second = way.second if way else peer.second
        if (
            examples > most
            or (at_middle and examples != settings.middle)
            or (needs_second and data in cases.ONE_TASK)
            or (name == SKEWED and data in cases.TWO_CLASSES)
            or (peer and peer.images and data in peers.TEXTS)
        ):
            continue
        key = {"data_set": data, "seed": seed, "examples": examples, kind: name}
        learn = functools.partial(run_way if way else run_peer, name, examples, *made)
        yield Task({**key, "code": versions[kind]}, learn)


def compare(doc: str, given: list[str] | None = None) -> None:
    """Runs the comparison.

    Args:
        doc: the text of `--help`, whose third paragraph is the method.
        given: the options. Defaults to None: those of the command line.
    """
    every = [*WAYS, *peers.PEERS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="digits, few examples, two seeds")
    parser.add_argument(
        "--data", nargs="+", choices=cases.DATA_SETS, metavar="NAME",
        help=f"some of: {', '.join(cases.DATA_SETS)} (default: all whose files are given)",
    )  # fmt: skip
    parser.add_argument("--data-dir", help="folder of the TFDS data (default: TFDS_DATA_DIR)")
    parser.add_argument("--cifar10", type=Path, help="npz file of cifar10_subset")
    parser.add_argument("--mobilenet", type=Path, help="h5 file of MobileNet 0.25, no top")
    parser.add_argument(
        "--only", nargs="+", choices=every, metavar="NAME", help=f"some of: {'; '.join(every)}"
    )
    parser.add_argument("--seeds", type=int, help="how many (default: 3, with --quick 2)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    arguments = parser.parse_args(given)
    settings = QUICK if arguments.quick else FULL
    seeds = arguments.seeds or settings.seeds
    data_sets = arguments.data or (["digits"] if arguments.quick else given_data(arguments))
    names = arguments.only or every
    for package in ("vl_convert", "tensorflow_federated", "ai_edge_litert"):
        if importlib.util.find_spec(package) is None:  # hours before it is needed
            raise SystemExit(f"{package} is not installed. See Install in the README: '.[all]'.")
    one_thread()
    tf.get_logger().setLevel("ERROR")
    kind = "quick" if arguments.quick else "full"  # a quick run leaves the runs of a full one
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = {"pretraining": settings.pretraining, "seen": settings.seen}
    journal = Journal(arguments.out / f"report.{kind}.json", kept)
    journal.runs = [run for run in journal.runs if "missing" not in run]  # these are tried again
    versions = code()
    planned = [
        task
        for seed, data in itertools.product(range(seeds), data_sets)
        for task in tasks(data, seed, settings, names, arguments, versions)
    ]
    if not planned:
        raise SystemExit(f"None of {'; '.join(names)} can run on {', '.join(data_sets)}.")
    run_all(planned, journal)
    found = [run for run in journal.runs if run["code"] in versions.values()]
    write(arguments, settings, found, doc)


def given_data(arguments: argparse.Namespace) -> list[str]:
    """Returns the data sets whose files are given."""
    needed = {cases.XRAY: [arguments.mobilenet]}
    needed[cases.CIFAR] = [arguments.mobilenet, arguments.cifar10]
    found = [name for name in cases.DATA_SETS if None not in needed.get(name, [])]
    for name in sorted(set(cases.DATA_SETS) - set(found)):
        print(f"{name} is left out: it needs --mobilenet{' and --cifar10' * (name == cases.CIFAR)}")
    return found


def run_all(planned: Sequence[Task], journal: Journal) -> None:
    """Runs what is not in the journal, and prints progress and the time left."""
    start, ran = time.perf_counter(), 0
    missing = [task for task in planned if not journal.has(**task.key)]
    for number, task in enumerate(planned, 1):
        ran += not journal.has(**task.key)
        run = journal.run(task.learn, **task.key)
        left = (time.perf_counter() - start) / max(ran, 1) * (len(missing) - ran)
        key = task.key
        result = run.get("missing") or f"{run['accuracy']:.1%}"
        print(
            f"{number}/{len(planned)} {key['data_set']}, seed {key['seed']}, {key['examples']} "
            f"examples, {key.get('way') or key['peer']}: {result}; about {left / 60:.0f} min left",
            flush=True,
        )


def command(options: dict[str, Any]) -> str:
    """Returns the command with these options, files without their folders."""
    words = ["python -m benchmarks"]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value:
            some = value if isinstance(value, list) else [value]
            shown = [one.name if isinstance(one, Path) else str(one) for one in some]
            words += [f"--{name}", *(shlex.quote(one) for one in shown)]
    return " ".join(words)


def write(arguments: Any, settings: Settings, runs: Sequence[Run], doc: str) -> None:
    """Writes the page, the Markdown and the numbers."""
    names = {"quick": arguments.quick}
    names |= {key: getattr(arguments, key) for key in ("data", "cifar10", "mobilenet", "only")}
    results = {
        "command": command(names | {"seeds": arguments.seeds}),
        "machine": machine("tensorflow-federated"),
        "method": doc.split("\n\n")[2],
        "settings": dataclasses.asdict(settings),
        "runs": [{key: run[key] for key in run if key != "code"} for run in runs],
    }
    (arguments.out / "report.json").write_text(json.dumps(results, indent=1))
    (arguments.out / "report.md").write_text(markdown(results))
    (arguments.out / "report.html").write_text(html_page(results, arguments.out))
    print(f"\n{markdown(results)}\nPage: {arguments.out / 'report.html'}")
