import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.backbones.resolve import resolve_backbone
from tests.conftest import with_random_heads

ALPHA = {"alpha": 0.25}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    network = keras.applications.MobileNet(
        input_shape=(32, 32, 3), include_top=False, weights=None, **ALPHA
    )
    path = tmp_path_factory.mktemp("weights") / "mobilenet.weights.h5"
    network.save_weights(path)
    return path


def pictures(*shape, dtype="uint8"):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_grey_pictures_of_another_size_give_the_features_of_resized_colour_ones(weights, dtype):
    model = lp.transfer_model(
        "MobileNet", 2, input_shape=(28, 28, 1), image_size=64, weights=weights,
        backbone_kwargs=ALPHA, pooling="avg",
    )  # fmt: skip
    assert model.input_shape == (None, 28, 28, 1)
    x = pictures(4, 28, 28, 1, dtype=dtype)
    plain = keras.applications.MobileNet(
        input_shape=(64, 64, 3), include_top=False, weights=str(weights), pooling="avg", **ALPHA
    )
    resized = keras.ops.image.resize(x.astype("float32"), (64, 64))
    colour = np.repeat(resized, 3, axis=-1)
    expected = plain(keras.applications.mobilenet.preprocess_input(colour), training=False)
    features = keras.Model(model.input, model.get_layer("features").output)
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(features(x), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    model.fit(x, [0, 1, 0, 1] * np.ones(4, int), verbose=0)


def test_pictures_of_any_size_are_resized(weights):
    model = lp.transfer_model(
        "MobileNet", 2, image_size=(32, 64), weights=weights, backbone_kwargs=ALPHA
    )
    assert model.input_shape == (None, None, None, 3)
    for size in (20, 50):
        assert model.predict(pictures(2, size, size, 3), verbose=0).shape == (2, 2)
    for wrong in ((0, 32), (1, 2, 3), "32", 3.5):
        with pytest.raises(ValueError, match=r"pixels or \(height, width\). Received"):
            lp.transfer_model("MobileNet", 2, image_size=wrong, weights=weights)


def own_network(channels=3):
    layers = [keras.Input((16, 16, channels)), keras.layers.Conv2D(4, 3, name="conv")]
    return keras.Sequential(layers, name="own")


def test_a_model_of_the_users_own_gets_grey_and_resized_pictures_too(tmp_path):
    backbone = own_network()
    model = lp.transfer_model(backbone, 2, input_shape=(10, 12, 1), image_size=16, pooling="avg")
    x = pictures(3, 10, 12, 1)
    resized = keras.ops.image.resize(x.astype("float32"), (16, 16))
    expected = np.asarray(backbone(np.repeat(resized, 3, -1))).mean((1, 2))
    features = keras.Model(model.input, model.get_layer("features").output)
    np.testing.assert_allclose(features(x), expected, rtol=1e-4, atol=1e-3)
    model.save(tmp_path / "m.keras")
    again = lp.transfer_model(tmp_path / "m.keras", 5)  # takes what the first one took
    assert again.input_shape == (None, 10, 12, 1)
    assert [layer.name for layer in lp.finetune_model(model).layers[1].layers][-1] == "own"


def test_subclassed_models_get_resized_pictures():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(8)

        def call(self, x):
            return self.dense(keras.ops.reshape(x, (-1, 16 * 16)))

    model = lp.transfer_model(Own(), 2, input_shape=(10, 10, 1), image_size=16)
    assert model.predict(pictures(3, 10, 10, 1), verbose=0).shape == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (10, 12, 3)}, r"resize images with `image_size`"),
        ({"image_size": 20}, r"'own' that takes \(16, 16, 3\). It needs image_size=\(16, 16\)"),
        ({"input_shape": (16, 16, 2)}, r"input_shape=\(16, 16, 2\)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.transfer_model(own_network(), 2, **arguments)


def test_only_pictures_are_resized(mlp):
    with pytest.raises(ValueError, match="for backbones that take images"):
        lp.transfer_model(mlp(), 2, image_size=16)


@pytest.mark.parametrize("name", ["light", "strong"])
def test_presets_change_pictures_in_training_alone(name, tmp_path):
    model = with_random_heads(lp.transfer_model(own_network(), 2, augmentation=name))
    x = pictures(4, 16, 16, 3, dtype="float32")
    layer = model.get_layer("augmentation")
    np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_array_equal(layer(x, training=False), x)
    first, second = (np.asarray(layer(x, training=True)) for _ in range(2))
    assert np.abs(first - x).max() > 1
    assert np.abs(first - second).max() > 1
    assert first.min() >= 0
    assert first.max() <= 255
    np.testing.assert_array_equal(model(x), lp.Model(model.input, model.output)(x))
    assert np.abs(np.asarray(model(x, training=True)) - np.asarray(model(x))).max() > 0
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    assert np.abs(np.asarray(loaded.get_layer("augmentation")(x, training=True)) - x).max() > 1


def test_the_same_seed_augments_alike():
    x, y = pictures(8, 16, 16, 3), np.arange(8) % 2
    losses = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        model = lp.transfer_model(own_network(), 2, augmentation="strong")
        losses.append(model.fit(x, y, epochs=2, verbose=0).history["loss"])
    assert losses[0] == losses[1]


def test_a_layer_of_the_users_own_augments(mlp):
    model = lp.transfer_model(mlp(), 2, augmentation=keras.layers.GaussianNoise(1.0))
    x = np.zeros((4, 64), "float32")
    assert np.std(model.get_layer("augmentation")(x, training=True)) > 0.5
    assert np.std(model.get_layer("augmentation")(x)) == 0
    nested = keras.Sequential([keras.layers.RandomFlip("vertical", seed=0)])
    model = lp.transfer_model(own_network(), 2, augmentation=nested)
    assert lp.transfer_model(model, 3).layers[1].name == "own"  # not the augmentation


def test_the_export_has_no_augmentation(tmp_path):
    sizes = {}
    for augmentation in (None, "strong"):
        keras.utils.set_random_seed(0)
        model = lp.transfer_model(own_network(), 2, augmentation=augmentation)
        lp.export_tflite(model, tmp_path / "m.tflite")
        sizes[augmentation] = (tmp_path / "m.tflite").stat().st_size
    assert abs(sizes["strong"] - sizes[None]) < 500


@pytest.mark.parametrize(
    ("augmentation", "error", "message"),
    [
        ("lihgt", ValueError, "Did you mean 'light'"),
        (3, TypeError, "augmentation=3"),
        (keras.layers.RandomCrop(8, 8), ValueError, r"\(None, 16, 16, 3\) into \(None, 8, 8, 3\)"),
    ],
)
def test_wrong_augmentations_are_refused(augmentation, error, message):
    with pytest.raises(error, match=message):
        lp.transfer_model(own_network(), 2, augmentation=augmentation)


def test_presets_are_for_pictures(mlp):
    with pytest.raises(ValueError, match="is for images"):
        lp.transfer_model(mlp(), 2, augmentation="light")


def test_a_backbone_with_several_inputs_is_not_augmented():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
    backbone = keras.Model(inputs, keras.layers.Add()(list(inputs.values())))
    with pytest.raises(ValueError, match="one input"):
        lp.transfer_model(backbone, 2, augmentation=keras.layers.GaussianNoise(1.0))


def test_an_untrained_grey_network_keeps_its_channel():
    model, _ = resolve_backbone(
        "MobileNet", weights=None, input_shape=(32, 32, 1), backbone_kwargs=ALPHA
    )
    assert model.get_layer("conv1").kernel.shape[2] == 1


def test_mixed_precision_leaves_pixels_alone():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = lp.transfer_model(own_network(), 2, augmentation="light")
    finally:
        keras.config.set_dtype_policy("float32")
    x = np.full((1, 16, 16, 3), 200.3, "float32")
    np.testing.assert_array_equal(model.get_layer("augmentation")(x), x)
