"""What the multitask benchmarks share: texts of two tasks, a small encoder, models used again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from common import machine
from studies import Run

import keras_lp as lp

WORDS = 3000  # size of the vocabulary, pairs of words included
LENGTH = 24  # words and pairs of words a text
Labels = dict[str, np.ndarray]
Part = tuple[np.ndarray, Labels]


@dataclasses.dataclass
class Problem:
    """Inputs with the labels of each task, and the number of classes of each task."""

    name: str
    classes: dict[str, int]
    train: Part
    val: Part
    test: Part


def texts(name: str, data_dir: str | None) -> Problem:
    """trec (coarse and fine type of a question) or clinc_oos (domain and intent of a request).

    Texts become numbers of words and pairs of words; the vocabulary is of the training texts.
    """
    parts = {}
    for split in ("train", "test") if name == "trec" else ("train", "validation", "test"):
        x, y = lp.load_dataset(name, split=split, batch_size=-1, data_dir=data_dir)
        parts[split] = x, {task.removeprefix("label_"): labels for task, labels in y.items()}
    if "validation" not in parts:
        parts["validation"], parts["train"] = held_out(parts["train"], 500)
    vectorize = keras.layers.TextVectorization(WORDS, ngrams=2, output_sequence_length=LENGTH)
    vectorize.adapt(parts["train"][0])
    ready = [
        (np.asarray(vectorize(parts[split][0]), "int32"), parts[split][1])
        for split in ("train", "validation", "test")
    ]
    # The first task is the one with fewer classes.
    sizes = {task: int(labels.max()) + 1 for task, labels in parts["train"][1].items()}
    classes = dict(sorted(sizes.items(), key=lambda item: item[1]))
    return Problem(name, classes, *ready)


def held_out(part: Part, count: int) -> tuple[Part, Part]:
    """Cuts `count` examples out at random; returns them and the rest."""
    order = np.random.default_rng(0).permutation(len(part[0]))
    return take(part, order[:count]), take(part, order[count:])


def take(part: Part, index: np.ndarray) -> Part:
    x, y = part
    return x[index], {task: labels[index] for task, labels in y.items()}


def text_encoder() -> keras.Model:
    """An untrained network without a head: the mean of embeddings, and a dense layer."""
    return keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            keras.layers.Embedding(WORDS, 32, mask_zero=True, name="embedding"),
            keras.layers.GlobalAveragePooling1D(name="mean"),
            keras.layers.Dense(128, "relu", name="dense"),
        ],
        name="text_encoder",
    )


def shuffled(index: np.ndarray, seed: int) -> Iterator[int]:
    """Yields the numbers for ever, all of them in a new order before any comes again."""
    random = np.random.default_rng(seed)
    while True:
        yield from random.permutation(index)


def restart(model: keras.Model, build: Callable[[], keras.Model], seed: int) -> None:
    """Gives a compiled model the weights of a new one: it need not be traced again."""
    keras.utils.set_random_seed(seed)
    new = build()
    model.set_weights(new.get_weights())
    for variable, start in zip(_random_states(model), _random_states(new), strict=True):
        variable.assign(start)
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables:
        variable.assign(np.zeros(variable.shape))


def _random_states(model: keras.Model) -> list[keras.Variable]:
    """What Dropout and PCGrad draw by, which `get_weights` leaves out."""
    return [v for v in model.variables if v.name == "seed_generator_state"]


def cosine(rate: float, done: float) -> float:
    """The rate after this share of the steps; it falls to zero."""
    return rate * (1 + math.cos(math.pi * done)) / 2


def accuracies(model: keras.Model, part: Part, tasks: list[str]) -> dict[str, float]:
    """Accuracy of each task, of the examples that have its label."""
    x, y = part
    logits = model.predict(x, batch_size=500, verbose=0)  # divides all parts: one trace
    logits = logits if isinstance(logits, dict) else {tasks[0]: logits}
    return {
        task: round(float(np.mean((logits[task].argmax(-1) == y[task])[y[task] >= 0])), 5)
        for task in tasks
    }


class Journal:
    """Runs that are written as they are done, and not done again."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Reads what is there already, if it was made with the same settings."""
        self._path, self._settings = path, {**settings, "machine": machine("scikit-learn")}
        self.runs: list[Run] = []
        if path.exists():
            found = json.loads(path.read_text())
            if found["settings"] == self._settings:
                self.runs = found["runs"]

    def run(self, learned: Callable[[], Run], **key: Any) -> Run:
        """Returns the run with this key, done now if it is not there."""
        for run in self.runs:
            if all(run[name] == value for name, value in key.items()):
                return run
        run = {**key, **learned()}
        self.runs.append(run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"settings": self._settings, "runs": self.runs}))
        return run
