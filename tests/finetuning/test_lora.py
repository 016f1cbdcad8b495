import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.model.adapters import adapted_layers


def network():
    layers = [
        keras.Input((8, 8, 2)),
        keras.layers.Conv2D(4, 3, name="conv"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Flatten(),
        keras.layers.Dense(6, activation="tanh", name="dense"),
    ]
    return keras.Sequential(layers)


@pytest.fixture
def xy():
    rng = np.random.default_rng(0)
    return rng.normal(size=(24, 8, 8, 2)).astype("float32"), np.arange(24) % 3


def adapted(backbone=None, learning_rate=0.05, **kwargs):
    keras.utils.set_random_seed(0)
    model = lp.transfer_model(backbone or network(), 3)
    return lp.finetune_model(model, lora=lp.LoRA(**kwargs), learning_rate=learning_rate)


def test_adapters_and_head_move_and_nothing_else(xy):
    model = adapted(rank=2)
    names = [v.name for v in model.trainable_variables]
    assert names == ["lora_kernel_a", "lora_kernel_b"] * 2 + ["kernel", "bias"]
    frozen = [(w, np.array(w)) for w in model.non_trainable_variables if "seed" not in w.path]
    start = [np.array(w) for w in model.trainable_variables]
    expected = model.predict(xy[0], verbose=0)
    model.fit(*xy, epochs=2, verbose=0)
    for weight, before in frozen:
        np.testing.assert_array_equal(weight, before, err_msg=weight.path)
    for weight, before in zip(model.trainable_variables, start, strict=True):
        assert np.abs(np.asarray(weight) - before).max() > 0, weight.path
    assert np.abs(model.predict(xy[0], verbose=0) - expected).max() > 0.01


def test_the_default_rate_of_adapters():
    for lora, rate in ((None, 1e-4), (lp.LoRA(2), 1e-3)):
        model = lp.finetune_model(lp.transfer_model(network(), 3), lora=lora)
        assert float(model.optimizer.learning_rate) == pytest.approx(rate)


def test_new_adapters_change_nothing_yet(xy):
    keras.utils.set_random_seed(0)
    model = lp.transfer_model(network(), 3)
    before = model.predict(xy[0], verbose=0)
    model = lp.finetune_model(model, lora=lp.LoRA(rank=4))
    np.testing.assert_allclose(model.predict(xy[0], verbose=0), before, atol=1e-6)


def test_one_adapted_layer_is_w_plus_alpha_over_rank_a_b(xy):
    model = adapted(rank=2, alpha=6, layers=["dense"])
    model.fit(*xy, verbose=0)
    (layer,) = adapted_layers(model)
    a, b = (np.asarray(getattr(layer, f"lora_kernel_{n}")) for n in "ab")
    below = keras.Model(model.layers[1].inputs[0], model.layers[1].layers[-2].output)
    z = np.asarray(below(xy[0]))
    expected = np.tanh(z @ (np.asarray(layer._kernel) + 6 / 2 * a @ b) + np.asarray(layer.bias))
    np.testing.assert_allclose(model.layers[1](xy[0]), expected, atol=1e-5)


def test_saved_adapters_load_exactly_and_hold_nothing_else(xy, tmp_path):
    model = adapted(rank=2)
    model.fit(*xy, verbose=0)
    lp.save_adapters(model, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        sizes = sum(array.size for array in file.values())
    trained = sum(np.size(v) for v in model.trainable_variables)
    assert sizes == trained + 2 * model.get_layer("predictions").kernel.shape[0]  # its scale
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    fresh = adapted(rank=2)
    assert np.abs(fresh.predict(xy[0], verbose=0) - model.predict(xy[0], verbose=0)).max() > 0.01
    assert lp.load_adapters(fresh, tmp_path / "a.npz") is fresh
    np.testing.assert_array_equal(fresh.predict(xy[0], verbose=0), model.predict(xy[0], verbose=0))


def test_merged_adapters_give_the_same_outputs(xy, tmp_path):
    model = adapted(rank=2)
    model.fit(*xy, epochs=2, verbose=0)
    before = model.predict(xy[0], verbose=0)
    assert lp.merge_adapters(model) is model
    np.testing.assert_allclose(model.predict(xy[0], verbose=0), before, atol=1e-6)
    assert not adapted_layers(model)
    assert len(model.trainable_variables) == 2
    assert not any("lora" in weight.path for weight in model.weights)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.predict(xy[0], verbose=0), before, atol=1e-6)
    lp.finetune_model(model, trainable="all").fit(*xy, verbose=0)
    report = lp.export_tflite(lp.finetune_model(model), tmp_path / "m.tflite")
    assert report


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_adapters_of_quantised_layers_are_merged_as_keras_saves_them(xy, tmp_path, mode):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 10)).astype("float32")
    y = (x @ rng.normal(size=(10, 3))).argmax(1)
    backbone = keras.Sequential([keras.Input((10,)), keras.layers.Dense(128, "relu")])
    backbone.quantize(mode)
    model = adapted(backbone, rank=4)
    head = model.get_layer("predictions")
    assert head.kernel.dtype == "float32"
    model.fit(x, y, epochs=20, verbose=0)
    before = model.predict(x, verbose=0)
    model.save(tmp_path / "m.keras")
    lp.merge_adapters(model)
    assert not adapted_layers(model)
    after = model.predict(x, verbose=0)
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(after, loaded.predict(x, verbose=0), atol=1e-5)
    assert np.abs(after - before).max() < 0.1 * np.abs(before).max()  # quantised again
    assert (after.argmax(1) == before.argmax(1)).mean() > 0.98
    model = lp.finetune_model(model, lora=lp.LoRA(rank=2), learning_rate=1e-2)
    model.fit(x, y, verbose=0)
    kernel = backbone.layers[0]._kernel
    assert kernel.dtype == "int8"
    with pytest.warns(UserWarning, match="shares its weights"):
        other = lp.transfer_model(backbone, 3)
    lp.fit_head(other, (x, y), verbose=0)


def test_adapters_in_mixed_precision_and_of_tied_weights(xy):
    dense = keras.layers.Dense(6, activation="tanh", dtype="mixed_bfloat16")
    backbone = keras.Sequential([keras.Input((8, 8, 2)), keras.layers.Flatten(), dense])
    model = adapted(backbone, rank=2)
    model.fit(*xy, epochs=3, verbose=0)
    before = model.predict(xy[0], verbose=0)
    expected = np.array(dense.kernel)
    lp.merge_adapters(model)
    np.testing.assert_allclose(dense.kernel, expected, atol=1e-6)
    assert dense.kernel.dtype == "float32"
    np.testing.assert_allclose(model.predict(xy[0], verbose=0), before, atol=0.05)

    tokens = np.arange(24).reshape(4, 6) % 9
    embedding = keras.layers.ReversibleEmbedding(9, 5, name="words")
    inputs = keras.Input((6,), dtype="int32")
    tied = keras.Model(inputs, embedding(embedding(inputs), reverse=True))
    model = lp.transfer_model(tied, 3, pooling="avg")
    model = lp.finetune_model(model, lora=lp.LoRA(2, layers=["words"]), learning_rate=0.1)
    model.fit(tokens, np.arange(4) % 3, epochs=3, verbose=0)
    before = model.predict(tokens, verbose=0)
    lp.merge_adapters(model)
    np.testing.assert_allclose(model.predict(tokens, verbose=0), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method")
def test_float8_takes_no_adapters():
    backbone = keras.Sequential([keras.Input((10,)), keras.layers.Dense(16, "relu")])
    backbone.quantize("float8")
    model = lp.transfer_model(backbone, 3)
    with pytest.raises(ValueError, match="layers that take adapters"):
        lp.finetune_model(model, lora=lp.LoRA(2))


def test_adapters_train_on_after_loading(xy, tmp_path):
    """Keras folds them when it saves, and loads zeros, from where neither A nor B would move."""
    model = adapted(rank=2)
    model.fit(*xy, verbose=0)
    before = model.predict(xy[0], verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.predict(xy[0], verbose=0), before, atol=1e-6)
    names = [v.name for v in loaded.trainable_variables]
    assert names == [v.name for v in model.trainable_variables]
    frozen = np.array(adapted_layers(loaded)[0]._kernel)
    loaded.fit(*xy, epochs=2, verbose=0)
    for layer in adapted_layers(loaded):
        assert np.abs(np.asarray(layer.lora_kernel_b)).max() > 0
    np.testing.assert_array_equal(adapted_layers(loaded)[0]._kernel, frozen)


def test_finetuning_again_trains_the_same_adapters(xy):
    model = adapted(rank=2)
    model.fit(*xy, verbose=0)
    again = lp.finetune_model(model, lora=lp.LoRA(rank=2))
    assert len(again.trainable_variables) == 6
    frozen = lp.finetune_model(again, trainable="all")  # a kernel with adapters stays frozen
    assert "dense/kernel" not in [v.path for v in frozen.trainable_variables]
    with pytest.raises(ValueError, match=r"rank=3.*adapters of rank 2.*merge_adapters"):
        lp.finetune_model(model, lora=lp.LoRA(rank=3))


def test_attention_inside_layers_is_adapted_by_name():
    inputs = keras.Input((5, 8))
    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    backbone = keras.Model(inputs, keras.layers.LayerNormalization()(attention))
    model = adapted(backbone, layers=["query", "value"], rank=2)
    assert {layer.name for layer in adapted_layers(model)} == {"query", "value"}
    assert len(model.trainable_variables) == 2 * 2 + 2
    x, y = np.random.default_rng(0).normal(size=(6, 5, 8)), np.arange(6) % 3
    before = np.asarray(model(x))
    model.fit(x, y, epochs=3, verbose=0)
    assert np.abs(np.asarray(model(x)) - before).max() > 0.01


def test_embeddings_are_adapted_where_named(tmp_path):
    backbone = keras.Sequential(
        [keras.Input((4,)), keras.layers.Embedding(9, 5, name="words"), keras.layers.Dense(6)]
    )
    x, y = np.random.default_rng(0).integers(0, 9, (12, 4)), np.arange(12) % 3
    model = adapted(backbone, layers=["words"], rank=2)
    model.fit(x, y, epochs=2, verbose=0)
    before = model.predict(x, verbose=0)
    lp.save_adapters(model, tmp_path / "a.npz")
    np.testing.assert_allclose(lp.merge_adapters(model).predict(x, verbose=0), before, atol=1e-6)


def test_any_compiled_keras_model_takes_adapters(xy):
    model = keras.Sequential([*network().layers, keras.layers.Dense(3, name="top")])
    model.build((None, 8, 8, 2))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model = lp.finetune_model(model, lora=lp.LoRA(rank=2))
    assert {la.name for la in adapted_layers(model)} == {"conv", "dense"}
    model.fit(*xy, verbose=0)


def test_only_adapters_and_head_are_federated(xy):
    model = adapted(rank=2)
    x, y = xy
    frozen = np.array(adapted_layers(model)[0]._kernel)
    federated = lp.FederatedAveraging(model, batch_size=4)
    history = federated.fit({"a": (x[:12], y[:12]), "b": (x[12:], y[12:])}, rounds=2, verbose=0)
    np.testing.assert_array_equal(adapted_layers(model)[0]._kernel, frozen)
    trainable = 4 * sum(np.size(v) for v in model.trainable_variables)
    assert history.history["bytes_up"][0] == 2 * trainable
    assert np.abs(np.asarray(adapted_layers(model)[0].lora_kernel_b)).max() > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lp.LoRA(rank=0), ValueError, "rank=0"),
        (lambda: lp.LoRA(alpha=-1), ValueError, "alpha=-1"),
        (lambda: lp.LoRA(layers="dense"), TypeError, "layers='dense'"),
        (lambda: adapted(layers=["densse"]), ValueError, r"\['densse'\].*'conv', 'dense'"),
        (lambda: adapted(layers=["norm"]), ValueError, "nothing matches"),
        (
            lambda: lp.finetune_model(lp.transfer_model(network(), 3), lora=8),
            TypeError,
            "lora=8",
        ),
        (
            lambda: lp.finetune_model(lp.transfer_model(network(), 3), lora=lp.LoRA(), trainable=1),
            ValueError,
            "trainable=1",
        ),
        (lambda: lp.save_adapters(lp.transfer_model(network(), 3), "a"), ValueError, "must have"),
        (lambda: lp.merge_adapters(lp.transfer_model(network(), 3)), ValueError, "must have"),
        (lambda: lp.load_adapters(adapted(), "gone.npz"), ValueError, "gone.npz"),
    ],
)
def test_wrong_adapters_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_nothing_to_adapt_is_an_error():
    backbone = keras.Sequential([keras.Input((4, 4, 2)), keras.layers.DepthwiseConv2D(3)])
    with pytest.raises(ValueError, match="layers=None, and the model has none"):
        adapted(backbone)


def test_adapters_of_another_model_are_refused(xy, tmp_path):
    lp.save_adapters(adapted(rank=2), tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"4 arrays that differ, first '0000_.*_lora_kernel_a'"):
        lp.load_adapters(adapted(rank=3), tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"junk" * 9, b""])
def test_what_is_no_file_of_adapters_is_named(xy, tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"Received: .*a\.npz.*Save it or copy it") as found:
        lp.load_adapters(adapted(), tmp_path / "a.npz")
    assert "pickle" not in str(found.value)


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_adapters_load_into_quantised_layers(xy, tmp_path, mode):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 10)).astype("float32")
    y = (x @ rng.normal(size=(10, 3))).argmax(1)
    backbone = keras.Sequential([keras.Input((10,)), keras.layers.Dense(128, "relu")])
    backbone.quantize(mode)
    model = adapted(backbone, rank=4)
    model.save(tmp_path / "before.keras")
    model.fit(x, y, epochs=5, verbose=0)
    lp.save_adapters(model, tmp_path / "a.npz")
    other = keras.models.load_model(tmp_path / "before.keras")
    expected = model.predict(x, verbose=0)
    assert np.abs(other.predict(x, verbose=0) - expected).max() > 0.1
    with pytest.warns(UserWarning, match="comes from a file"):  # of before the training, so rightly
        lp.load_adapters(other, tmp_path / "a.npz")
    np.testing.assert_allclose(other.predict(x, verbose=0), expected, atol=2e-5)
    kernel = other.layers[1].layers[0]._kernel
    assert kernel.dtype == "int8"  # the base is as it was
