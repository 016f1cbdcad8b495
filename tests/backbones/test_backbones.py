import sys
import urllib.error

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.backbones.blocks import blocks_of
from keras_lp.backbones.resolve import _preprocess, resolve_backbone

ALPHA = {"alpha": 0.25}


@pytest.fixture(scope="module")
def mobilenet_weights(tmp_path_factory):
    keras.utils.set_random_seed(1)
    network = keras.applications.MobileNet(
        input_shape=(32, 32, 3), include_top=False, weights=None, **ALPHA
    )
    path = tmp_path_factory.mktemp("weights") / "mobilenet.weights.h5"
    network.save_weights(path)
    return path


def one_function_a_family():
    families = {}
    for name in dir(keras.applications):
        function = getattr(keras.applications, name)
        if name[0].isupper():
            families.setdefault(function.__module__, name)
    return sorted(families.values())


@pytest.mark.parametrize("name", one_function_a_family())
def test_preprocessing_equals_the_applications_own(name):
    build = getattr(keras.applications, name)
    own = sys.modules[build.__module__].preprocess_input
    images = np.random.default_rng(0).uniform(0, 255, (2, 5, 5, 3)).astype("float32")
    inputs = keras.Input((5, 5, 3))
    ours = keras.Model(inputs, keras.layers.Identity()(_preprocess(build, inputs)))
    np.testing.assert_allclose(
        ours.predict(images, verbose=0), own(images.copy()), rtol=1e-5, atol=2e-5
    )


def test_a_named_backbone_gives_the_applications_features(mobilenet_weights):
    model, pretrained = resolve_backbone(
        "MobileNet", input_shape=(32, 32, 3), weights=str(mobilenet_weights), backbone_kwargs=ALPHA
    )
    assert pretrained
    plain = keras.applications.MobileNet(
        input_shape=(32, 32, 3), include_top=False, weights=str(mobilenet_weights), **ALPHA
    )
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3))
    expected = plain.predict(
        keras.applications.mobilenet.preprocess_input(images.astype("float32")), verbose=0
    )
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, atol=1e-5)
    assert np.ptp(expected) > 0


SMALLEST = {
    "convnext": "ConvNeXtTiny",
    "densenet": "DenseNet121",
    "efficientnet": "EfficientNetB0",
    "efficientnet_v2": "EfficientNetV2B0",
    "inception_resnet_v2": "InceptionResNetV2",
    "inception_v3": "InceptionV3",
    "mobilenet": "MobileNet",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3": "MobileNetV3Small",
    "nasnet": "NASNetMobile",
    "resnet": "ResNet50",
    "resnet_v2": "ResNet50V2",
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "xception": "Xception",
}


def test_every_family_is_tested():
    families = {getattr(keras.applications, name).__module__ for name in one_function_a_family()}
    assert {family.rsplit(".", 1)[1] for family in families} == set(SMALLEST)


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALLEST)
def test_raw_pictures_give_every_familys_own_features(family, tmp_path):
    """From a weights file; the untrained network's statistics are those of a batch."""
    name = SMALLEST[family]
    build = getattr(keras.applications, name)
    own = sys.modules[build.__module__].preprocess_input
    images = np.random.default_rng(0).integers(0, 256, (8, 80, 80, 3)).astype("uint8")
    plain = build(include_top=False, weights=None, input_shape=(80, 80, 3))
    prepared = own(images.astype("float32"))
    for layer in plain.layers:  # calibrated: else the features of deep networks vanish
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    plain(prepared, training=True)
    plain.save_weights(tmp_path / "w.weights.h5")
    expected = plain.predict(prepared, verbose=0)
    model, pretrained = resolve_backbone(
        name, input_shape=(80, 80, 3), weights=tmp_path / "w.weights.h5"
    )
    assert pretrained
    scale = np.std(expected)
    assert scale > 1e-3
    np.testing.assert_allclose(
        model.predict(images, verbose=0) / scale, expected / scale, atol=1e-2
    )
    raw = plain.predict(images.astype("float32") / 128, verbose=0)
    assert np.abs(raw - expected).max() / scale > 0.1  # the preprocessing matters


def test_bgr_preprocessing_saves_and_loads(tmp_path):
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, _preprocess(keras.applications.ResNet50, inputs))
    model.save(tmp_path / "m.keras")
    x = np.random.default_rng(0).uniform(0, 255, (1, 4, 4, 3))
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["block1_conv", "block1_bn", "block2_conv"], [2, 1]),
        (["stem_conv", "stem_bn", "body_conv"], [2, 1]),
        (["dense", "dense_1", "dense_2"], [1, 1, 1]),
        (["block_1_expand", "block_1_expand_BN", "block_2_expand"], [2, 1]),
        (["conv1", "conv1_bn", "conv_dw_1", "conv_dw_1_bn", "conv_pw_1", "conv_pw_1_bn"], [2, 4]),
        (
            ["transformer_layer_0_attention", "transformer_layer_0_mlp", "transformer_layer_1_mlp"],
            [2, 1],
        ),
        (["conv_in", "down_a", "mid_a", "up_a", "conv_out"], [1, 1, 1, 1, 1]),
        (["conv2_block1_1_conv", "conv2_block1_2_conv", "conv2_block2_1_conv"], [2, 1]),
        (["block1a_dwconv", "block1a_se_reduce", "block2a_dwconv"], [2, 1]),
    ],
)
def test_layers_with_a_common_prefix_are_one_block(names, expected):
    model = keras.Sequential(
        [keras.Input((3,)), *(keras.layers.Dense(3, name=name) for name in names)]
    )
    assert [len(block) for block in blocks_of([model])] == expected


def test_names_that_keras_gave_are_blocks_of_their_own():
    """Also where they share words; normalisation belongs to the block below it."""
    keras.backend.clear_session()
    inputs = x = keras.Input((4, 8))
    for _ in range(3):
        x = keras.layers.LayerNormalization()(keras.layers.MultiHeadAttention(1, 4)(x, x))
        x = keras.layers.BatchNormalization()(keras.layers.Dense(8)(x))
    blocks = blocks_of([keras.Model(inputs, x)])
    kinds = [[type(layer).__name__ for layer in block] for block in blocks]
    assert kinds == [["MultiHeadAttention"], ["LayerNormalization"],
                     ["Dense", "BatchNormalization"]] * 3  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count", "top"),
    [
        ("MobileNet", 14, "conv_pw_13"),
        ("MobileNetV2", 19, "Conv_1"),
        ("ResNet50V2", 17, "conv5_block3_3_conv"),
        ("EfficientNetB0", 18, "top_conv"),
        ("VGG16", 5, "block5_conv3"),
        ("InceptionV3", 11, None),
        ("Xception", 14, "block14_sepconv2"),
        ("NASNetMobile", 17, "separable_conv_1_normal_left1_12"),
    ],
)
def test_blocks_of_the_applications_are_those_of_the_architecture(name, count, top):
    network = getattr(keras.applications, name)(
        include_top=False, weights=None, input_shape=(96, 96, 3)
    )
    blocks = blocks_of([network])
    assert len(blocks) == count
    order = {id(layer): i for i, layer in enumerate(network.layers)}
    firsts = [order[id(block[0])] for block in blocks]
    assert firsts == sorted(firsts)
    assert sum(len(block) for block in blocks) == sum(bool(la.weights) for la in network.layers)
    assert top is None or top in [layer.name for layer in blocks[-1]]
    if name in ("MobileNet", "ResNet50V2"):  # the top block has something to train
        assert len(lp.transfer_model(network, 2, trainable=1).trainable_variables) > 2


def test_blocks_look_into_nested_models_and_skip_layers_without_weights():
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), keras.layers.ReLU()])
    model = keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(2)])
    assert [len(block) for block in blocks_of([model])] == [1, 1]


def test_a_keras_file_is_a_backbone(mlp, digits, tmp_path):
    backbone = mlp()
    backbone.save(tmp_path / "backbone.keras")
    for source in (tmp_path / "backbone.keras", str(tmp_path / "backbone.keras")):
        again, pretrained = resolve_backbone(source)
        assert pretrained
        np.testing.assert_array_equal(again(digits[0]), backbone(digits[0]))


def test_a_model_of_ours_lends_its_backbone_and_drops_its_head(mlp, digits, tmp_path):
    first = lp.multitask_model(mlp(), {"a": 10, "b": 3})
    first.save(tmp_path / "first.keras")
    for source in (first, tmp_path / "first.keras"):
        second = lp.transfer_model(source, 7)
        assert second.output_shape == (None, 7)
        assert second.count_params() == 64 * 16 + 16 + 16 * 7 + 7 + 2 * 16  # and the inputs' scale
        np.testing.assert_array_equal(
            second.layers[1](digits[0]), first.get_layer("mlp")(digits[0])
        )


def test_a_subclassed_backbone_needs_its_input_shape(digits):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(8)

        def call(self, x):
            return self.dense(x)

    with pytest.raises(ValueError, match="needs `input_shape`"):
        lp.transfer_model(Own(), 10)
    model = lp.transfer_model(Own(), 10, input_shape=(64,))
    model.fit(*digits, verbose=0)
    assert len(model.trainable_variables) == 2


def test_a_backbone_with_several_named_inputs(digits):
    inputs = {"a": keras.Input((64,), name="a"), "b": keras.Input((64,), name="b")}
    features = keras.layers.Dense(4)(keras.layers.Concatenate()([inputs["a"], inputs["b"]]))
    model = lp.transfer_model(keras.Model(inputs, features), 10)
    x, y = digits
    model.fit({"a": x, "b": x}, y, verbose=0)
    assert model.predict({"a": x, "b": x}, verbose=0).shape == (200, 10)


@pytest.mark.parametrize(
    ("pooling", "width"), [("avg", 5), ("max", 5), ("flatten", 2 * 3 * 5), ("none", None)]
)
def test_pooling_makes_vectors_of_pictures(pooling, width):
    backbone = keras.Sequential([keras.Input((2, 3, 5)), keras.layers.Identity()])
    x = np.random.default_rng(0).normal(size=(4, 2, 3, 5)).astype("float32")
    model = lp.transfer_model(backbone, 2, pooling=None if pooling == "none" else pooling)
    if width is None:
        assert model.output_shape == (None, 2, 3, 2)
        return
    expected = {"avg": x.mean((1, 2)), "max": x.max((1, 2)), "flatten": x.reshape(4, -1)}[pooling]
    features = keras.Model(model.input, model.get_layer("pooling").output)(x)
    np.testing.assert_allclose(features, expected, atol=1e-6)
    assert model.get_layer("predictions").kernel.shape == (width, 2)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_pooling_makes_vectors_of_sequences(pooling):
    backbone = keras.Sequential([keras.Input((7, 5)), keras.layers.Identity()])
    assert lp.transfer_model(backbone, 2, pooling=pooling).output_shape == (None, 2)


def test_input_shape_fixes_the_sizes_that_a_backbone_leaves_open():
    backbone = keras.Sequential([keras.Input((None, None, 1)), keras.layers.Conv2D(4, 3)])
    model = lp.transfer_model(backbone, 2, input_shape=(8, 8, 1), pooling="flatten")
    assert model.input_shape == (None, 8, 8, 1)
    with pytest.raises(ValueError, match=r"input_shape=\(2, 2, 1\)"):
        lp.transfer_model(backbone, 2, input_shape=(2, 2, 1))
    with pytest.raises(ValueError, match="known size"):
        lp.transfer_model(backbone, 2, pooling="flatten")


def test_features_may_come_in_a_list_or_dict(digits):
    inputs = keras.Input((64,), name="x")
    features = keras.layers.Dense(4)(inputs)
    for backbone in (
        keras.Model([inputs], [features]),
        keras.Model({"x": inputs}, {"features": features}),
    ):
        model = lp.transfer_model(backbone, 10)
        x = {"x": digits[0]} if isinstance(backbone.input, dict) else digits[0]
        model.fit(x, digits[1], verbose=0)


def test_preprocessing_of_other_channels_than_three(digits):
    model = lp.multitask_model("MobileNet", {"a": 2}, weights=None, input_shape=(32, 32, 1),
                               backbone_kwargs=ALPHA)  # fmt: skip
    layer = model.layers[1].get_layer("preprocessing")
    grey = np.array([0.0, 255.0]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(np.ravel(layer(grey)), [-1, 1], atol=1e-6)


def dense():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="dense_net")


def softmax_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lp.transfer_model("MobilNetV2", 2), ValueError, "Did you mean 'MobileNetV2'"),
        (lambda: lp.transfer_model(3, 2), TypeError, "backbone=3 of type int"),
        (lambda: lp.transfer_model("gone.keras", 2), ValueError, "must exist"),
        (lambda: lp.transfer_model("gone.h5", 2), ValueError, "must end in .keras"),
        (lambda: lp.transfer_model("MobileNet", 2, weights="imagnet"), ValueError, "Did you mean"),
        (
            lambda: lp.transfer_model("MobileNet", 2, input_shape=(32, 32, 4)),
            ValueError,
            "3 channels, or one grey channel",
        ),
        (lambda: lp.transfer_model(dense(), 2, hidden_units=128), TypeError, "hidden_units=128"),
        (lambda: lp.transfer_model(dense(), 2, dropout="0.5"), ValueError, "dropout='0.5'"),
        (lambda: lp.multitask_model(dense(), {"dense_net": 2}), ValueError, "must differ"),
        (lambda: lp.multitask_model(dense(), {"a b": 2}), ValueError, "identifiers"),
        (lambda: lp.multitask_model(dense(), {}), ValueError, "at least one task"),
        (lambda: lp.multitask_model(dense(), ["a"]), TypeError, "dict of tasks"),
        (lambda: lp.multitask_model(dense(), {"a": 2}, balancing="equals"), ValueError, "'equal'"),
        (lambda: lp.transfer_model(softmax_model(), 2), ValueError, "must be headless"),
        (
            lambda: lp.transfer_model("MobileNet", 2, weights="gone.h5"),
            ValueError,
            "weights='gone.h5'",
        ),
        (lambda: lp.transfer_model("MobileNet", 2, weights=None), ValueError, "a random net"),
        (
            lambda: lp.multitask_model("MobileNet", {"a": 2}, weights=None, input_shape=(28, 28)),
            ValueError,
            "height, width, channels",
        ),
        (
            lambda: lp.multitask_model(
                "MobileNet", {"a": 2}, weights=None, input_shape=(16, 16, 3)
            ),
            ValueError,
            r"at least 32x32",
        ),
        (
            lambda: lp.multitask_model(
                "MobileNet", {"a": 2}, weights=None, backbone_kwargs={"alfa": 1}
            ),
            TypeError,
            "alfa",
        ),
        (
            lambda: lp.transfer_model(dense(), 2, input_shape=(5,)),
            ValueError,
            r"input_shape=\(5,\).* for the model .* takes \(4,\)",
        ),
        (
            lambda: lp.transfer_model(dense(), 2, weights=None),
            ValueError,
            "pretrained=False",
        ),
        (
            lambda: lp.transfer_model(dense(), 2, pretrained=False),
            ValueError,
            'trainable="all"',
        ),
        (
            lambda: lp.transfer_model(dense(), 2, pooling="mean"),
            ValueError,
            "pooling='mean'",
        ),
    ],
)
def test_wrong_backbones_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "failure", [urllib.error.URLError("no route to host"), ConnectionResetError("reset by peer")]
)
def test_imagenet_weights_without_a_network_say_what_to_do(monkeypatch, tmp_path, failure):
    def offline(*args, **kwargs):
        raise failure

    monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", offline)
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"MobileNetV2 must be downloaded.*weights file"):
        lp.transfer_model("MobileNetV2", 2, input_shape=(96, 96, 3))


def test_an_untrained_named_backbone_trains_its_statistics():
    model = lp.multitask_model(
        "MobileNet", {"a": 2}, weights=None, input_shape=(32, 32, 3), backbone_kwargs=ALPHA
    )
    norms = [
        layer
        for layer in model.layers[1].layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert norms
    assert all(layer.trainable for layer in norms)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_backbone_file_is_named(mlp, tmp_path, damage):
    path = tmp_path / "network.keras"
    mlp().save(path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[content.index(b'"class_name"') + 3] ^= 1  # in the config
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"network\.keras, which is damaged"):
        lp.transfer_model(path, 3)


def test_a_backbone_object_that_trains_is_copied(mlp):
    """With its weights and the state of its dropout; a frozen one is shared."""
    backbone = mlp()
    for frozen in ("head", 0, []):
        assert lp.transfer_model(backbone, 3, trainable=frozen).layers[1] is backbone
    before = backbone.get_weights()
    x, y = np.random.default_rng(0).normal(size=(20, *backbone.input_shape[1:])), np.arange(20) % 3
    for build in (
        lambda: lp.transfer_model(backbone, 3, trainable="all"),
        lambda: lp.transfer_model(backbone, 3, trainable=1),
        lambda: lp.multitask_model(backbone, {"a": 3}),
        lambda: lp.finetune_model(backbone, task=3),
        lambda: lp.finetune_model(backbone, task=3, lora=lp.LoRA(rank=2), learning_rate=0.1),
    ):
        model = build()
        copy = model.get_layer(backbone.name)
        assert copy is not backbone
        np.testing.assert_allclose(copy(x), backbone(x), rtol=1e-6)
        model.fit(x, {"a": y} if isinstance(model.output, dict) else y, verbose=0)
        assert np.abs(np.asarray(copy(x)) - backbone(x)).max() > 0
        for a, b in zip(before, backbone.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        lp.transfer_model(model, 4)  # builds on what the model has learned
    with pytest.warns(UserWarning, match=r"trains a copy.*'mlp', frozen.*pass the model"):
        lp.transfer_model(backbone, 3)


def test_a_copy_keeps_what_normalization_has_adapted():
    """Its mean and variance are constants besides its variables."""
    norm = keras.layers.Normalization(name="norm")
    norm.adapt(np.array([[1.0, 10.0], [3.0, 30.0]]))
    backbone = keras.Sequential([keras.Input((2,)), norm, keras.layers.Dense(4, "tanh")])
    x = np.array([[2.0, 25.0], [0.0, 15.0]], "float32")
    model = lp.transfer_model(backbone, 3, trainable="all")
    copy = model.get_layer(backbone.name)
    assert copy is not backbone
    np.testing.assert_allclose(copy.get_layer("norm")(x), [[0, 0.5], [-2, -0.5]], atol=1e-6)
    np.testing.assert_allclose(copy(x), backbone(x), atol=1e-6)
    plain = lp.plain_model(model)
    np.testing.assert_allclose(plain(x), model(x), atol=1e-6)


def test_a_compiled_backbone_with_its_own_loss_is_copied(mlp):
    def loss(y, p):
        return keras.ops.mean((y - p) ** 2)

    backbone = mlp()
    backbone.compile("adam", loss)
    model = lp.transfer_model(backbone, 3, trainable="all")
    assert model.get_layer(backbone.name) is not backbone
    assert backbone.compiled
    assert not model.get_layer(backbone.name).compiled


def test_a_backbone_with_an_adapted_vocabulary_is_shared():
    """The copy would not know a word."""
    lookup = keras.layers.StringLookup(name="lookup")
    lookup.adapt(np.array(["a", "b"]))
    words = keras.Input((2,), dtype="string")
    features = keras.layers.Embedding(4, 3)(lookup(words))
    backbone = keras.Model(words, features)
    model = lp.transfer_model(backbone, 2, trainable="all")
    assert model.get_layer(backbone.name) is backbone


def test_a_file_is_not_copied(mlp, tmp_path, monkeypatch):
    mlp().save(tmp_path / "backbone.keras")
    monkeypatch.setattr("keras_lp.backbones.resolve.own_copy", lambda _: pytest.fail("copied"))
    lp.transfer_model(tmp_path / "backbone.keras", 3, trainable="all")


def test_a_backbone_that_cannot_be_copied_is_shared():
    class Network(keras.Model):
        def __init__(self, layers):
            super().__init__()
            self.inner = layers

        def call(self, x):
            return self.inner(x)

    backbone = Network(keras.layers.Dense(4))
    model = lp.transfer_model(backbone, 2, input_shape=(3,), trainable="all")
    assert any(layer is backbone for layer in model._flatten_layers())
    assert len(model.trainable_variables) == 4


def test_a_backbone_object_that_trains_in_another_model_is_noticed(mlp, tmp_path):
    backbone = mlp()
    lp.transfer_model(backbone, 3)  # frozen: it stays as it is
    model = lp.transfer_model(backbone, 3)
    lp.finetune_model(model)
    for build in (
        lambda: lp.transfer_model(backbone, 3),
        lambda: lp.multitask_model(backbone, {"a": 2}),
        lambda: lp.finetune_model(backbone, task=3),
    ):
        with pytest.warns(UserWarning, match=r"'mlp'.*\['block0'\].*shares its weights.*a file"):
            build()
    lp.transfer_model(model, 4)  # to build on what a model has learned is meant
    backbone.save(tmp_path / "backbone.keras")
    for _ in range(2):
        lp.finetune_model(lp.transfer_model(tmp_path / "backbone.keras", 3))
    lp.finetune_model(lp.transfer_model(keras.models.clone_model(backbone), 3))
