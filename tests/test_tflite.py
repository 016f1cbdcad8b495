"""Exported files, run in the LiteRT runtime."""

from pathlib import Path

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.tflite import export as export_module

Interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter


def run(path, **inputs):
    runner = Interpreter(str(path)).get_signature_runner()
    return runner(**{name: np.asarray(x) for name, x in inputs.items()})


@pytest.fixture
def trained(mlp, digits):
    model = lp.transfer_model(mlp((64, 64)), [str(i) for i in range(10)], trainable="all")
    model.fit(*digits, epochs=5, verbose=0)
    return model


def test_the_file_gives_kerass_probabilities(trained, digits, tmp_path):
    path = tmp_path / "model.tflite"
    report = lp.export_tflite(trained, path)
    logits = trained.predict(digits[0][:20], verbose=0)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = [run(path, input=x[None])["predictions"][0] for x in digits[0][:20]]
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert report.size == path.stat().st_size
    assert report.max_difference < 1e-4
    assert report.top1_agreement == 1.0
    assert report.outputs_vary
    assert report.outputs == {"predictions": (1, 10)}
    assert "predictions[1, 10]; largest difference from Keras" in str(report)


@pytest.mark.parametrize(("quantization", "ratio"), [("float16", 0.5), ("dynamic", 0.25)])
def test_quantization_makes_the_file_smaller(mlp, tmp_path, quantization, ratio):
    model = lp.transfer_model(mlp((512, 512)), 10)
    full = lp.export_tflite(model, tmp_path / "full.tflite")
    small = lp.export_tflite(model, tmp_path / "small.tflite", quantization=quantization)
    assert small.size == pytest.approx(ratio * full.size, rel=0.1)
    assert small.max_difference > full.max_difference


def test_several_tasks_keep_their_names_and_activations(mlp, digits, tmp_path):
    tasks = {"zebra": 4, "ant": 4, "tags": lp.MultiLabel(3), "value": lp.Regression(2)}
    model = lp.multitask_model(mlp(), tasks)
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    assert report.outputs == {"zebra": (1, 4), "ant": (1, 4), "tags": (1, 3), "value": (1, 2)}
    x = digits[0][:1]
    outputs = run(tmp_path / "m.tflite", input=x)
    raw = {name: np.asarray(value) for name, value in model(x).items()}
    for name in ("zebra", "ant"):
        softmax = np.exp(raw[name]) / np.exp(raw[name]).sum()
        np.testing.assert_allclose(outputs[name], softmax, atol=1e-6)
    np.testing.assert_allclose(outputs["tags"], 1 / (1 + np.exp(-raw["tags"])), atol=1e-6)
    np.testing.assert_allclose(outputs["value"], raw["value"], atol=1e-5)


def test_a_pretrained_convolutional_model_takes_raw_pictures(tmp_path):
    model = lp.multitask_model(
        "MobileNet",
        {"a": 3},
        weights=None,
        input_shape=(32, 32, 3),
        backbone_kwargs={"alpha": 0.25},
    )
    # Untrained features do not vary: give BatchNormalization the statistics of a batch.
    for layer in model.layers[1].layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(np.random.default_rng(0).uniform(0, 255, (32, 32, 32, 3)), training=True)
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    assert report.outputs_vary
    assert report.max_difference < 1e-4


def test_named_inputs_and_ids(tmp_path):
    inputs = {
        "ids": keras.Input((5,), dtype="int32", name="ids"),
        "mask": keras.Input((5,), name="mask"),
    }
    x = keras.layers.Embedding(30, 4)(inputs["ids"]) * inputs["mask"][..., None]
    model = lp.transfer_model(keras.Model(inputs, x), 3)
    lp.export_tflite(model, tmp_path / "m.tflite")
    ids, mask = np.array([[1, 2, 3, 4, 5]], "int32"), np.array([[1, 1, 1, 0, 0]], "float32")
    logits = np.asarray(model({"ids": ids, "mask": mask}))
    outputs = run(tmp_path / "m.tflite", ids=ids, mask=mask)["predictions"]
    np.testing.assert_allclose(outputs, np.exp(logits) / np.exp(logits).sum(), atol=1e-6)


def test_a_recurrent_model_needs_no_flex_operations(tmp_path):
    backbone = keras.Sequential([keras.Input((5, 3)), keras.layers.GRU(4)])
    report = lp.export_tflite(lp.transfer_model(backbone, 3), tmp_path / "m.tflite")
    assert report.max_difference < 1e-4


def test_a_plain_keras_model_is_exported_as_it_is(tmp_path):
    inputs = keras.Input((3,), name="x")
    classes = keras.layers.Dense(4, activation="softmax", name="classes")(inputs)
    values = keras.layers.Dense(2, name="values")(inputs)
    model = keras.Model(inputs, [classes, values, values])
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    assert report.outputs == {"classes": (1, 4), "values": (1, 2), "values_2": (1, 2)}
    assert report.top1_agreement == 1.0
    x = np.array([[1.0, 2.0, 3.0]], "float32")
    outputs = run(tmp_path / "m.tflite", x=x)
    for name, expected in zip(report.outputs, model(x), strict=True):
        np.testing.assert_allclose(outputs[name], expected, atol=1e-6)


@pytest.mark.parametrize("wrap", ["softmax", "list", "dict"])
def test_a_model_around_ours_gives_what_keras_gives(mlp, digits, tmp_path, wrap):
    """A softmax is added to the logits of a head, and only where they are the output."""
    inner = lp.transfer_model(mlp(), 3)
    if wrap == "softmax":
        model = keras.Model(inner.input, keras.layers.Softmax(name="p")(inner.output))
    elif wrap == "list":
        model = keras.Model(inner.input, [inner.output, inner.get_layer("mlp").output])
    else:
        model = keras.Model(inner.input, {"p": inner.output})
    lp.export_tflite(model, tmp_path / "m.tflite")
    x = digits[0][:1]
    outputs = run(tmp_path / "m.tflite", input=x)
    logits = np.asarray(inner(x), "float64")
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(
        outputs["p" if wrap != "list" else "predictions"], expected, atol=1e-6
    )


def test_a_regression_has_no_top1(mlp, tmp_path):
    model = lp.transfer_model(mlp(), lp.Regression(3))
    assert lp.export_tflite(model, tmp_path / "m.tflite").top1_agreement is None


def test_outputs_that_do_not_vary_prove_nothing(mlp, tmp_path):
    model = lp.transfer_model(mlp(), 3)
    model.get_layer("predictions").kernel.assign(np.zeros((16, 3)))
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    assert not report.outputs_vary
    assert "cannot be verified" in str(report)


def test_an_operation_outside_the_builtin_ones_is_refused_and_leaves_no_file(tmp_path):
    class Beta(keras.layers.Layer):
        def call(self, x):
            import tensorflow as tf

            return tf.math.betainc(x, x, x)

    model = keras.Sequential([keras.Input((3,)), Beta(), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"builtin operations.*Betainc"):
        lp.export_tflite(model, tmp_path / "m.tflite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["comparison", "write"])
def test_a_failure_leaves_the_old_file(trained, tmp_path, monkeypatch, fails):
    path = tmp_path / "m.tflite"
    lp.export_tflite(trained, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    if fails == "comparison":
        monkeypatch.setattr(export_module, "_run", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        lp.export_tflite(trained, path, quantization="float16")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_exports_are_refused(mlp, tmp_path):
    model = lp.transfer_model(mlp(), 3)
    with pytest.raises(ValueError, match=r"one of \[None, 'dynamic', 'float16'\]"):
        lp.export_tflite(model, tmp_path / "m.tflite", quantization="int4")
    with pytest.raises(TypeError, match="takes a Keras model"):
        lp.export_tflite("model.h5", tmp_path / "m.tflite")
    with pytest.raises(ValueError, match="knows its inputs"):
        lp.export_tflite(keras.Sequential([keras.layers.Dense(2)]), tmp_path / "m.tflite")
    free = lp.transfer_model(keras.Sequential([keras.Input((None, 3)), keras.layers.GRU(2)]), 2)
    with pytest.raises(ValueError, match=r"\(None, None, 3\).*`input_shape`"):
        lp.export_tflite(free, tmp_path / "m.tflite")
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = lp.transfer_model(mlp(), 3)
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ValueError, match="bfloat16"):
        lp.export_tflite(mixed, tmp_path / "m.tflite")
    with pytest.raises(ValueError, match="the folder"):
        lp.export_tflite(model, tmp_path)
    inputs = keras.Input((3,), name="my input")
    with pytest.raises(ValueError, match="'my input'"):
        lp.export_tflite(keras.Model(inputs, keras.layers.Dense(2)(inputs)), tmp_path / "m.tflite")


def test_without_the_runtime_the_error_says_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r"keras_lp\[phone\]"):
        lp.export_tflite(trained, tmp_path / "m.tflite")
