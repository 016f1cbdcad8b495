"""Mixes of tasks of different kinds on the same examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np
from scipy.special import entr

import keras_lp as lp
from keras_lp.tasks.classification import as_task
from keras_lp.tasks.task import TaskLike
from lib.multitask import Part, divided, text_encoder, texts


@dataclasses.dataclass
class Mix:
    """Tasks on the same examples, and how they are trained."""

    tasks: dict[str, TaskLike]
    what: str
    parts: Sequence[Part]  # train, val, test
    network: Callable[[], keras.Model]
    epochs: int
    batch: int
    rates: tuple[float, ...]


def network(inputs: int) -> Callable[[], keras.Model]:
    return lambda: keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(64, "relu")])


def rare(data_dir: str | None) -> Mix:
    """Tasks that have nothing in common: random directions of the same random numbers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8000, 40)).astype("float32")
    labels = (x @ rng.normal(size=(40, 28)) / 40**0.5 > 2).astype("int32")
    topic = (x @ rng.normal(size=(40, 4))).argmax(1)
    return Mix(
        {"rare": lp.MultiLabel(28), "topic": 4},
        "random numbers; 28 labels, each on 1 to 5 % of the examples, and 4 classes",
        divided((x, {"rare": labels, "topic": topic}), 4000, 2000),
        network(40), 15, 32, (1e-3, 3e-3, 1e-2),
    )  # fmt: skip


def trec(data_dir: str | None) -> Mix:
    problem = texts("trec", data_dir)
    count = problem.classes["fine"]
    parts = [
        (x, {"coarse": y["coarse"], "fine": np.eye(count, dtype="int32")[y["fine"]]})
        for x, y in (problem.train, problem.val, problem.test)
    ]
    x, y = parts[0]
    y["fine"][np.random.default_rng(0).permutation(len(x))[: len(x) // 2]] = -1
    return Mix(
        {"coarse": problem.classes["coarse"], "fine": lp.MultiLabel(count)},
        f"questions; 6 coarse types as classes, {count} fine types as labels, half of them missing",
        parts, text_encoder, 8, 64, (3e-3, 1e-2, 3e-2),
    )  # fmt: skip


def clinc(data_dir: str | None) -> Mix:
    problem = texts("clinc_oos", data_dir)
    return Mix(
        dict(problem.classes), "requests; 10 domains and 150 intents, both as classes",
        [problem.train, problem.val, problem.test], text_encoder, 5, 64, (3e-3, 1e-2, 3e-2),
    )  # fmt: skip


def pictures() -> tuple[np.ndarray, np.ndarray]:
    loaded = [lp.load_dataset("digits", split=s, batch_size=-1) for s in ("train", "test")]
    x, y = (np.concatenate(arrays) for arrays in zip(*loaded, strict=True))
    return x.reshape(len(x), 64).astype("float32") / 255, y


def digits(data_dir: str | None) -> Mix:
    x, y = pictures()
    ink = x.reshape(-1, 8, 8) / x.sum(1)[:, None, None]
    centre = np.stack([(ink.sum(2) * range(8)).sum(1), (ink.sum(1) * range(8)).sum(1)], 1)
    traits = np.stack([y % 2, y > 4, np.isin(y, [0, 6, 8, 9]), np.isin(y, [2, 3, 5, 7])], 1)
    labels = {"digit": y, "centre": centre.astype("float32"), "traits": traits.astype("int32")}
    return Mix(
        {"digit": 10, "centre": lp.Regression(2), "traits": lp.MultiLabel(4)},
        "handwritten digits; the digit, the centre of the ink (2 numbers) and 4 common labels",
        divided((x, labels), 1000, 397), network(64), 30, 32, (1e-3, 3e-3, 1e-2),
    )  # fmt: skip


def below(data_dir: str | None, labels: bool = False) -> Mix:
    """What is below the upper half of a digit: numbers, or labels for black and white."""
    x, y = pictures()
    pixels = x[:, 32:]
    pixels = pixels[:, pixels.std(0) > 0.05]
    count = pixels.shape[1]
    kind = "labels, white on 40 % of the examples" if labels else "numbers"
    if labels:
        pixels = (pixels > 0.5).astype("int32")
    return Mix(
        {"digit": 10, "below": lp.MultiLabel(count) if labels else lp.Regression(count)},
        f"upper halves of handwritten digits; the digit, and {count} pixels below as {kind}",
        divided((x[:, :32], {"digit": y, "below": pixels}), 1000, 397),
        network(32), 30, 32, (1e-3, 3e-3, 1e-2),
    )  # fmt: skip


def below_labels(data_dir: str | None) -> Mix:
    return below(data_dir, labels=True)


MIXES = {"rare": rare, "trec": trec, "clinc_oos": clinc, "digits": digits,
         "below, numbers": below, "below, labels": below_labels}  # fmt: skip


# What a task of a mix is like


def counts(mix: Mix) -> dict[str, int]:
    """Returns how often the mean loss of each task counts in the default sum."""
    return {name: as_task(task).label_count for name, task in mix.tasks.items()}


def metric(mix: Mix, task: str) -> str:
    """Returns the name of the first metric."""
    return as_task(mix.tasks[task]).make_metrics()[0].name


def sign(mix: Mix, task: str) -> int:
    """Returns -1 if less of the metric is better, else 1."""
    return -1 if isinstance(mix.tasks[task], lp.Regression) else 1


def constant_loss(mix: Mix, name: str) -> float:
    """Returns the mean loss of the best prediction that is the same for all training examples."""
    task, y = as_task(mix.tasks[name]), mix.parts[0][1][name]
    if isinstance(task, lp.Regression):
        return 1.0  # squares in units of the deviation
    if isinstance(task, lp.MultiLabel):
        known = y >= 0
        share = (y * known).sum(0) / known.sum(0)
        return float(np.average(entr(share) + entr(1 - share), weights=known.sum(0)))
    return float(entr(np.bincount(y[y >= 0]) / (y >= 0).sum()).sum())
