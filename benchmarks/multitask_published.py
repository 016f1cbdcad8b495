"""Does pooling mnist and fashion_mnist help as much as published?

    TFDS_DATA_DIR=... python benchmarks/multitask_published.py --seeds 1    # hours; for a GPU

The setting of Hsieh and Chen, 2017, Multi-task Learning on MNIST Image Datasets: all 60,000 images
of each data set, an all-convolution network, each data set alone, both together, and each alone
from the network that learned both. What the paper leaves open is as in a public reproduction:
batches of 100, Adam at 0.001 for 25 epochs and at 0.00001 for 25 more, no augmentation. Accuracy is
that on the test split after the last epoch, which chooses nothing.
"""

from __future__ import annotations

import functools
import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from lib.journal import Run
from lib.problems import Arrays
from lib.results import page, table
from lib.scores import mean_and_deviation, select
from lib.seeds import run_seeds

import keras_lp as lp

TASKS = ("mnist", "fashion_mnist")
EPOCHS, BATCH, RATES = 50, 100, (1e-3, 1e-5)
TOGETHER = "both"
WAYS = (*TASKS, TOGETHER)
# Test accuracy in %: alone, and alone from the network that learned both.
PUBLISHED = {"mnist": (99.56, 99.71), "fashion_mnist": (94.32, 95.18)}


def network() -> keras.Model:
    """Returns the untrained network; its last 1x1 convolution is the head, as both are linear."""
    convolution = functools.partial(keras.layers.Conv2D, padding="same", activation="relu")
    layers = [
        keras.Input((28, 28, 1)),
        keras.layers.Rescaling(1 / 255),
        convolution(96, 3), convolution(96, 3), convolution(96, 3, 2),
        convolution(192, 3), convolution(192, 3), convolution(192, 3, 2),
        convolution(192, 3, padding="valid"), convolution(192, 1),
    ]  # fmt: skip
    return keras.Sequential(layers, name="all_convolution")


def pooled(parts: dict[str, Arrays]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the images of all tasks, with labels of -1 where an image is of another task."""
    x = np.concatenate([images for images, _ in parts.values()])
    labels = {}
    for task in parts:
        own = [y if name == task else np.full_like(y, -1) for name, (_, y) in parts.items()]
        labels[task] = np.concatenate(own)
    return x, labels


def train(model: keras.Model, x: np.ndarray, y: Any) -> keras.Model:
    """Trains with a rate that falls after half of the epochs."""
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: RATES[2 * epoch >= EPOCHS])
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, callbacks=[rates], verbose=2)
    return model


def score(model: keras.Model, test: Arrays, task: str) -> float:
    logits = model.predict(test[0], batch_size=500, verbose=0)
    logits = logits[task] if isinstance(logits, dict) else logits
    return float(np.mean(logits.argmax(1) == test[1]))


def learn(name: str, seed: int) -> Run:
    keras.utils.set_random_seed(seed)
    parts, tests = (
        {task: lp.load_dataset(task, split=split, batch_size=-1) for task in TASKS}
        for split in ("train", "test")
    )
    if name in TASKS:
        model = lp.transfer_model(network(), 10, pretrained=False, trainable="all", pooling="avg")
        return {"accuracy": score(train(model, *parts[name]), tests[name], name)}
    both = lp.multitask_model(network(), dict.fromkeys(TASKS, 10), pretrained=False, pooling="avg")
    train(both, *pooled(parts))
    run: Run = {task: score(both, tests[task], task) for task in TASKS}
    for task in TASKS:
        alone = lp.transfer_model(both, 10, trainable="all", pooling="avg")
        run[f"{task} afterwards"] = score(train(alone, *parts[task]), tests[task], task)
    return run


def report(results: dict[str, Any]) -> str:
    both = select(results["runs"], name=TOGETHER)
    rows = []
    for task in TASKS:
        found = {
            "alone": [run["accuracy"] for run in select(results["runs"], name=task)],
            "both": [run[task] for run in both],
            "alone, from both": [run[f"{task} afterwards"] for run in both],
        }
        shown = [
            mean_and_deviation(100 * np.array(values), 2) if values else "-"
            for values in found.values()
        ]
        rows.append([task, *shown, *(f"{value:.2f}" for value in PUBLISHED[task])])
    header = ["data", "alone, %", "both, %", "alone, from both, %"]
    return page(
        "mnist and fashion_mnist together, as published",
        results["command"],
        results["machine"],
        __doc__,
        table([*header, "published, alone", "published, from both"], rows),
    )


def main() -> None:
    run_seeds(__file__, __doc__ or "", learn, WAYS, report)


if __name__ == "__main__":
    main()
