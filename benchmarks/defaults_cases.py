"""The problems that `defaults.py` compares on: pictures and texts, few and many examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from studies import XRAY_LABELS, Problem, draw, xray_problem
from xray import pretrain as pretrain_on_digits
from xray import script_problem

import keras_lp as lp

TOKENS, WORDS, WIDTH = 24, 5000, 128  # of a text, in the vocabulary, of a word's vector


@dataclasses.dataclass
class Setting:
    """A problem, the numbers of examples it is learned from, and the backbone it is learned on.

    `build` takes arguments of `lp.transfer_model` and returns the model.
    """

    problem: Problem
    sizes: tuple[int, ...]
    build: Callable[..., lp.Model]
    uneven: bool = False


def settings(weights: Path, cifar10: Path, data_dir: str | None, folder: Path) -> list[Setting]:
    """The problems; networks that are pretrained for them are kept in the folder."""
    cifar, xray = cifar10_problem(cifar10), xray_problem(data_dir)
    sizes = (40, 200, 1000)
    return [
        Setting(cifar, sizes, _mobilenet(weights, 10)),
        Setting(xray, sizes, _mobilenet(weights, XRAY_LABELS), uneven=True),
        scripts_setting(data_dir, folder),
        *text_settings(data_dir, folder),
    ]


def cifar10_problem(path: Path) -> Problem:
    with np.load(path) as arrays:
        train, test = (
            (arrays[f"{part}_images"], arrays[f"{part}_labels"].astype("int64"))
            for part in ("train", "test")
        )
    val, train = draw(train, 1000, seed=0)
    return Problem("cifar10_subset", [str(i) for i in range(10)], train, val, test)


def _mobilenet(weights: Path, task: Any) -> Callable[..., lp.Model]:
    def build(**options: Any) -> lp.Model:
        shape = (28, 28, 1) if task is XRAY_LABELS else (32, 32, 3)
        return lp.transfer_model(
            "MobileNet",
            task,
            input_shape=shape,
            image_size=96,
            weights=weights,
            backbone_kwargs={"alpha": 0.25},
            **options,
        )

    return build


def scripts_setting(data_dir: str | None, folder: Path) -> Setting:
    path = folder / "mnist.keras"
    if not path.exists():
        pretrain_on_digits("mnist", data_dir, path)
    return Setting(
        script_problem("cmaterdb/bangla", data_dir),
        (100, 500),
        lambda **options: lp.transfer_model(path, 10, **options),
    )


def text_settings(data_dir: str | None, folder: Path) -> list[Setting]:
    """trec with a network that learned the intents of clinc_oos, and the other way round."""
    trec = _text_parts("trec", "label-coarse", {"train": "train", "test": "test"}, data_dir)
    fine = _text_parts("trec", "label-fine", {"train": "train"}, data_dir)["train"]
    names = {"train": "train", "val": "validation", "test": "test"}
    clinc = _text_parts("clinc_oos", "intent", names, data_dir)
    val, rest = draw(trec["train"], 500, seed=0)
    problems = [
        Problem("trec", [str(i) for i in range(6)], rest, val, trec["test"]),
        Problem("clinc_oos", [str(i) for i in range(150)], *(clinc[s] for s in names)),
    ]
    sources = {"trec": clinc["train"], "clinc_oos": fine}
    sizes = {"trec": (60, 300, 1000), "clinc_oos": (1500, 3000)}
    found = []
    for problem in problems:
        path = folder / f"for_{problem.name}.keras"
        if not path.exists():
            _pretrain_on_texts(sources[problem.name], path)
        classes = len(problem.labels)
        found.append(
            Setting(
                problem,
                sizes[problem.name],
                lambda path=path, classes=classes, **options: lp.transfer_model(
                    path, classes, **options
                ),
            )
        )
    return found


def _text_parts(
    name: str, label: str, splits: Mapping[str, str], data_dir: str | None
) -> dict[str, Any]:
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


def _text_network() -> keras.Model:
    layers = [
        keras.Input((TOKENS,), dtype="int32"),
        keras.layers.Embedding(WORDS, WIDTH, name="words"),
        keras.layers.Conv1D(WIDTH, 3, padding="same", activation="relu", name="block1"),
        keras.layers.GlobalMaxPooling1D(name="largest"),
        keras.layers.Dense(WIDTH, activation="relu", name="block2"),
    ]
    return keras.Sequential(layers, name="text_network")


def _pretrain_on_texts(data: tuple[np.ndarray, np.ndarray], path: Path) -> None:
    keras.utils.set_random_seed(0)
    classes = int(data[1].max()) + 1
    model = lp.transfer_model(_text_network(), classes, pretrained=False, trainable="all")
    model.fit(*data, epochs=6, batch_size=64, verbose=0)
    model.save(path)
