"""KerasHub: presets in local folders stand for those of the network."""

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.backbones.blocks import blocks_of
from tests.backbones.hub import LANGUAGE
from tests.conftest import with_random_heads

keras_hub = pytest.importorskip("keras_hub")


@pytest.fixture(scope="module")
def resnet():
    keras.utils.set_random_seed(0)
    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(None, None, 3),
    )


@pytest.fixture(scope="module")
def preset(resnet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset")
    resnet.save_to_preset(str(folder))
    keras_hub.layers.ResNetImageConverter(
        image_size=(32, 32), scale=[0.01, 0.02, 0.03], offset=[0.5, 0.0, -0.5]
    ).save_to_preset(str(folder))
    return f"hub:{folder}"


def test_a_preset_takes_raw_pictures(preset, resnet):
    model = lp.transfer_model(preset, 3, input_shape=(32, 32, 3), pooling="avg")
    x = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype("uint8")
    prepared = x * np.array([0.01, 0.02, 0.03]) + np.array([0.5, 0.0, -0.5])
    expected = np.asarray(resnet(prepared.astype("float32"), training=False)).mean((1, 2))
    features = keras.Model(model.input, model.get_layer("features").output)
    np.testing.assert_allclose(features(x), expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected) > 0
    assert len(model.trainable_variables) == 2


def test_a_preset_takes_grey_pictures_and_resizes_them(preset, tmp_path):
    model = lp.transfer_model(preset, 3, input_shape=(28, 28, 1), image_size=32)
    x = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1))
    model.fit(x, np.array([0, 1, 2, 0]), verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    trained = lp.finetune_model(model, trainable=1)
    assert any("stack0_block0" in v.path for v in trained.trainable_variables)


def test_untrained_presets_and_weights_files(preset, resnet, tmp_path):
    keras.utils.set_random_seed(5)
    model = lp.transfer_model(preset, 3, weights=None, trainable="all", input_shape=(32, 32, 3))
    kernel = model.layers[1].layers[-1].get_layer("conv1_conv").kernel
    assert np.abs(np.asarray(kernel) - np.asarray(resnet.get_layer("conv1_conv").kernel)).max() > 0
    resnet.save_weights(tmp_path / "r.weights.h5")
    model = lp.transfer_model(preset, 3, weights=tmp_path / "r.weights.h5", input_shape=(32, 32, 3))
    kernel = model.layers[1].layers[-1].get_layer("conv1_conv").kernel
    np.testing.assert_array_equal(kernel, resnet.get_layer("conv1_conv").kernel)


def test_a_picture_backbone_object_takes_what_it_takes(resnet):
    model = lp.transfer_model(resnet, 3, input_shape=(32, 32, 3), pooling="avg")
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    expected = np.asarray(resnet(x)).mean((1, 2))
    features = keras.Model(model.input, model.get_layer("features").output)
    np.testing.assert_allclose(features(x), expected, rtol=1e-4, atol=1e-5)


def texts(rows=8, length=12):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, length, rows)
    mask = (np.arange(length) < lengths[:, None]).astype("int32")
    return {"token_ids": rng.integers(1, 50, (rows, length)) * mask, "padding_mask": mask}


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_text_is_pooled_over_its_real_tokens(pooling):
    backbone = keras_hub.models.GPT2Backbone(**LANGUAGE)
    model = lp.transfer_model(backbone, 3, pooling=pooling)
    x = texts()
    sequence = np.asarray(backbone(x, training=False))
    rows = [s[m.astype(bool)] for s, m in zip(sequence, x["padding_mask"], strict=True)]
    expected = np.stack([getattr(r, "mean" if pooling == "avg" else "max")(0) for r in rows])
    features = keras.Model(model.input, model.get_layer("features").output)
    np.testing.assert_allclose(features(x), expected, rtol=1e-4, atol=1e-5)
    assert (
        np.abs(expected - getattr(sequence, "mean" if pooling == "avg" else "max")(1)).max() > 0.01
    )


def test_a_text_backbone_with_several_outputs_gives_its_sequence(tmp_path):
    backbone = keras_hub.models.BertBackbone(**LANGUAGE)
    model = lp.transfer_model(backbone, 3)
    x = {**texts(), "segment_ids": np.zeros((8, 12), "int32")}
    history = model.fit(x, np.arange(8) % 3, epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    lp.finetune_model(model).fit(x, np.arange(8) % 3, verbose=0)


def test_without_pooling_each_token_gets_a_prediction():
    """A next-token head: labels of padded places are -1, so missing."""
    model = lp.transfer_model(keras_hub.models.GPT2Backbone(**LANGUAGE), 50, pooling=None)
    x = texts()
    following = np.roll(x["token_ids"], -1, axis=1)
    following = np.where(np.roll(x["padding_mask"], -1, axis=1) == 1, following, -1)
    history = model.fit(x, following, epochs=2, verbose=0)
    assert model.output_shape == (None, None, 50)
    logits = model.predict(x, verbose=0)
    evaluated = model.evaluate(x, following, verbose=0, return_dict=True)
    z = logits - logits.max(-1, keepdims=True)
    logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    present = following >= 0
    expected = -logs[present, following[present]].mean()
    assert evaluated["loss"] == pytest.approx(expected, rel=1e-5)
    assert history.history["loss"][1] < history.history["loss"][0]


def test_dropout_of_a_frozen_language_model_is_off():
    model = with_random_heads(lp.transfer_model(keras_hub.models.GPT2Backbone(**LANGUAGE), 3))
    for x in (texts(), {name: keras.ops.convert_to_tensor(v) for name, v in texts().items()}):
        np.testing.assert_array_equal(model(x, training=True), model(x))
    model = lp.finetune_model(model)
    assert np.abs(np.asarray(model(texts(), training=True)) - np.asarray(model(texts()))).max() > 0


def test_blocks_of_a_language_model():
    names = [[layer.name for layer in block] for block in
             blocks_of([keras_hub.models.GPT2Backbone(**LANGUAGE)])]  # fmt: skip
    assert ["transformer_layer_0"] in names
    assert ["transformer_layer_1"] in names[2:] or "transformer_layer_1" in names[-1]


def test_a_task_of_kerashub_is_told_to_give_its_backbone(resnet):
    task = keras_hub.models.ImageClassifier(backbone=resnet, num_classes=2)
    with pytest.raises(ValueError, match=r"ImageClassifier .* Pass its `.backbone`"):
        lp.transfer_model(task, 2)
    lp.transfer_model(task.backbone, 2)


def test_an_unreachable_preset_says_so(monkeypatch):
    import requests

    def offline(*args, **kwargs):
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(keras_hub.models.Backbone, "from_preset", offline)
    with pytest.raises(ConnectionError, match=r"'resnet_50_imagenet'.*no route.*hub:./folder"):
        lp.transfer_model("hub:resnet_50_imagenet", 2)


def test_an_unknown_preset_says_so():
    with pytest.raises(ValueError, match="resnet_500"):
        lp.transfer_model("hub:resnet_500", 2)


def test_kerashub_may_be_absent(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "keras_hub", None)
    with pytest.raises(ImportError, match="pip install keras-hub"):
        lp.transfer_model("hub:resnet_50_imagenet", 2)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_a_text_without_a_real_token_has_features_of_zero(pooling):
    model = lp.transfer_model(keras_hub.models.GPT2Backbone(**LANGUAGE), 3, pooling=pooling)
    x = texts()
    x["padding_mask"][0] = 0
    features = keras.Model(model.input, model.get_layer("features").output)(x)
    np.testing.assert_array_equal(features[0], np.zeros(16))
    history = model.fit(x, np.arange(8) % 3, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


def test_a_preset_of_a_fixed_size_says_which(tmp_path):
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3), patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    backbone.save_to_preset(str(tmp_path))
    assert lp.transfer_model(f"hub:{tmp_path}", 2).input_shape == (None, 32, 32, 3)
    model = lp.transfer_model(f"hub:{tmp_path}", 2, input_shape=(28, 28, 1), image_size=32)
    assert model.predict(np.zeros((2, 28, 28, 1)), verbose=0).shape == (2, 2)
    with pytest.raises(ValueError, match=r"It needs image_size=\(32, 32\)"):
        lp.transfer_model(f"hub:{tmp_path}", 2, image_size=28)
    assert len(blocks_of([backbone])) == 3  # patches and positions, two layers
