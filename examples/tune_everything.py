"""One search per paradigm over the settings of the builders, on handwritten digits.

    python examples/tune_everything.py            # needs no network; about 3 minutes
    python examples/tune_everything.py --quick    # fewer and shorter trials

A small network learns the digits 0 to 4. Then each search finds settings for the digits 5 to 9 from
100 labelled images, judged by 100 other images. The test images are used once, for the last table:
the default settings (the first trial of each search) and the settings that were found.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from quiet import hide_machine_notes

if __name__ == "__main__":
    hide_machine_notes()

import keras
import keras_tuner
import numpy as np
import tensorflow as tf

import keras_lp as lp

tf.get_logger().setLevel("ERROR")  # each trial has a new model, so functions are traced again

OUT = Path("runs")
EPOCHS = 9
TRIALS = 13  # nine trials of one epoch; the best three go on for three, the best one for nine

Arrays = tuple[np.ndarray, np.ndarray]


def pretrained(x: np.ndarray, y: np.ndarray) -> keras.Model:
    """Returns a model whose network learned some digits."""
    layers = [keras.Input((8, 8, 1)), keras.layers.Rescaling(1 / 255)]
    for i, filters in enumerate((32, 64), start=1):
        layers.append(keras.layers.Conv2D(filters, 3, activation="relu", name=f"block{i}"))
    network = keras.Sequential(layers, name="network")
    model = lp.transfer_model(network, 5, pretrained=False, trainable="all", pooling="flatten")
    model.fit(x, y, epochs=5, verbose=0)
    return model


def both(y: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the labels of two tasks: the digit, and whether it is even."""
    return {"digit": y, "even": y % 2}


def accuracy(model: keras.Model, test: Arrays) -> float:
    logits = model.predict(test[0], verbose=0)
    logits = logits["digit"] if isinstance(logits, dict) else logits
    return float(np.mean(logits.argmax(-1) == test[1]))


def searches(network: keras.Model, train: Arrays, val: Arrays) -> dict[str, tuple[Any, ...]]:
    """Returns the hypermodel, the data and the validation data of each paradigm."""
    pooling = {"pooling": "flatten"}
    tasks = {"digit": 5, "even": 2}
    x, y = train
    clients = lp.partition(train, clients=5)
    several = (x, both(y)), (val[0], both(val[1]))
    return {
        "transfer": (lp.TransferHyperModel(network, 5, **pooling), train, val),
        "fine-tuning": (lp.FinetuneHyperModel(network, 5, **pooling), train, val),
        "multitask": (lp.MultitaskHyperModel(network, tasks, **pooling), *several),
        "federated": (lp.FederatedHyperModel(network, 5, **pooling), clients, val),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--quick", action="store_true", help="fewer and shorter trials")
    quick = arguments.parse_args().quick
    epochs, trials = (3, 4) if quick else (EPOCHS, TRIALS)
    start = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    x_test, y_test = lp.load_dataset("digits", split="test", batch_size=-1)
    test = x_test[y_test > 4], y_test[y_test > 4] - 5
    network = pretrained(x[y < 5], y[y < 5])
    x, y = x[y > 4], y[y > 4] - 5
    rows = []
    for paradigm, (hypermodel, data, val) in searches(
        network, (x[:100], y[:100]), (x[100:200], y[100:200])
    ).items():
        print(f"\n{paradigm}")
        found = lp.tune(hypermodel, data, validation_data=val, max_trials=trials, epochs=epochs)
        print(f"\n{found}")
        found.plot(OUT / f"tuning_{paradigm}.png")
        default = default_model(hypermodel, data, epochs)
        rows.append((paradigm, accuracy(default, test), accuracy(found.model, test)))
    print(f"\n{'test accuracy':12}  default    found")
    for paradigm, default_score, found_score in rows:
        print(f"{paradigm:12}  {default_score:7.1%}  {found_score:7.1%}")
    print(f"Plots in {OUT}. All in {time.perf_counter() - start:.0f} s.")


def default_model(hypermodel: Any, data: Any, epochs: int) -> keras.Model:
    """Returns a model with the default settings, trained for as many epochs."""
    hp = keras_tuner.HyperParameters()
    keras.utils.set_random_seed(0)
    model = hypermodel.build(hp)
    parts = data if isinstance(data, tuple) else (data,)
    hypermodel.fit(hp, model, *parts, epochs=epochs, verbose=0)
    return model


if __name__ == "__main__":
    main()
