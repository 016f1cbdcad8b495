"""Several tasks on the same examples: problems, batches, and models that are traced once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

import keras_lp as lp

PICTURES = "mnist + fashion_mnist"
WORDS = 3000  # size of the vocabulary, pairs of words included
LENGTH = 24  # words and pairs of words of a text
Part = tuple[np.ndarray, dict[str, np.ndarray]]


@dataclasses.dataclass
class Problem:
    """Inputs with labels of several tasks, their numbers of classes, and what builds a network."""

    name: str
    classes: dict[str, int]
    network: Callable[[], keras.Model]
    train: Part
    val: Part
    test: Part


def load(name: str, data_dir: str | None) -> Problem:
    """Returns a problem of texts or, of names joined by a plus sign, of pictures."""
    return (pictures if " + " in name else texts)(name, data_dir)


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
    return Problem(name, classes, text_encoder, *ready)


def pictures(name: str, data_dir: str | None) -> Problem:
    """Returns data sets of pictures as one: the labels of the other tasks are missing."""
    names = name.split(" + ")
    parts: dict[str, list] = {"train": [], "val": [], "test": []}
    for one in names:
        loaded = {}
        for split in ("train", "test"):
            x, y = lp.load_dataset(one, split=split, batch_size=-1, data_dir=data_dir)
            missing = np.full_like(y, -1)
            loaded[split] = x, {task: y if task == one else missing for task in names}
        loaded["val"], loaded["train"] = divided(loaded["train"], 5000)
        for split, both in parts.items():
            both.append(loaded[split])
    joined = {
        split: (
            np.concatenate([x for x, _ in both]),
            {task: np.concatenate([y[task] for _, y in both]) for task in names},
        )
        for split, both in parts.items()
    }
    return Problem(name, dict.fromkeys(names, 10), small_network, **joined)


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


def small_network() -> keras.Model:
    """Returns a network without a head, for grey pictures of 28 by 28 from 0 to 255."""
    layers = [
        keras.Input((28, 28, 1)),
        keras.layers.Rescaling(1 / 255),
        keras.layers.Conv2D(16, 3, 2, "same", activation="relu"),
        keras.layers.Conv2D(32, 3, 2, "same", activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, "relu"),
    ]
    return keras.Sequential(layers, name="small_network")


def shuffled(index: np.ndarray, seed: int) -> Iterator[int]:
    """Yields the numbers without end, all of them in a new order before any comes again."""
    random = np.random.default_rng(seed)
    while True:
        yield from random.permutation(index)


def batches(problem: Problem, tasks: list[str], labels: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the numbers of the examples of a batch, with so many labels of each task."""
    known = [np.flatnonzero(problem.train[1][task] >= 0) for task in tasks]
    if len(tasks) > 1 and all(np.array_equal(known[0], one) for one in known):
        known = known[:1]  # each example has all labels
    streams = [shuffled(index, seed) for index in known]
    while True:
        yield np.array([next(stream) for stream in streams for _ in range(labels)])


def cosine(rate: float, done: float) -> float:
    """Returns the rate after this share of the steps; it falls to zero."""
    return rate * (1 + math.cos(math.pi * done)) / 2


def model_of(
    network: Callable[[], keras.Model],
    tasks: Mapping[str, Any],
    pooling: str | None = None,
    **options: Any,
) -> lp.Model:
    """Returns a model on an untrained network; the options are for one of several tasks."""
    fixed = {"pretrained": False, "pooling": pooling}
    if len(tasks) == 1:
        return lp.transfer_model(network(), *tasks.values(), trainable="all", **fixed)
    return lp.multitask_model(network(), tasks, **fixed, **options)


def plain_model(
    network: Callable[[], keras.Model],
    classes: Mapping[str, int],
    pooling: str | None = None,
    **options: Any,
) -> keras.Model:
    """Returns the same in plain Keras; its losses are means over the whole batch."""
    backbone = network()
    features = backbone.outputs[0]
    if pooling:
        features = keras.layers.GlobalAveragePooling2D()(features)
    logits = {name: keras.layers.Dense(n, name=name)(features) for name, n in classes.items()}
    model = keras.Model(backbone.inputs[0], logits)
    loss = keras.losses.SparseCategoricalCrossentropy
    model.compile("adam", {name: loss(from_logits=True) for name in classes}, **options)
    return model


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
