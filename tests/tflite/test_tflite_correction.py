"""Heads that make up for what 8 bits shift."""

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.tflite.export import int8
from keras_lp.tflite.export.convert import convert
from keras_lp.tflite.export.correction import affine_map
from keras_lp.tflite.export.verify import load, run_all
from keras_lp.tflite.flatbuffer import read_model, write_model
from keras_lp.tflite.interface import describe

pytest.importorskip("ai_edge_litert.interpreter")


def test_an_affine_change_of_outputs_is_found():
    wanted = np.random.default_rng(0).normal(size=(20_000, 3))
    matrix = np.array([[1.2, 0.1, 0.0], [0.0, 0.9, 0.0], [0.0, -0.2, 1.0]])
    shift = np.array([0.5, 0.0, -1.0])
    found, found_shift = affine_map((wanted - shift) @ np.linalg.inv(matrix), wanted)
    np.testing.assert_allclose(found, matrix, atol=2e-3)
    np.testing.assert_allclose(found_shift, shift, atol=2e-3)


def test_few_examples_change_little():
    given = np.array([[1.0, 0.0], [0.0, 1.0]])
    matrix, shift = affine_map(given, given + 1.2)
    np.testing.assert_allclose(shift, 0.2, atol=1e-12)  # 2 examples against 10
    np.testing.assert_allclose(matrix, np.eye(2), atol=1e-12)


def sequence_head():
    backbone = keras.Sequential([keras.Input((5, 4)), keras.layers.Dense(6, "relu")])
    return lp.transfer_model(backbone, 3, pooling=None, trainable="all")


def head(task):
    backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6, "tanh")])
    return lp.transfer_model(backbone, task, trainable="all")


MODELS = {
    "classes": lambda: head(3),
    "labels": lambda: head(lp.MultiLabel(3)),
    "values": lambda: head(lp.Regression(3, mean=[0, 100, 1e4], std=[1, 20, 1e3])),
    "sequence": sequence_head,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_of_a_file_gives_the_map_of_its_output(name):
    """In the float32 file, where nothing is rounded."""
    model = MODELS[name]()
    described = describe(model)
    matrix, shift = np.array([[1.1, 0, 0], [0, 0.9, 0.1], [0, 0, 1]]), np.array([1.0, 0, 3])
    file = read_model(convert(described))
    found = int8._last_layers(file, list(int8._layers(file)), ["predictions"])
    layer = found["predictions"]
    layer.apply(matrix, shift)
    int8._set_constant(file, layer, 1, layer.weights[:, 0, 0])
    int8._set_bias(file, layer, layer.bias)
    x = np.random.default_rng(0).normal(size=(20, *model.input_shape[1:])).astype("float32")
    given = run_all(load(write_model(file), described.input_names), [x], 1)["predictions"]
    expected = described.outputs[0].activate(np.asarray(model(x)) @ matrix + shift)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_every_task_gets_its_own_map(mlp, digits, monkeypatch):
    """The file gives its outputs in another order than the model."""
    model = lp.multitask_model(mlp(), {"zebra": 3, "ant": 3})
    matched = []
    monkeypatch.setattr(
        int8,
        "affine_map",
        lambda given, wanted: matched.append((given, wanted)) or (np.eye(3), np.zeros(3)),
    )
    x = digits[0][:20]
    convert(describe(model), "int8", [x])
    logits = model.predict(x, verbose=0)
    assert len(matched) == 2
    for given, wanted in matched:
        np.testing.assert_allclose(given, wanted, atol=0.1)
    for name in ("zebra", "ant"):
        assert any(np.allclose(wanted, logits[name], atol=1e-4) for _, wanted in matched)
    assert np.abs(matched[0][1] - matched[1][1]).max() > 0.3


@pytest.mark.parametrize("name", ["no head", "relu"])
def test_what_is_no_linear_head_is_not_corrected(monkeypatch, name):
    monkeypatch.setattr(int8, "affine_map", lambda *_: pytest.fail("corrected"))
    activation = "relu" if name == "relu" else None
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation, name="out")])
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    content = convert(describe(model))
    heads = ["out"] if name == "relu" else []
    int8.quantize(content, [{"input": one[None]} for one in x], heads)


def test_an_export_leaves_the_weights_of_the_model_alone(mlp, digits, tmp_path):
    model = lp.transfer_model(mlp(), 10)
    lp.fit_head(model, digits, verbose=0)
    before = model.get_weights()
    lp.export_tflite(
        model, tmp_path / "m.tflite", quantization="int8", calibration_data=digits[0][:50]
    )
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_outputs_of_one_head_are_corrected_once(monkeypatch):
    x = keras.Input((3,), name="input")
    y = keras.layers.Dense(2, name="out")(x)
    model = keras.Model(x, {"a": y, "b": y})
    file = read_model(convert(describe(model)))
    found = int8._last_layers(file, list(int8._layers(file)), ["a", "b"])
    assert len(found) == 1
