"""Files that an earlier version wrote load, and mean the same."""

import shutil

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.federated.engine import installation
from keras_lp.tflite.contents import inspect
from tests.saved.write import FOLDER, examples, federated


@pytest.fixture(scope="module")
def outputs():
    with np.load(FOLDER / "outputs.npz") as file:
        return dict(file)


def test_a_model_and_its_adapters(outputs):
    x, y = examples()
    model = keras.models.load_model(FOLDER / "model.keras")
    assert type(model) is lp.Model
    for name, value in model.predict(x, verbose=0).items():
        np.testing.assert_allclose(value, outputs[f"model_{name}"], atol=1e-5)
    assert lp.class_names(model) == {"side": ["left", "right"]}
    model.fit(x, {"side": y, "size": 2.0 * y}, verbose=0)
    base = keras.models.load_model(FOLDER / "base.keras")
    assert np.abs(base.predict(x, verbose=0)["side"] - outputs["model_side"]).max() > 1e-4
    adapted = lp.finetune_model(base, lora=lp.LoRA(rank=2))
    lp.load_adapters(adapted, FOLDER / "adapters.npz")
    side = adapted.predict(x, verbose=0)["side"]
    np.testing.assert_allclose(side, outputs["model_side"], atol=1e-5)


def test_files_of_phones(outputs):
    pytest.importorskip("ai_edge_litert.interpreter")
    x, y = examples()
    assert "labels left, right" in inspect(str(FOLDER / "run.tflite"))
    logits = outputs["single"]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    trainer = lp.DeviceTrainer(FOLDER / "train.tflite")
    np.testing.assert_allclose(trainer.predict(x), expected, atol=1e-5)
    before = trainer.evaluate(x, y)["loss"]
    trainer.load_weights(FOLDER / "update.npz")
    assert trainer.evaluate(x, y)["loss"] < before
    model = keras.models.load_model(FOLDER / "server.keras")
    assert lp.aggregate_device_updates(model, [FOLDER / "update.npz"]).accepted == (0,)


@pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
def test_a_federation_goes_on(tmp_path):
    shutil.copytree(FOLDER / "rounds", tmp_path / "rounds")
    made, clients, options = federated(tmp_path / "rounds")
    history = made.fit(clients, 4, **options).history
    assert made.rounds_done == 4
    whole, clients, options = federated(tmp_path / "other")
    expected = whole.fit(clients, 4, **options).history
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    for a, b in zip(made.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
