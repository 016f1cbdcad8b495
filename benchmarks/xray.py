"""Does transfer help, and with how many pictures? Transfer against training from scratch.

    TFDS_DATA_DIR=... python benchmarks/xray.py --weights mobilenet_2_5_224_tf_no_top.h5
    TFDS_DATA_DIR=... python benchmarks/xray.py --study scripts

Two studies, each over several numbers of training pictures and several seeds:

- xray: ImageNet to chest X-rays. MobileNet with alpha 0.25, on pneumonia_mnist.
- scripts: the digits of mnist to those of two other scripts, cmaterdb/bangla and
  cmaterdb/devanagari, with a small network. Its negative control comes from fashion_mnist, whose
  clothes have nothing to do with digits.

"From scratch" is the same network, untrained, all of it learning. All approaches get the same
steps: an epoch shows 1,000 pictures, so that few ones come again and again, and the rate falls to
zero along a cosine. The rate is the one thing tuned, for each approach and number of pictures: of
three, the one with the best mean balanced accuracy on the validation pictures over the first
`TUNING_SEEDS` seeds. The seed changes the training pictures (drawn at random, each class in its
share), the initial weights and the order. Nothing is ever chosen on a test split.

Writes for each study a table (Markdown), all runs (JSON) and plots of sample efficiency (PNG).
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

import keras_lp as lp

SHOWN = 1000  # pictures an epoch
BATCH = 40
EPOCHS = 12
STEPS = EPOCHS * SHOWN // BATCH
TUNING_SEEDS = 2
SCRATCH = "from scratch"
FROZEN_RATES = (1e-3, 3e-3, 1e-2)  # of a head alone
WHOLE_RATES = (3e-4, 1e-3, 3e-3)  # of a whole network

XRAY_SIZES = (40, 200, 1000)
A_CLASS = (10, 20, 50, 100)  # cmaterdb: examples a class
HELD_OUT = 500  # of the training pictures of cmaterdb, to choose the rate on
PRETRAINING_EPOCHS = 2

Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class Problem:
    """What is to be learned; `train` holds more pictures than are used."""

    name: str
    labels: list[str]
    train: Arrays
    val: Arrays
    test: Arrays


@dataclasses.dataclass
class Approach:
    """A way to learn it: `fit` takes pictures, labels, the arguments of `fit`, and the rate."""

    name: str
    rates: Sequence[float]
    fit: Callable[..., keras.Model]


def draw(data: Arrays, count: int, seed: int) -> tuple[Arrays, Arrays]:
    """Draws `count` pictures at random, each class in its share; returns them and the rest."""
    from sklearn.model_selection import train_test_split

    x, y = data
    chosen, rest = train_test_split(
        np.arange(len(y)), train_size=count, random_state=seed, stratify=y
    )
    return (x[chosen], y[chosen]), (x[rest], y[rest])


def cosine(rate: float, epochs: int = EPOCHS) -> keras.optimizers.schedules.CosineDecay:
    return keras.optimizers.schedules.CosineDecay(rate, epochs * SHOWN // BATCH)


def scores(model: keras.Model, data: Arrays) -> dict[str, float]:
    """Balanced accuracy (over classes of one size it is the accuracy) and, of two classes, AUC."""
    x, y = data
    logits = model.predict(x, batch_size=256, verbose=0)
    found = {"balanced_accuracy": float(balanced_accuracy_score(y, logits.argmax(-1)))}
    if logits.shape[-1] == 2:
        found["auc"] = float(roc_auc_score(y, logits[:, 1] - logits[:, 0]))
    return found


def run(problem: Problem, approach: Approach, count: int, seed: int, rate: float) -> dict[str, Any]:
    """Learns once; returns what was done and the scores."""
    (x, y), _ = draw(problem.train, count, seed)
    weights = len(y) / (len(problem.labels) * np.bincount(y))  # every class counts the same
    again = np.resize(np.arange(count), SHOWN)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    start = time.perf_counter()
    model = approach.fit(
        x[again], y[again], rate, class_weight=dict(enumerate(weights)), batch_size=BATCH, verbose=0
    )
    return {
        "problem": problem.name,
        "approach": approach.name,
        "examples": count,
        "seed": seed,
        "rate": rate,
        "seconds": round(time.perf_counter() - start, 1),
        "val": scores(model, problem.val),
        "test": scores(model, problem.test),
    }


def sweep(
    problem: Problem, approach: Approach, count: int, seeds: int
) -> tuple[list[dict[str, Any]], float]:
    """Chooses the rate on `val`, and learns with every seed; returns all runs and the rate."""
    tuning = range(min(TUNING_SEEDS, seeds))
    runs = [run(problem, approach, count, seed, r) for seed in tuning for r in approach.rates]

    def on_val(rate: float) -> float:
        return statistics.mean(r["val"]["balanced_accuracy"] for r in runs if r["rate"] == rate)

    rate = max(approach.rates, key=on_val)
    runs += [run(problem, approach, count, seed, rate) for seed in range(len(tuning), seeds)]
    for one in runs:
        one["chosen"] = one["rate"] == rate
    values = [100 * r["test"]["balanced_accuracy"] for r in runs if r["chosen"]]
    print(
        f"{problem.name:<20} {approach.name:<28} n = {count:<5} rate {rate:<7} "
        f"{statistics.mean(values):.1f} %, {statistics.median(r['seconds'] for r in runs):.0f} s",
        flush=True,
    )
    return runs, rate


# --- ImageNet to chest X-rays ------------------------------------------------------------------


def xray_problem(data_dir: str | None) -> Problem:
    parts = {
        split: lp.load_dataset("pneumonia_mnist", split=split, batch_size=-1, data_dir=data_dir)
        for split in ("train", "val", "test")
    }
    return Problem("pneumonia_mnist", ["normal", "pneumonia"], **parts)


def mobilenet(weights: str | None, rate: Any, **options: Any) -> keras.Model:
    return lp.transfer_model(
        "MobileNet",
        ["normal", "pneumonia"],
        input_shape=(28, 28, 1),
        image_size=96,
        weights=weights,
        backbone_kwargs={"alpha": 0.25},
        learning_rate=rate,
        **options,
    )


def xray_approaches(weights: str) -> list[Approach]:
    def scratch(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
        model = mobilenet(None, cosine(rate), trainable="all")
        model.fit(x, y, epochs=EPOCHS, **options)
        return model

    def transfer(
        x: np.ndarray, y: np.ndarray, rate: float, epochs: int = EPOCHS, **options: Any
    ) -> keras.Model:
        model = mobilenet(weights, cosine(rate, epochs))
        model.fit(x, y, epochs=epochs, **options)
        return model

    def finetune(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
        model = transfer(x, y, FROZEN_RATES[1], epochs=EPOCHS // 2, **options)
        model = lp.finetune_model(model, learning_rate=cosine(rate, EPOCHS // 2))
        model.fit(x, y, epochs=EPOCHS // 2, **options)
        return model

    return [
        Approach(SCRATCH, WHOLE_RATES, scratch),
        Approach("transfer", FROZEN_RATES, transfer),
        Approach("transfer, then fine-tuning", WHOLE_RATES, finetune),
    ]


# --- mnist, and as a control fashion_mnist, to other scripts -----------------------------------


def script_problem(name: str, data_dir: str | None) -> Problem:
    """cmaterdb is black on white and has three equal channels: here one, white on black."""
    parts = {}
    for split in ("train", "test"):
        x, y = lp.load_dataset(name, split=split, batch_size=-1, data_dir=data_dir)
        parts[split] = 255 - x[..., :1], y
    val, train = draw(parts["train"], HELD_OUT, seed=0)
    labels = [str(digit) for digit in range(10)]
    return Problem(name, labels, train=train, val=val, test=parts["test"])


def small_network() -> keras.Model:
    """An untrained network without a head, for grey pictures (32, 32, 1) from 0 to 255."""
    layers = [keras.Input((32, 32, 1)), keras.layers.Rescaling(1 / 255)]
    for i, (filters, strides) in enumerate([(32, 2), (64, 2), (64, 1)], start=1):
        layers += [
            keras.layers.Conv2D(filters, 3, strides, "same", name=f"block{i}_conv"),
            keras.layers.GroupNormalization(8, name=f"block{i}_norm"),
            keras.layers.ReLU(name=f"block{i}_relu"),
        ]
    return keras.Sequential(layers, name="small_network")


def pretrain(source: str, data_dir: str | None, path: Path) -> float:
    """Trains the network on `source` and saves it; returns its accuracy on the test split.

    The pictures are enlarged from 28 to 32 pixels, and shifted, turned and zoomed a little.
    """
    train, test = (
        lp.load_dataset(source, split=split, batch_size=-1, data_dir=data_dir)
        for split in ("train", "test")
    )
    enlarge = keras.layers.Resizing(32, 32)
    vary = keras.Sequential(
        [
            keras.layers.RandomTranslation(0.12, 0.12, fill_mode="constant"),
            keras.layers.RandomRotation(0.06, fill_mode="constant"),
            keras.layers.RandomZoom(0.2, fill_mode="constant"),
        ]
    )
    keras.utils.set_random_seed(0)
    pictures = tf.data.Dataset.from_tensor_slices(train).shuffle(len(train[0]), seed=0).batch(64)
    pictures = pictures.map(lambda x, y: (vary(enlarge(tf.cast(x, "float32")), training=True), y))
    model = lp.transfer_model(
        small_network(), 10, pretrained=False, trainable="all", pooling="flatten", dropout=0.5
    )
    model.fit(
        pictures.prefetch(tf.data.AUTOTUNE), epochs=PRETRAINING_EPOCHS, shuffle=False, verbose=0
    )
    model.save(path)
    return scores(model, (enlarge(test[0]).numpy(), test[1]))["balanced_accuracy"]


def script_approaches(pretrained: dict[str, Path]) -> list[Approach]:
    def scratch(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
        network = small_network()
        model = lp.transfer_model(
            network,
            10,
            pretrained=False,
            trainable="all",
            pooling="flatten",
            learning_rate=cosine(rate),
        )
        model.fit(x, y, epochs=EPOCHS, **options)
        return model

    def transfer_from(path: Path) -> Callable[..., keras.Model]:
        def transfer(x: np.ndarray, y: np.ndarray, rate: float, **options: Any) -> keras.Model:
            model = lp.transfer_model(path, 10, pooling="flatten", learning_rate=cosine(rate))
            model.fit(x, y, epochs=EPOCHS, **options)
            return model

        return transfer

    return [
        Approach(SCRATCH, WHOLE_RATES, scratch),
        *(
            Approach(f"transfer from {source}", FROZEN_RATES, transfer_from(path))
            for source, path in pretrained.items()
        ),
    ]
