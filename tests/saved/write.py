"""Writes the files of this folder: `python -m tests.saved.write`.

They were written before the modules moved into folders. `tests/test_saved.py` loads them, so do not
write them again unless a format is meant to change.
"""

from pathlib import Path

import keras
import numpy as np

import keras_lp as lp

FOLDER = Path(__file__).parent


def examples():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4)).astype("float32")
    return x, (x[:, 0] > 0).astype("int32")


def backbone():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, "relu")], name="mlp")


def federated(folder):
    """A federation that writes its rounds into a folder, and its clients."""
    model = lp.transfer_model(backbone(), ["a", "b"], trainable="all", optimizer="sgd")
    x, y = examples()
    clients = {name: (x[i::2], y[i::2]) for i, name in enumerate(("even", "odd"))}
    made = lp.FederatedAveraging(model, server_optimizer="adam")
    return made, clients, {"checkpoint_dir": folder, "verbose": 0}


def main():
    x, y = examples()
    model = lp.multitask_model(
        backbone(), {"side": ["left", "right"], "size": lp.Regression()}, balancing="uncertainty"
    )
    model.save(FOLDER / "base.keras")
    model = lp.finetune_model(model, lora=lp.LoRA(rank=2))
    model.fit(x, {"side": y, "size": 2.0 * y}, epochs=2, verbose=0)
    model.save(FOLDER / "model.keras")
    lp.save_adapters(model, FOLDER / "adapters.npz")
    single = lp.transfer_model(backbone(), ["left", "right"])
    lp.fit_head(single, (x, y), verbose=0)
    lp.export_tflite(single, FOLDER / "run.tflite", verification_data=(x, y))
    lp.export_trainable_tflite(single, FOLDER / "train.tflite", learning_rate=0.1)
    trainer = lp.DeviceTrainer(FOLDER / "train.tflite")
    trainer.fit(x, y)
    trainer.save_weights(FOLDER / "update.npz")
    single.save(FOLDER / "server.keras")
    made, clients, options = federated(FOLDER / "rounds")
    made.fit(clients, 3, **options)
    outputs = {f"model_{name}": value for name, value in model.predict(x, verbose=0).items()}
    np.savez(FOLDER / "outputs.npz", **outputs, single=single.predict(x, verbose=0))


if __name__ == "__main__":
    main()
