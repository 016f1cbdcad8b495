"""Several tasks on the same examples: problems, batches, and models that are traced once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import keras
import numpy as np

import keras_lp as lp

WORDS = 3000  # size of the vocabulary, pairs of words included
LENGTH = 24  # words and pairs of words of a text
Part = tuple[np.ndarray, dict[str, np.ndarray]]


@dataclasses.dataclass
class Problem:
    """Inputs with the labels of each task, and the number of classes of each task."""

    name: str
    classes: dict[str, int]
    train: Part
    val: Part
    test: Part


def texts(name: str, data_dir: str | None) -> Problem:
    """Returns trec (coarse and fine type of a question) or clinc_oos (domain and intent).

    Texts become numbers of words and pairs of words; the vocabulary is that of the training texts.
    """
    parts = {}
    for split in ("train", "test") if name == "trec" else ("train", "validation", "test"):
        x, y = lp.load_dataset(name, split=split, batch_size=-1, data_dir=data_dir)
        parts[split] = x, {task.removeprefix("label_"): labels for task, labels in y.items()}
    if "validation" not in parts:
        parts["validation"], parts["train"] = divided(parts["train"], 500)
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


def divided(part: Part, *counts: int) -> list[Part]:
    """Divides the examples at random into parts of these sizes and the rest."""
    order = np.random.default_rng(0).permutation(len(part[0]))
    return [take(part, index) for index in np.split(order, np.cumsum(counts))]


def take(part: Part, index: np.ndarray) -> Part:
    x, y = part
    return x[index], {task: labels[index] for task, labels in y.items()}


def text_encoder() -> keras.Model:
    """Returns an untrained network without a head: the mean of embeddings, and a dense layer."""
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
    """Yields the numbers without end, all of them in a new order before any comes again."""
    random = np.random.default_rng(seed)
    while True:
        yield from random.permutation(index)


def cosine(rate: float, done: float) -> float:
    """Returns the rate after this share of the steps; it falls to zero."""
    return rate * (1 + math.cos(math.pi * done)) / 2


class Restarted:
    """A model that is built and traced once, and gets the weights of a new one for each run."""

    def __init__(self, build: Callable[[], keras.Model], steps: int) -> None:
        """Takes what builds the model, and the steps of one call of the traced function."""
        self._build, self._steps = build, steps
        self._model: keras.Model | None = None

    def __call__(self, seed: int) -> keras.Model:
        if self._model is None:
            self._model = self._build()
            self._model.steps_per_execution = self._steps
        model = self._model
        keras.utils.set_random_seed(seed)
        new = self._build()
        model.set_weights(new.get_weights())
        for variable, start in zip(_random_states(model), _random_states(new), strict=True):
            variable.assign(start)
        model.optimizer.build(model.trainable_variables)
        for variable in model.optimizer.variables:
            variable.assign(np.zeros(variable.shape))
        return model


def _random_states(model: keras.Model) -> list[keras.Variable]:
    """The states of Dropout and PCGrad, which `get_weights` leaves out."""
    return [v for v in model.variables if v.name == "seed_generator_state"]


def accuracies(model: keras.Model, part: Part, tasks: list[str]) -> dict[str, float]:
    """Returns the accuracy of each task, of the examples that have its label."""
    x, y = part
    logits = model.predict(x, batch_size=500, verbose=0)  # divides all parts: one trace
    logits = logits if isinstance(logits, dict) else {tasks[0]: logits}
    return {
        task: round(float(np.mean((logits[task].argmax(-1) == y[task])[y[task] >= 0])), 5)
        for task in tasks
    }
