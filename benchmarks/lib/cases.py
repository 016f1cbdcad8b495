"""The data sets of the comparison: few labelled examples, and a network that knows other ones."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_lp as lp
from lib.networks import pretrain_on_texts, short_averages, text_network, text_parts
from lib.problems import (
    BANGLA,
    CIFAR,
    XRAY,
    Arrays,
    cifar10_problem,
    draw,
    script_problem,
    xray_problem,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import quickstart

TESTED = 1000  # test examples at most
HELD = 500  # source examples that tell what was forgotten
PIXELS = 64  # of the images that MobileNet sees
OTHER_LABELS = 400  # examples with a label of the second task, at least
DATA_SETS = (
    "digits", "mnist", "fashion_mnist", BANGLA, CIFAR, XRAY, "trec", "clinc_oos",
)  # fmt: skip
LABELLED = {"digits": 700}  # labelled examples, where there are fewer than a thousand
ONE_TASK = TWO_CLASSES = (XRAY,)  # data sets without labels of a second task, and with few classes


@dataclasses.dataclass(frozen=True)
class Files:
    """Where the data are.

    Attributes:
        data_dir: the folder of the TFDS data. Defaults to None: that of `TFDS_DATA_DIR`.
        cifar10: the npz file of cifar10_subset.
        mobilenet: the h5 file of MobileNet 0.25 with ImageNet weights, without its top.
    """

    data_dir: str | None = None
    cifar10: Path | None = None
    mobilenet: Path | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """What is learned, and from what.

    Attributes:
        names: the classes.
        train: labelled examples.
        test: test examples.
        pool: the training examples, of which `train` are the first.
        second: labels of the second task for the pool; None if there is none.
        build: `(task, **options)` gives a model on the pretrained network.
        untrained: returns the network without its weights.
        source: training and test examples that the network was trained on; None if not at hand.
        seen: how many examples each way sees, repeated ones included.
        seed: the seed.
    """

    names: list[str]
    train: Arrays
    test: Arrays
    pool: Arrays
    second: np.ndarray | None
    build: Callable[..., lp.Model]
    untrained: Callable[..., lp.Model]
    source: tuple[Arrays, Arrays] | None
    seen: int
    seed: int

    def first(self, count: int) -> Case:
        """Returns the case with the labels of the first examples only."""
        x, y = self.pool
        return dataclasses.replace(self, train=(x[:count], y[:count]))


def make(
    name: str, seed: int, files: Files, most: int, pretraining: int, seen: int, folder: Path
) -> Case:
    """Returns the case of a data set and a seed.

    Args:
        name: one of `DATA_SETS`.
        seed: changes the examples, the networks that are trained here, and the clients.
        files: where the data are.
        most: labelled examples that a run may use.
        pretraining: images that a network sees before.
        seen: how many examples each way sees.
        folder: where the networks of this seed are kept.
    """
    keras.utils.set_random_seed(seed)
    kind = {CIFAR: _imagenet, XRAY: _imagenet, BANGLA: _script, "trec": _texts, "clinc_oos": _texts}
    parts = kind.get(name, _half_of_the_classes)(name, seed, files, pretraining, folder)
    train, test = parts["train"], parts["test"]
    count = min(max(most, OTHER_LABELS), len(train[1]))
    rows = np.random.default_rng(seed).permutation(len(train[1]))[:count]
    parts["train"] = train[0][rows], train[1][rows]
    if parts.get("second") is not None:
        parts["second"] = parts["second"][rows]
    if len(test[1]) > TESTED:
        parts["test"] = draw(test, TESTED, seed=0)[0]
    known = {"second": None, "source": None}
    return Case(**{**known, **parts}, pool=parts["train"], seen=seen, seed=seed)


def _half_of_the_classes(
    name: str, seed: int, files: Files, pretraining: int, folder: Path
) -> dict[str, Any]:
    """Images: a small network knows the first half of the classes; the second half is learned."""
    parts = {
        split: lp.load_dataset(name, split=split, batch_size=-1, data_dir=files.data_dir)
        for split in ("train", "test")
    }
    half = (int(parts["train"][1].max()) + 1) // 2
    old = {split: (x[y < half], y[y < half]) for split, (x, y) in parts.items()}
    new = {split: (x[y >= half], y[y >= half] - half) for split, (x, y) in parts.items()}
    names = [str(label) for label in range(half, int(parts["train"][1].max()) + 1)]
    path = folder / f"for_{name}.keras"
    problem = quickstart.Problem(old["train"], new["train"], new["test"], names)
    _keep(path, lambda new: quickstart.pretrain(problem, new, seed, pretraining))
    return {
        "names": names,
        **new,
        "second": (new["train"][1] + half) % 2,  # odd numbers; of fashion_mnist, shoes
        **_builders(path, lambda: quickstart.small_network(old["train"][0].shape[1:])),
        "source": (_some(old["train"]), _some(old["test"])),
    }


def _script(name: str, seed: int, files: Files, pretraining: int, folder: Path) -> dict[str, Any]:
    """Digits of another script: a small network knows those of mnist."""
    problem = script_problem(name, files.data_dir)
    enlarge = keras.layers.Resizing(32, 32)
    source = {}
    for split in ("train", "test"):
        x, y = lp.load_dataset("mnist", split=split, batch_size=-1, data_dir=files.data_dir)
        some = _some((x, y)) if split == "test" else (x[:15_000], y[:15_000])
        source[split] = np.asarray(enlarge(some[0])), some[1]
    path = folder / "mnist.keras"
    old = quickstart.Problem(source["train"], problem.train, problem.test, problem.labels)
    _keep(path, lambda new: quickstart.pretrain(old, new, seed, pretraining))
    return {
        "names": problem.labels,
        "train": problem.train,
        "test": problem.test,
        "second": problem.train[1] % 2,
        **_builders(path, lambda: quickstart.small_network((32, 32, 1))),
        "source": (_some(source["train"]), source["test"]),
    }


def _imagenet(name: str, seed: int, files: Files, pretraining: int, folder: Path) -> dict[str, Any]:
    """Photos or X-rays: MobileNet 0.25 with ImageNet weights."""
    if files.mobilenet is None or (name == CIFAR and files.cifar10 is None):
        needed = "--mobilenet and --cifar10" if name == CIFAR else "--mobilenet"
        raise SystemExit(f"{name} needs {needed}.")
    if name == CIFAR:
        problem = cifar10_problem(files.cifar10)
        vehicles = ("airplane", "automobile", "ship", "truck")
        second = np.isin(problem.train[1], [problem.labels.index(one) for one in vehicles]) * 1
    else:
        problem, second = xray_problem(files.data_dir), None

    def build(task: Any, builder: Any = lp.transfer_model, **options: Any) -> lp.Model:
        given = {"weights": files.mobilenet, **options}
        shape = {"input_shape": problem.train[0].shape[1:], "image_size": PIXELS}
        model = builder("MobileNet", task, backbone_kwargs={"alpha": 0.25}, **shape, **given)
        return short_averages(model) if given["weights"] is None else model

    return {
        "names": problem.labels,
        "train": problem.train,
        "test": problem.test,
        "second": second,
        "build": build,
        "untrained": lambda task: build(task, weights=None, trainable="all"),
    }


def _texts(name: str, seed: int, files: Files, pretraining: int, folder: Path) -> dict[str, Any]:
    """Questions or requests: a small network knows the intents or types of the other data set."""
    label, second = ("label-coarse", "label-fine") if name == "trec" else ("domain", "intent")
    parts = text_parts(name, label, {"train": "train", "test": "test"}, files.data_dir)
    more = text_parts(name, second, {"train": "train"}, files.data_dir)["train"][1]
    other, source_label = ("clinc_oos", "intent") if name == "trec" else ("trec", "label-fine")
    names = {"train": "train", "test": "test"}
    source = text_parts(other, source_label, names, files.data_dir)
    path = folder / f"for_{name}.keras"
    _keep(path, lambda new: pretrain_on_texts(source["train"], new, seed))
    return {
        "names": [str(i) for i in range(int(parts["train"][1].max()) + 1)],
        **parts,
        "second": more,
        **_builders(path, text_network, pooling=None),
        "source": (_some(source["train"], 3000), _some(source["test"])),
    }


def _builders(path: Path, network: Callable[[], keras.Model], **options: Any) -> dict[str, Any]:
    """Returns what builds models on a network that is kept in a file."""
    options = options or {"pooling": "flatten"}

    def build(task: Any, builder: Any = lp.transfer_model, **more: Any) -> lp.Model:
        return builder(path, task, **options, **more)

    def untrained(task: Any) -> lp.Model:
        return lp.transfer_model(network(), task, pretrained=False, trainable="all", **options)

    return {"build": build, "untrained": untrained}


def _keep(path: Path, pretrain: Callable[[Path], Any]) -> None:
    """Pretrains if the file is not there; a run that was killed leaves no half of a file."""
    if not path.exists():
        new = path.with_suffix(".new.keras")
        path.parent.mkdir(parents=True, exist_ok=True)
        pretrain(new)
        new.replace(path)


def _some(data: Arrays, count: int = HELD) -> Arrays:
    return draw(data, count, seed=0)[0] if len(data[1]) > count else data
