"""Heads on frozen backbones: they start at 0 and see standardised features."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.backbones.features import feature_model
from keras_lp.model import scaling
from tests.conftest import Batches, with_random_heads


def scale_of(model, name="predictions"):
    head = model.get_layer(name)
    return np.asarray(head.input_mean), np.asarray(head.input_scale)


def moments_of(model, x):
    features = feature_model(model).predict(x, verbose=0).astype("float64")
    std = features.std(0)
    varies = std > 0
    std = np.maximum(std, 0.3 * np.median(std[varies]))
    return np.where(varies, features.mean(0), 0), 1 / np.where(varies, std, 1)


def test_the_first_fit_sets_the_scale_and_no_later_one(mlp, digits):
    x, y = digits
    model = lp.transfer_model(mlp((30,)), 10)
    model.fit(x[:150], y[:150], verbose=0)
    for ours, expected in zip(scale_of(model), moments_of(model, x[:150]), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    before = scale_of(model)
    model.fit(x[150:], y[150:], verbose=0)
    for old, new in zip(before, scale_of(model), strict=True):
        np.testing.assert_array_equal(new, old)


def test_no_output_changes_when_the_scale_is_set(mlp, digits):
    x, y = digits
    backbone = mlp((30,))
    kinds = {"a": 10, "b": lp.Regression(2, mean=3, std=2)}
    model = with_random_heads(lp.multitask_model(backbone, kinds, trainable="head"))
    before = model.predict(x, verbose=0)
    raw = model.get_layer("a").raw_weights()
    scaling.scale_features(model, {"keras_lp_features": feature_model(model).predict(x, verbose=0)})
    assert (scale_of(model, "a")[1] != 1).any()
    after = model.predict(x, verbose=0)
    for name in kinds:
        np.testing.assert_allclose(after[name], before[name], atol=1e-4)
    for ours, expected in zip(model.get_layer("a").raw_weights(), raw, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    lp.fit_head(model, (x, {"a": y, "b": np.ones((200, 2))}), verbose=0)
    assert (scale_of(model, "a")[1] == 1).all()  # folded into kernel and bias


def test_it_trains_as_plain_keras_does_on_standardised_features(mlp, digits):
    x, y = digits
    model = lp.transfer_model(mlp((20,)), 10, learning_rate=0.01)
    mean, scale = moments_of(model, x)
    twin = keras.Sequential(
        [keras.Input((20,)), keras.layers.Dense(10, kernel_initializer="zeros")]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    twin.compile(keras.optimizers.Adam(0.01), loss)
    z = (feature_model(model).predict(x, verbose=0) - mean) * scale
    ours = model.fit(x, y, epochs=3, shuffle=False, verbose=0).history["loss"]
    plain = twin.fit(z, y, epochs=3, shuffle=False, verbose=0).history["loss"]
    np.testing.assert_allclose(ours, plain, rtol=1e-4)


@pytest.mark.parametrize("cache", ["auto", True])
def test_data_sets_give_the_scale_by_their_first_examples(mlp, digits, cache, monkeypatch):
    x, y = digits
    monkeypatch.setattr(scaling, "SAMPLE", 90)  # two batches of 50
    for data in (tf.data.Dataset.from_tensor_slices(digits).batch(50), Batches(x, y)):
        model = lp.transfer_model(mlp(), 10, cache_features=cache)
        model.fit(data, epochs=2, verbose=0)
        seen = x if cache is True else x[:100]
        np.testing.assert_allclose(scale_of(model)[0], moments_of(model, seen)[0], atol=1e-5)
    generated = lp.transfer_model(mlp(), 10)
    generated.fit((digits for _ in itertools.count()), steps_per_epoch=2, verbose=0)
    assert not scale_of(generated)[0].any()


def test_features_in_files_give_the_scale_too(mlp, digits):
    model = lp.transfer_model(mlp(), 10, cache_memory=100)
    model.fit(*digits, verbose=0)
    assert scale_of(model)[0].any()


def test_what_has_no_scale(mlp, digits):
    plain = lp.transfer_model(mlp(), 10, cache_features=False)
    plain.fit(*digits, verbose=0)
    assert (scale_of(plain)[1] == 1).all()
    for options in ({"trainable": "all"}, {"hidden_units": [4]}):
        model = lp.transfer_model(mlp(), 10, **options)
        assert not model.get_layer("predictions").scales_inputs
        assert np.abs(model.get_layer("predictions").kernel).max() > 0


def test_an_untrained_head_finds_all_classes_equally_probable(mlp, digits):
    model = lp.transfer_model(mlp(), 10)
    assert model.evaluate(*digits, verbose=0)[0] == pytest.approx(np.log(10), abs=1e-6)


@pytest.mark.parametrize(
    ("width", "rate", "sgd"),
    [(16, 0.01, 0.3), (250, 0.002, 0.08), (1250, 4e-4, 0.02), (5000, 3e-4, 0.02)],
)
def test_the_default_rate_goes_by_the_number_of_features(mlp, width, rate, sgd):
    def rate_of(**options):
        return float(lp.transfer_model(mlp((width,)), 3, **options).optimizer.learning_rate)

    assert rate_of() == pytest.approx(rate)
    assert rate_of(learning_rate=0.5) == 0.5
    for options in ({"trainable": "all"}, {"hidden_units": [4]}, {"optimizer": "adamw"}):
        assert rate_of(**options) == pytest.approx(1e-3)
    assert rate_of(optimizer="sgd") == pytest.approx(sgd)
    assert rate_of(optimizer="sgd", trainable="all") == pytest.approx(0.01)


def test_the_scale_is_kept_in_files_and_exports(mlp, digits, tmp_path):
    x, y = digits
    model = lp.transfer_model(mlp(), lp.Regression())
    model.fit(x, 1.0 * y, verbose=0)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    np.testing.assert_array_equal(
        keras.models.clone_model(model).get_layer("predictions").scales_inputs, True
    )
    report = lp.export_tflite(model, tmp_path / "m.tflite", verification_data=x)
    assert report.outputs_vary


def test_ten_epochs_come_near_the_optimum(digits):
    """On features of very different sizes, more than backbones give: small columns learn slower."""
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    x = x.reshape(-1, 64).astype("float32") * np.logspace(-3, 2, 64, dtype="float32")
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Identity()], name="mlp")
    train, test = (x[:600], y[:600]), (x[600:], y[600:])
    scores = {}
    for name, cache in (("scaled", "auto"), ("plain", False)):
        model = lp.transfer_model(backbone, 10, cache_features=cache)
        model.fit(*train, epochs=10, verbose=0)
        scores[name] = model.evaluate(*test, verbose=0)[1]
    lp.fit_head(model, train, verbose=0)
    solved = model.evaluate(*test, verbose=0)[1]
    assert scores["scaled"] > solved - 0.03
    assert scores["plain"] < solved - 0.1
