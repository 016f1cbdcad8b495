"""Models of Keras's own classes: equal, and at home without keras_lp."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_lp as lp

ALONE = """
import sys
sys.modules["keras_lp"] = None  # an import of it fails
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
data = dict(np.load(sys.argv[2]))
x = data.pop("x")
found = model.predict(x, verbose=0)
found = found if isinstance(found, dict) else {"y": found}
y = {k: v for k, v in data.items()}
history = model.fit(x, y if len(y) > 1 else y["y"], epochs=2, verbose=0).history
model.save(sys.argv[1])
model.export(sys.argv[1] + "_exported", verbose=False)
np.savez(sys.argv[3], **found, loss=history["loss"])
"""


def text_backbone():
    tokens = keras.Input((6,), dtype="int32", name="token_ids")
    mask = keras.Input((6,), dtype="int32", name="padding_mask")
    x = keras.layers.Embedding(9, 5)(tokens)
    return keras.Model({"token_ids": tokens, "padding_mask": mask}, keras.layers.Dense(4)(x))


def trained(model, x, y, **options):
    model.fit(x, y, epochs=2, verbose=0, **options)
    return model


def outputs(model, x):
    found = model.predict(x, verbose=0)
    return found if isinstance(found, dict) else {"y": found}


def assert_equal(ours, other, x, atol=1e-5):
    first, second = outputs(ours, x), outputs(other, x)
    assert first.keys() == second.keys()
    for name in first:
        scale = max(1.0, np.abs(first[name]).max())
        np.testing.assert_allclose(second[name], first[name], atol=atol * scale)


def pictures(digits):
    return digits[0].reshape(-1, 8, 8, 1), digits[1]


MODELS = {
    "frozen": lambda convnet: lp.transfer_model(convnet(), 10, pooling="avg"),
    "augmented": lambda convnet: lp.transfer_model(
        convnet(), 10, augmentation=keras.layers.RandomFlip(), dropout=0.1
    ),
    "layer rates": lambda convnet: lp.finetune_model(
        lp.transfer_model(convnet(), 10, hidden_units=[5]), trainable=1, learning_rate=1e-2
    ),
    "from scratch": lambda convnet: lp.transfer_model(
        convnet(), 10, pretrained=False, trainable="all"
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_task(name, convnet, digits, tmp_path):
    x, y = pictures(digits)
    model = trained(MODELS[name](convnet), x, y)
    plain = lp.plain_model(model)
    assert not [la for la in plain._flatten_layers() if type(la).__module__.startswith("keras_lp")]
    assert_equal(model, plain, x)
    ours, other = (m.evaluate(x, y, verbose=0, return_dict=True) for m in (model, plain))
    assert other == pytest.approx(ours, rel=1e-4)
    flags = [[w.trainable for w in m.get_layer("convnet").weights] for m in (model, plain)]
    assert flags[0] == flags[1]
    assert float(plain.optimizer.learning_rate) == float(model.optimizer.learning_rate)
    assert int(plain.optimizer.iterations) == int(model.optimizer.iterations)
    check_alone(plain, x, {"y": y}, tmp_path)
    assert_equal(model, lp.plain_model(model), x)  # the model itself stays as it is


def check_alone(plain, x, labels, folder):
    """Loads, predicts, trains, saves and exports in a process that cannot import keras_lp."""
    path = folder / "plain.keras"
    plain.save(path)
    np.savez(folder / "data.npz", x=x, **labels)
    command = [sys.executable, "-c", ALONE, str(path), folder / "data.npz", folder / "found.npz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(np.load(folder / "found.npz"))
    losses = found.pop("loss")
    assert np.isfinite(losses).all()
    expected = outputs(plain, x)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-4 * max(1, np.abs(values).max()))


def test_several_tasks_of_all_kinds(mlp, digits, tmp_path):
    x, y = digits
    labels = {"digit": y, "tags": np.stack([y % 2, y > 4], 1), "value": 1000.0 + 50 * y}
    kinds = {"digit": 10, "tags": lp.MultiLabel(["odd", "large"]), "value": lp.Regression()}
    model = lp.multitask_model(mlp(), kinds, balancing="uncertainty")
    trained(model, x, labels)
    plain = lp.plain_model(model)
    assert_equal(model, plain, x)
    assert lp.class_names(model) == {
        "digit": [str(i) for i in range(10)],
        "tags": ["odd", "large"],
    }
    check_alone(plain, x, labels, tmp_path)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_texts_with_a_padding_mask(pooling, tmp_path):
    rng = np.random.default_rng(0)
    tokens, y = rng.integers(0, 9, (20, 6)), np.arange(20) % 2
    mask = (np.arange(6) < rng.integers(0, 7, (20, 1))).astype("int32")  # some have no token
    model = lp.transfer_model(text_backbone(), 2, pooling=pooling)
    x = {"token_ids": tokens, "padding_mask": mask}
    plain = lp.plain_model(trained(model, x, y))
    assert_equal(model, plain, x)
    plain.save(tmp_path / "m.keras")
    assert_equal(model, keras.models.load_model(tmp_path / "m.keras"), x)


def test_the_optimizer_goes_on(mlp, digits):
    """One more epoch is the same for both: weights, moments and the count of steps agree."""
    x, y = digits
    model = lp.transfer_model(mlp(), 10, trainable="all", learning_rate=0.01)
    plain = lp.plain_model(trained(model, x, y))
    for each in (model, plain):
        each.fit(x, y, shuffle=False, verbose=0)
    assert_equal(model, plain, x)


def test_what_is_refused(mlp, digits):
    model = lp.finetune_model(lp.transfer_model(mlp(), 10), lora=lp.LoRA(2))
    with pytest.raises(ValueError, match="merge_adapters"):
        lp.plain_model(model)
    plain = lp.plain_model(lp.merge_adapters(model))
    assert_equal(model, plain, digits[0])
    with pytest.raises(ValueError, match="that keras_lp built"):
        lp.plain_model(plain)
