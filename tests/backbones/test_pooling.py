"""How features become a vector by default."""

import keras
import numpy as np
import pytest

import keras_lp as lp


def network(*shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, keras.layers.Identity()(inputs))


@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((8, 8, 64), 4096),  # the largest that becomes flat
        ((8, 8, 65), 65),
        ((1, 1, 5000), 5000),
        ((2, 3, 4), 24),
        ((None, 3, 4), 4),
        ((6, 4), 4),  # a sequence
        ((7,), 7),
    ],
)
def test_small_feature_maps_become_flat(shape, width):
    model = lp.transfer_model(network(*shape), 3)
    assert model.get_layer("features").output.shape == (None, width)


@pytest.mark.parametrize(("shape", "same"), [((2, 3, 4), "flatten"), ((8, 8, 65), "avg")])
def test_auto_equals_what_it_chooses(shape, same):
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype("float32")
    outputs = []
    for pooling in ("auto", same):
        model = lp.multitask_model(network(*shape), {"a": 2}, trainable="head", pooling=pooling)
        outputs.append(keras.Model(model.input, model.get_layer("features").output)(x))
    np.testing.assert_array_equal(*outputs)


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match=r"`pooling` must be one of \['auto', 'avg'.*flat'"):
        lp.transfer_model(network(2, 2, 1), 2, pooling="flat")


def text_network():
    embedding = keras.layers.Embedding(20, 4, mask_zero=True)
    return keras.Sequential([keras.Input((6,), dtype="int32"), embedding])


def texts():
    """Ids of 40 texts of 0 to 6 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.arange(40) % 7
    ids = np.where(np.arange(6) < lengths[:, None], rng.integers(1, 20, (40, 6)), 0)
    return ids.astype("int32"), (np.arange(40) % 2).astype("int32")


def test_masked_steps_do_not_count_and_an_empty_text_is_zeros(tmp_path):
    (x, _), backbone = texts(), text_network()
    model = lp.transfer_model(backbone, 2, trainable="all", pretrained=False)
    found = keras.Model(model.input, model.get_layer("features").output).predict(x, verbose=0)
    vectors = np.asarray(backbone.layers[0].embeddings)[x]
    real = (x > 0)[..., None]
    expected = (vectors * real).sum(1) / np.maximum(real.sum(1), 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found[0], 0)
    kerass = keras.layers.GlobalAveragePooling1D()(vectors, mask=x > 0)
    np.testing.assert_array_equal(found[x[:, 0] > 0], np.asarray(kerass)[x[:, 0] > 0])
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    plain = lp.plain_model(model)
    assert all(type(layer).__module__.startswith("keras.") for layer in plain._flatten_layers())
    whole = x[x[:, 0] > 0]
    np.testing.assert_allclose(
        plain.predict(whole, verbose=0), model.predict(whole, verbose=0), atol=1e-6
    )


def test_the_maximum_is_over_the_steps_that_are_not_masked():
    x, _ = texts()
    backbone = text_network()
    model = lp.transfer_model(backbone, 2, pooling="max")
    found = keras.Model(model.input, model.get_layer("features").output).predict(x, verbose=0)
    vectors = np.asarray(backbone.layers[0].embeddings)[x]
    real = np.broadcast_to((x > 0)[..., None], vectors.shape)
    expected = np.max(vectors, 1, where=real, initial=-np.inf)
    np.testing.assert_array_equal(found, np.where((x > 0).any(1, keepdims=True), expected, 0))
    with pytest.raises(ValueError, match='Build it with pooling="avg"'):
        lp.plain_model(model)
    unmasked = lp.transfer_model(network(6, 4), 2, pooling="max")
    values = np.random.default_rng(0).normal(size=(5, 6, 4)).astype("float32")
    np.testing.assert_allclose(
        lp.plain_model(unmasked).predict(values, verbose=0),
        unmasked.predict(values, verbose=0),
        atol=1e-6,
    )


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_an_empty_text_trains_and_runs_on_the_phone(pooling, tmp_path):
    x, y = texts()
    model = lp.transfer_model(
        text_network(), 2, trainable="all", pretrained=False, pooling=pooling, optimizer="sgd"
    )
    history = model.fit(x, y, batch_size=8, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    report = lp.export_tflite(model, tmp_path / "run.tflite", verification_data=x)
    assert report.max_difference < 1e-5
    lp.export_trainable_tflite(model, tmp_path / "train.tflite", trainable="all")
    trainer = lp.DeviceTrainer(tmp_path / "train.tflite")
    logits = model.predict(x, verbose=0)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(trainer.predict(x), expected, atol=1e-5)
    assert np.isfinite(trainer.fit(x, y)).all()
