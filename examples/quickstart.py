"""Four ways to reuse what a network knows, on handwritten digits: `make demo`.

    python examples/quickstart.py --quick

A small network is trained on the digits 0 to 4. The new task is the digits 5 to 9, with only 100
labelled images: transfer, fine-tuning, multitask and federated learning start from what it knows,
"from scratch" starts from nothing. All get the same epochs; the learning rates were chosen on
training pictures outside the 100. Last, the fine-tuned model becomes a file for a phone. `--quick`
pretrains on a tenth of the pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from quiet import hide_machine_notes

if __name__ == "__main__":
    hide_machine_notes()

import keras
import numpy as np
import tensorflow as tf

import keras_lp as lp

tf.get_logger().setLevel("ERROR")

EPOCHS = 20  # of each paradigm on the 100 pictures
LABELLED = 100
PRETRAINING = 115_000  # pictures seen, over all epochs
BATCH = 20
CLIENTS = 10
OUT = Path("runs/quickstart")

Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class Row:
    """One line of the table."""

    paradigm: str
    accuracy: float
    trainable: int
    total: int
    seconds: float
    bytes_sent: float = 0


@dataclasses.dataclass
class Problem:
    """Many pictures of the first classes, few labelled ones of the others."""

    source: Arrays
    train: Arrays
    test: Arrays
    names: list[str]


def problem(name: str, seed: int, data_dir: str | None = None) -> Problem:
    """Divides a data set's classes in two; `LABELLED` pictures of the second half are known."""
    x, y = lp.load_dataset(name, split="train", batch_size=-1, data_dir=data_dir)
    x_test, y_test = lp.load_dataset(name, split="test", batch_size=-1, data_dir=data_dir)
    half = (int(y.max()) + 1) // 2
    target = np.random.default_rng(seed).permutation(np.flatnonzero(y >= half))[:LABELLED]
    return Problem(
        source=(x[y < half], y[y < half]),
        train=(x[target], y[target] - half),
        test=(x_test[y_test >= half], y_test[y_test >= half] - half),
        names=[str(label) for label in range(half, int(y.max()) + 1)],
    )


def small_network(input_shape: tuple[int, ...]) -> keras.Model:
    """An untrained network without a head, for small pictures from 0 to 255."""
    layers = [keras.Input(input_shape), keras.layers.Rescaling(1 / 255)]
    for i, (filters, strides) in enumerate([(32, 1), (64, 2), (64, 1)], start=1):
        layers += [
            keras.layers.Conv2D(filters, 3, strides, "same", name=f"block{i}_conv"),
            keras.layers.GroupNormalization(8, name=f"block{i}_norm"),
            keras.layers.ReLU(name=f"block{i}_relu"),
        ]
    return keras.Sequential(layers, name="small_network")


def pretrain(data: Problem, path: Path, seed: int, pictures_seen: int = PRETRAINING) -> float:
    """Trains the network on the first classes, saves it, and returns the seconds it took.

    A picture turned by 90, 180 or 270 degrees counts as another class, and every picture is
    shifted, tilted and zoomed a little: so the features become rich enough for new classes.
    """
    start = time.perf_counter()
    x, y = data.source
    classes = int(y.max()) + 1
    x = np.concatenate([np.rot90(x, turns, axes=(1, 2)) for turns in range(4)])
    y = np.concatenate([y + classes * turns for turns in range(4)])
    vary = keras.Sequential(
        [
            keras.layers.RandomTranslation(0.12, 0.12, fill_mode="constant"),
            keras.layers.RandomRotation(0.06, fill_mode="constant"),
            keras.layers.RandomZoom(0.12, fill_mode="constant"),
        ]
    )
    pictures = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=seed).batch(32)
    pictures = pictures.map(lambda x, y: (vary(tf.cast(x, "float32"), training=True), y))
    model = lp.transfer_model(
        small_network(x.shape[1:]),
        4 * classes,
        pretrained=False,
        trainable="all",
        pooling="flatten",
        dropout=0.5,
    )
    epochs = max(1, round(pictures_seen / len(x)))
    model.fit(pictures.prefetch(tf.data.AUTOTUNE), epochs=epochs, shuffle=False, verbose=0)
    model.save(path)
    return time.perf_counter() - start


def from_scratch(data: Problem) -> tuple[keras.Model, dict[str, Any]]:
    network = small_network(data.train[0].shape[1:])
    model = lp.transfer_model(
        network, data.names, pretrained=False, trainable="all", pooling="flatten"
    )
    model.fit(*data.train, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return model, {}


def transfer(data: Problem, pretrained: Path) -> tuple[keras.Model, dict[str, Any]]:
    model = lp.transfer_model(pretrained, data.names, pooling="flatten")
    model.fit(*data.train, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return model, {}


def finetune(data: Problem, pretrained: Path) -> tuple[keras.Model, dict[str, Any]]:
    """Half of the epochs train the head, the other half everything, lower layers slower."""
    model = lp.transfer_model(pretrained, data.names, pooling="flatten")
    model.fit(*data.train, batch_size=BATCH, epochs=EPOCHS // 2, verbose=0)
    model = lp.finetune_model(model, learning_rate=1e-3, layer_decay=0.7)
    model.fit(*data.train, batch_size=BATCH, epochs=EPOCHS // 2, verbose=0)
    return model, {}


def one_task(data: Problem, pretrained: Path) -> tuple[keras.Model, dict[str, Any]]:
    """The first task of `multitask` alone, with the same labels of half of the pictures."""
    x, y = data.train
    labels = {"digit": np.where(np.arange(len(y)) % 2 == 0, y, -1)}
    tasks = {"digit": data.names}
    model = lp.multitask_model(pretrained, tasks, pooling="flatten", learning_rate=5e-4)
    model.fit(x, labels, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return model, {}


def multitask(data: Problem, pretrained: Path) -> tuple[keras.Model, dict[str, Any]]:
    """Each picture has a label for one of the two tasks; -1 says that it is missing."""
    x, y = data.train
    known = np.arange(len(y)) % 2 == 0
    labels = {"digit": np.where(known, y, -1), "even": np.where(known, -1, y % 2)}
    tasks = {"digit": data.names, "even": ["yes", "no"]}
    model = lp.multitask_model(pretrained, tasks, pooling="flatten", learning_rate=5e-4)
    model.fit(x, labels, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return model, {}


def federated(data: Problem, pretrained: Path, seed: int) -> tuple[keras.Model, dict[str, Any]]:
    """Ten clients with ten pictures each; only the head's updates leave a client."""
    model = lp.transfer_model(pretrained, data.names, pooling="flatten", optimizer="sgd")
    clients = lp.partition(data.train, clients=CLIENTS, seed=seed)
    history = lp.FederatedAveraging(model, local_epochs=2, batch_size=5, seed=seed).fit(
        clients, rounds=EPOCHS // 2, verbose=0
    )
    return model, {"bytes_sent": sum(history.history["bytes_up"] + history.history["bytes_down"])}


def compare(data: Problem, pretrained: Path, seed: int) -> tuple[list[Row], keras.Model]:
    """Runs every paradigm on one problem; returns the rows and the fine-tuned model."""
    paradigms = {
        "from scratch": lambda: from_scratch(data),
        "transfer": lambda: transfer(data, pretrained),
        "fine-tuning": lambda: finetune(data, pretrained),
        "one task (half the labels)": lambda: one_task(data, pretrained),
        "multitask (half the labels)": lambda: multitask(data, pretrained),
        f"federated ({CLIENTS} clients)": lambda: federated(data, pretrained, seed),
    }
    rows, models = [], {}
    for paradigm, run in paradigms.items():
        keras.utils.set_random_seed(seed)
        start = time.perf_counter()
        model, extra = run()
        seconds = time.perf_counter() - start
        trainable = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        figures = accuracy(model, data.test), trainable, model.count_params(), seconds
        rows.append(Row(paradigm, *figures, **extra))
        models[paradigm] = model
    return rows, models["fine-tuning"]


def accuracy(model: keras.Model, test: Arrays) -> float:
    """Accuracy over the classes, of a model with one task or several."""
    logits = model.predict(test[0], batch_size=256, verbose=0)
    logits = logits["digit"] if isinstance(logits, dict) else logits
    return float(np.mean(np.argmax(logits, axis=-1) == test[1]))


def phone_accuracy(path: Path, test: Arrays) -> float:
    """Accuracy of the file, run as a phone runs it: LiteRT, one picture at a time."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path)).get_signature_runner()
    name = next(iter(runner.get_input_details()))
    right = [
        np.argmax(runner(**{name: picture[None].astype("float32")})["predictions"]) == label
        for picture, label in zip(*test, strict=True)
    ]
    return float(np.mean(right))


def print_table(rows: list[Row]) -> None:
    form = "{:<28} {:>9} {:>10} {:>11} {:>8} {:>12}"
    print(form.format("", "accuracy", "trainable", "parameters", "seconds", "bytes sent"))
    for row in rows:
        sent = f"{row.bytes_sent:,.0f}" if row.bytes_sent else "-"
        numbers = f"{row.accuracy:.1%}", f"{row.trainable:,}", f"{row.total:,}"
        print(form.format(row.paradigm, *numbers, f"{row.seconds:.1f}", sent))


def plot(
    rows: list[Row], path: Path, title: str, errors: list[float] | None = None, lines: str = ""
) -> None:
    """Writes one bar per paradigm: its accuracy on the test split.

    Args:
        rows: the paradigms.
        path: the file.
        title: the title.
        errors: half the lengths of the lines at the ends of the bars. Defaults to None: no lines.
        lines: what the lines are. Defaults to nothing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    names = [row.paradigm for row in rows]
    values = [100 * row.accuracy for row in rows]
    colours = ["#9aa0a6" if name == "from scratch" else "#1a73e8" for name in names]
    bars = axes.barh(names, values, color=colours, xerr=errors, capsize=3)
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=6)
    axes.invert_yaxis()
    lowest = min(v - e for v, e in zip(values, errors or [0] * len(values), strict=True))
    start = max(10 * (lowest // 10), 0)  # near the bars, so that their differences can be seen
    label = "test accuracy, %" + (f"; the axis starts at {start:.0f}" if start else "")
    axes.set(
        xlim=(start, 100 + 0.1 * (100 - start)),
        xlabel=f"{label}\n{lines}".strip(),
        title=title,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="pretrain on a tenth of the pictures")
    quick = parser.parse_args().quick
    start = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    seed = 0
    keras.utils.set_random_seed(seed)
    data = problem("digits", seed)
    pictures_seen = PRETRAINING // 10 if quick else PRETRAINING
    seconds = pretrain(data, OUT / "pretrained.keras", seed, pictures_seen)
    print(
        f"Pretrained on {len(data.source[0])} pictures of the digits 0 to 4 in {seconds:.0f} s. "
        f"Now 5 to 9, from {len(data.train[0])} labelled pictures:\n"
    )
    rows, model = compare(data, OUT / "pretrained.keras", seed)
    print_table(rows)
    plot(rows, OUT / "quickstart.png", f"Digits 5 to 9 from {LABELLED} labelled pictures")

    report = lp.export_tflite(model, OUT / "digits.tflite")
    on_phone = phone_accuracy(OUT / "digits.tflite", data.test)
    print(f"\nThe fine-tuned model for a phone: {report}; accuracy in LiteRT {on_phone:.1%}")
    print(f"Plot: {OUT / 'quickstart.png'}. All in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
