"""Phones that train on digits of their own and exchange weight files with a server.

    python examples/phones_federated.py --phones 3 --rounds 5

Each phone is a process in a folder of its own, with the model's file, `device.py` and its digits;
it runs `phone.py` on LiteRT and NumPy, where importing TensorFlow or Keras fails. The server
averages the files they send, and refuses those that must not be averaged: in the second round a
stale one and one that is not finite arrive too. At the end `lp.FederatedAveraging` runs the same
rounds, and the weights are compared. A phone takes all its digits in one step, so that both train
on the same batches. `--quick` runs two rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_lp as lp
from keras_lp.tflite.device import device

OUT = Path("runs/phones_federated")
EPOCHS = 3
RATE = 0.05


class Phone:
    """A process that trains in its folder."""

    def __init__(self, folder: Path, x: np.ndarray, y: np.ndarray, model_file: Path) -> None:
        self.folder, self.examples = folder, len(y)
        folder.mkdir(parents=True)
        shutil.copy(model_file, folder / "model.tflite")
        shutil.copy(device.__file__, folder / "device.py")
        shutil.copy(Path(__file__).with_name("phone.py"), folder / "phone.py")
        np.savez(folder / "data.npz", x=x, y=y)
        self._process = subprocess.Popen(
            [sys.executable, "phone.py", str(EPOCHS)],
            cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, weights: Path, round_number: int) -> Path:
        """Sends weights; returns where the phone will write."""
        shutil.copy(weights, self.folder / "received.npz")
        print(f"received.npz update_{round_number}.npz", file=self._process.stdin, flush=True)
        return self.folder / f"update_{round_number}.npz"

    def wait(self) -> float:
        """Waits until it has written, and returns its loss."""
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def build() -> keras.Model:
    """A network that knows the digits 0 to 4, and a new head for all ten."""
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    low = y < 5
    network = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(16, 3, activation="relu", name="block1_conv"),
            keras.layers.Conv2D(32, 3, activation="relu", name="block2_conv"),
        ]
    )
    known = lp.transfer_model(network, 5, pretrained=False, trainable="all", pooling="flatten")
    known.fit(x[low], y[low], epochs=3, verbose=0)
    return lp.transfer_model(
        known,
        10,
        pooling="flatten",
        cache_features=False,  # phones take the features as they are, not standardised
        optimizer="sgd",
        learning_rate=RATE,
    )


def broken(sent: Path) -> Path:
    """The same update, with numbers that are not finite."""
    with np.load(sent) as archive:
        weights = {
            name: value * np.nan if value.dtype == "float32" else value
            for name, value in archive.items()
        }
    device.write_weights(OUT / "broken.npz", weights)
    return OUT / "broken.npz"


def run_rounds(model: keras.Model, phones: list[Phone], rounds: int) -> None:
    weights = OUT / "round_0.npz"
    lp.DeviceTrainer(OUT / "model.tflite").save_weights(weights)
    last: list[Path] = []
    for number in range(1, rounds + 1):
        updates = [phone.start(weights, number) for phone in phones]
        losses = [phone.wait() for phone in phones]
        shares = [phone.examples for phone in phones]
        extra = [last[0], broken(updates[0])] if number == 2 else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is refused is printed
            done = lp.aggregate_device_updates(
                model, [*updates, *extra], weights=[*shares, *[1] * len(extra)]
            )
        weights = OUT / f"round_{number}.npz"
        done.save(weights)
        print(f"round {number}: loss {np.average(losses, weights=shares):.4f}; {done}")
        last = updates


def main(phones: int, rounds: int) -> None:
    keras.utils.set_random_seed(0)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    test = lp.load_dataset("digits", split="test", batch_size=-1)
    clients = lp.partition((x[:300], y[:300]), clients=phones, alpha=1.0, seed=0)
    model = build()
    model.save(OUT / "start.keras")
    report = lp.export_trainable_tflite(
        model,
        OUT / "model.tflite",
        batch_size=max(len(labels) for _, labels in clients.values()),
        learning_rate=RATE,
    )
    print(report)
    running = [
        Phone(OUT / f"phone_{name}", *data, OUT / "model.tflite") for name, data in clients.items()
    ]
    try:
        run_rounds(model, running, rounds)
    finally:
        for phone in running:
            phone.close()
    accuracy = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
    print(f"accuracy on the test digits {accuracy:.1%}")

    twin = keras.models.load_model(OUT / "start.keras")
    federated = lp.FederatedAveraging(twin, local_epochs=EPOCHS, batch_size=None)
    federated.fit(clients, rounds=rounds, verbose=0)
    difference = max(
        float(np.abs(ours.numpy() - theirs.numpy()).max())
        for ours, theirs in zip(model.weights, twin.weights, strict=True)
    )
    print(f"largest difference from FederatedAveraging {difference:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phones", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    arguments = parser.parse_args()
    main(arguments.phones, 2 if arguments.quick else arguments.rounds)
