"""Networks that the studies reuse, and the problems that each is used on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_lp as lp
from lib.problems import (
    BANGLA,
    XRAY_LABELS,
    Arrays,
    Problem,
    cifar10_problem,
    draw,
    script_problem,
    xray_problem,
)

SIZE = 96  # pixels, of the pictures that MobileNet sees
TOKENS, WORDS, WIDTH = 24, 5000, 128  # of a text, in the vocabulary, of a word's vector

Build = Callable[..., lp.Model]


def classifier(
    shape: tuple[int, ...],
    layers: Sequence[keras.layers.Layer],
    optimizer: keras.optimizers.Optimizer,
    metrics: Sequence[str] | None = ("accuracy",),
) -> keras.Model:
    """Returns a compiled Sequential model that gives logits."""
    model = keras.Sequential([keras.Input(shape), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=metrics and list(metrics))
    return model


def conv_net() -> keras.Model:
    """Returns a small convolutional network without a head, for images of 28 by 28 pixels."""
    layers = [
        keras.Input((28, 28, 1)),
        keras.layers.Conv2D(16, 5, 2, activation="relu", name="block1"),
        keras.layers.Conv2D(32, 3, 2, activation="relu", name="block2"),
        keras.layers.Flatten(name="flat"),
        keras.layers.Dense(64, "relu", name="block3"),
    ]
    return keras.Sequential(layers, name="conv_net")


def accuracy(model: keras.Model, data: Arrays) -> float:
    x, y = data
    return float(np.mean(y == model.predict(x, batch_size=256, verbose=0).argmax(-1)))


def short_averages(model: keras.Model) -> keras.Model:
    """Lets BatchNormalization average over some 10 steps, for trainings of a few hundred."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            short_averages(layer)
        elif isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9
    return model


@dataclasses.dataclass
class Setting:
    """A problem, the numbers of examples that it is learned from, and its backbone.

    `build` takes arguments of `lp.transfer_model` and returns the model.
    """

    problem: Problem
    sizes: tuple[int, ...]
    build: Build
    uneven: bool = False


def settings(mobilenet: Path, cifar10: Path, data_dir: str | None, folder: Path) -> list[Setting]:
    """Returns four problems; networks that are pretrained for them are kept in the folder."""
    sizes = (40, 200, 1000)
    options = {"weights": mobilenet, "image_size": SIZE, "backbone_kwargs": {"alpha": 0.25}}
    build = functools.partial(lp.transfer_model, "MobileNet", **options)
    cifar = functools.partial(build, task=10, input_shape=(32, 32, 3))
    xray = functools.partial(build, task=XRAY_LABELS, input_shape=(28, 28, 1))
    return [
        Setting(cifar10_problem(cifar10), sizes, cifar),
        Setting(xray_problem(data_dir), sizes, xray, uneven=True),
        script_setting(data_dir, folder),
        *text_settings(data_dir, folder),
    ]


# Digits of other scripts


def small_network() -> keras.Model:
    """Returns an untrained network without a head, for grey pictures of 32 by 32 from 0 to 255."""
    layers = [keras.Input((32, 32, 1)), keras.layers.Rescaling(1 / 255)]
    for i, (filters, strides) in enumerate([(32, 2), (64, 2), (64, 1)], start=1):
        layers += [
            keras.layers.Conv2D(filters, 3, strides, "same", name=f"block{i}_conv"),
            keras.layers.GroupNormalization(8, name=f"block{i}_norm"),
            keras.layers.ReLU(name=f"block{i}_relu"),
        ]
    return keras.Sequential(layers, name="small_network")


def untrained(**options: Any) -> lp.Model:
    """Returns a model of ten classes on the small network."""
    return lp.transfer_model(
        small_network(), 10, pretrained=False, trainable="all", pooling="flatten", **options
    )


def pretrain(source: str, data_dir: str | None, path: Path) -> float:
    """Trains on `source`, enlarged from 28 to 32 pixels, and saves; returns the test accuracy."""
    parts = {}
    for split in ("train", "test"):
        x, y = lp.load_dataset(source, split=split, batch_size=-1, data_dir=data_dir)
        parts[split] = np.asarray(keras.layers.Resizing(32, 32)(x)), y
    keras.utils.set_random_seed(0)
    model = untrained(dropout=0.5)
    model.fit(*parts["train"], batch_size=64, verbose=0)
    model.save(path)
    return accuracy(model, parts["test"])


def script_setting(data_dir: str | None, folder: Path) -> Setting:
    """Returns the digits of cmaterdb/bangla with a network that learned mnist."""
    path = folder / "mnist.keras"
    if not path.exists():
        pretrain("mnist", data_dir, path)
    build = functools.partial(lp.transfer_model, path, 10)
    return Setting(script_problem(BANGLA, data_dir), (100, 500), build)


# Texts


def text_settings(data_dir: str | None, folder: Path) -> list[Setting]:
    """Returns trec with a network that learned the intents of clinc_oos, and the reverse."""
    trec = text_parts("trec", "label-coarse", {"train": "train", "test": "test"}, data_dir)
    fine = text_parts("trec", "label-fine", {"train": "train"}, data_dir)["train"]
    names = {"train": "train", "val": "validation", "test": "test"}
    clinc = text_parts("clinc_oos", "intent", names, data_dir)
    val, rest = draw(trec["train"], 500, seed=0)
    cases = [
        (Problem("trec", _numbers(6), rest, val, trec["test"]), (60, 300, 1000), clinc["train"]),
        (Problem("clinc_oos", _numbers(150), **clinc), (1500, 3000), fine),
    ]
    found = []
    for problem, sizes, source in cases:
        path = folder / f"for_{problem.name}.keras"
        if not path.exists():
            pretrain_on_texts(source, path)
        build = functools.partial(lp.transfer_model, path, len(problem.labels))
        found.append(Setting(problem, sizes, build))
    return found


def _numbers(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def text_parts(
    name: str, label: str, splits: Mapping[str, str], data_dir: str | None
) -> dict[str, Arrays]:
    """Texts as numbers of words by a hash, so that all data sets have one vocabulary."""
    import tensorflow_datasets as tfds

    hashing = keras.layers.Hashing(WORDS, mask_value="")
    parts = {}
    for part, split in splits.items():
        rows = tfds.load(name, split=split, data_dir=data_dir, batch_size=-1)
        text = tf.strings.regex_replace(tf.strings.lower(rows["text"]), r"[^a-z0-9 ]", " ")
        tokens = hashing(tf.strings.split(text).to_tensor("", shape=(None, TOKENS)))
        parts[part] = np.asarray(tokens, "int32"), np.asarray(rows[label], "int64")
    return parts


def text_network() -> keras.Model:
    """Returns an untrained network without a head, for texts of `text_parts`."""
    layers = [
        keras.Input((TOKENS,), dtype="int32"),
        keras.layers.Embedding(WORDS, WIDTH, name="words"),
        keras.layers.Conv1D(WIDTH, 3, padding="same", activation="relu", name="block1"),
        keras.layers.GlobalMaxPooling1D(name="largest"),
        keras.layers.Dense(WIDTH, activation="relu", name="block2"),
    ]
    return keras.Sequential(layers, name="text_network")


def pretrain_on_texts(data: Arrays, path: Path, seed: int = 0) -> None:
    """Trains the network of texts and saves it."""
    keras.utils.set_random_seed(seed)
    classes = int(data[1].max()) + 1
    model = lp.transfer_model(text_network(), classes, pretrained=False, trainable="all")
    model.fit(*data, epochs=6, batch_size=64, verbose=0)
    model.save(path)
