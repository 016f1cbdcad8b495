import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.tasks.heads import backbone_of
from tests.conftest import assert_same, snapshot, with_random_heads


@pytest.fixture
def pictures(digits):
    return digits[0].reshape(-1, 8, 8, 1), digits[1]


def trained_layers(model):
    return [layer.name for layer in backbone_of(model).layers if layer.trainable_variables]


def test_frozen_means_bit_equal_weights_and_statistics(convnet, pictures):
    backbone = convnet()
    model = lp.transfer_model(backbone, 10)
    before = snapshot(backbone)
    history = model.fit(*pictures, epochs=3, verbose=0)
    assert_same(before, snapshot(backbone))
    assert history.history["loss"][-1] < history.history["loss"][0]  # the head has learnt


@pytest.mark.parametrize("build", [lp.finetune_model, lp.multitask_model])
def test_a_reused_backbone_trains_but_keeps_its_statistics(convnet, pictures, build):
    backbone = convnet()
    x, y = pictures
    if build is lp.finetune_model:
        model = build(lp.transfer_model(backbone, 10), learning_rate=1e-2)
    else:
        model, y = build(backbone, {"digit": 10}), {"digit": y}
    backbone = model.get_layer(backbone.name)
    statistics = [v.numpy() for v in backbone.non_trainable_weights]
    kernel = backbone.get_layer("block1_conv").kernel.numpy()
    model.fit(x, y, epochs=2, verbose=0)
    assert_same(statistics, [v.numpy() for v in backbone.non_trainable_weights])
    assert np.abs(kernel - backbone.get_layer("block1_conv").kernel.numpy()).max() > 1e-4


def test_batch_normalization_of_an_untrained_backbone_trains(convnet, pictures):
    backbone = convnet()
    model = lp.transfer_model(backbone, 10, pretrained=False, trainable="all")
    backbone = model.get_layer(backbone.name)
    before = backbone.get_layer("block1_bn").moving_mean.numpy()
    model.fit(*pictures, verbose=0)
    assert np.abs(before - backbone.get_layer("block1_bn").moving_mean.numpy()).max() > 1e-4


def test_batch_normalization_inside_a_layer_of_layers_is_frozen_too(pictures):
    @keras.saving.register_keras_serializable("tests")
    class Unit(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.conv = keras.layers.Conv2D(4, 3)
            self.norm = keras.layers.BatchNormalization()

        def build(self, shape):
            self.conv.build(shape)
            self.norm.build(self.conv.compute_output_shape(shape))

        def call(self, x):
            return self.norm(self.conv(x))

    backbone = keras.Sequential([keras.Input((8, 8, 1)), Unit(name="unit")])
    model = lp.finetune_model(lp.transfer_model(backbone, 10), learning_rate=1e-2)
    before = backbone.get_layer("unit").norm.moving_mean.numpy()
    model.fit(*pictures, verbose=0)
    np.testing.assert_array_equal(before, backbone.get_layer("unit").norm.moving_mean.numpy())


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("head", []),
        (0, []),
        (1, ["block2"]),
        (2, ["block1", "block2"]),
        (3, ["block0", "block1", "block2"]),
        ("all", ["block0", "block1", "block2"]),
        (["block0", "block2"], ["block0", "block2"]),
        ([], []),
    ],
)
@pytest.mark.parametrize("build", [lp.transfer_model, lp.finetune_model])
def test_trainable_says_what_trains(mlp, build, trainable, expected):
    model = build(mlp((8, 8, 8)), 10, trainable=trainable)
    assert trained_layers(model) == expected
    assert model.get_layer("predictions").trainable_variables


@pytest.mark.parametrize(
    ("trainable", "error", "message"),
    [
        (4, ValueError, "there are 3 blocks"),
        (-1, ValueError, "trainable=-1"),
        (["blok1"], ValueError, "Received: 'blok1'.*Did you mean 'block1'"),
        ("everything", TypeError, "trainable='everything'"),
        (True, TypeError, "trainable=True"),
        (1.5, TypeError, "trainable=1.5"),
    ],
)
def test_wrong_trainable_is_refused(mlp, trainable, error, message):
    with pytest.raises(error, match=message):
        lp.transfer_model(mlp((8, 8, 8)), 10, trainable=trainable)


def test_partial_freezing_survives_saving(convnet, tmp_path):
    model = lp.transfer_model(convnet(), 10, trainable=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert trained_layers(loaded) == trained_layers(model) == ["block2_conv"]
    assert len(loaded.non_trainable_variables) == len(model.non_trainable_variables)


@pytest.mark.parametrize("trainable", ["head", "all"])
def test_flags_that_were_set_inside_before_do_not_matter(convnet, trainable):
    """`layer.trainable = value` alone reaches nothing inside where it has that value already."""
    inner = convnet()
    backbone = keras.Sequential([inner, keras.layers.Flatten()])
    inner.get_layer("block1_conv").trainable = trainable == "head"
    backbone._trainable = trainable == "all"
    model = lp.transfer_model(backbone, 10, trainable=trainable)
    kernels = 2 if trainable == "all" else 0
    assert len(model.trainable_variables) == 2 * kernels + 2


def noisy(name):
    return keras.layers.GaussianNoise(1.0, name=name)


def test_what_is_frozen_runs_in_inference_mode():
    """In the part of a backbone that is frozen noise is off, in the part that trains it is on."""
    inner = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, name="block1_a"), noisy("block1_noise")]
    )
    layers = [inner, keras.layers.Dense(4, name="block2_a"), noisy("block2_noise")]
    backbone = keras.Sequential([keras.Input((4,)), *layers])
    x = np.ones((3, 4), "float32")

    def output(model, training):
        outputs = keras.Model(backbone.input, backbone.output)  # not ours: both noises
        assert np.abs(np.asarray(outputs(x, training=True)) - outputs(x)).max() > 0.1
        return np.asarray(model(x, training=training))

    model = lp.transfer_model(backbone, 2)
    np.testing.assert_array_equal(output(model, True), output(model, False))
    model = lp.transfer_model(backbone, 2, trainable=1)
    assert np.abs(output(model, True) - output(model, False)).max() > 0.01
    model.layers[1].layers[-1].stddev = 0.0  # the noise of the upper part
    np.testing.assert_array_equal(output(model, True), output(model, False))
    model = lp.transfer_model(backbone, 2, trainable="all")
    assert np.abs(output(model, True) - output(model, False)).max() > 0.01


def test_dropout_inside_a_frozen_layer_of_layers_is_off():
    class Composite(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense, self.noise = keras.layers.Dense(4), noisy("noise")

        def call(self, x):
            return self.noise(self.dense(x))

    model = lp.transfer_model(keras.Sequential([keras.Input((4,)), Composite()]), 2)
    x = np.ones((3, 4), "float32")
    np.testing.assert_array_equal(model(x, training=True), model(x))


def test_dropout_of_the_head_stays_on():
    backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(64)])
    model = with_random_heads(lp.transfer_model(backbone, 2, dropout=0.5))
    x = np.ones((3, 4), "float32")
    assert np.abs(np.asarray(model(x, training=True)) - np.asarray(model(x))).max() > 0.01


def test_a_sequential_with_a_call_of_its_own_runs_as_that_says():
    class Tenfold(keras.Sequential):
        def call(self, x, training=None, mask=None):
            return 10 * super().call(x, training=training, mask=mask)

    backbone = Tenfold([keras.Input((4,)), keras.layers.Dense(4)])
    x = np.ones((3, 4), "float32")
    for trainable in ("head", "all"):
        model = lp.transfer_model(backbone, 2, trainable=trainable)
        np.testing.assert_array_equal(model(x, training=True), model(x, training=False))


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
def test_a_mask_given_to_a_nested_model_is_kept():
    tokens = keras.Input((5, 3))
    sequence = keras.Input((5, 3))
    inner = keras.Model(sequence, keras.layers.LSTM(4)(sequence))
    mask = keras.ops.any(tokens > 0, axis=-1)
    backbone = keras.Model(tokens, keras.layers.Dense(2)(inner(tokens, mask=mask)))
    x = np.random.default_rng(0).normal(size=(6, 5, 3)).astype("float32")
    x[:, 3:] = -1
    model = lp.transfer_model(backbone, 2, trainable=1)
    np.testing.assert_allclose(model(x, training=True), model(x), atol=1e-6)


def test_weights_of_a_models_own_train_with_all_of_it():
    class Scaled(keras.Model):
        def __init__(self):
            super().__init__()
            self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
            self.low, self.high = keras.layers.Dense(4), keras.layers.Dense(3, name="high")

        def call(self, x):
            return self.high(self.low(x)) * self.scale

    for trainable, count in ((["high"], 2 + 2), ("all", 1 + 4 + 2), ("head", 2)):
        model = lp.transfer_model(Scaled(), 2, input_shape=(4,), trainable=trainable)
        assert len(model.trainable_variables) == count
