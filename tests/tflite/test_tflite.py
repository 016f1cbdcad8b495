"""Exported files of every kind of model, run in the LiteRT runtime."""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.federated.engine import installation
from keras_lp.tflite.export import export as export_module

Interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter


def run(path, **inputs):
    runner = Interpreter(str(path)).get_signature_runner()
    return runner(**{name: np.asarray(x) for name, x in inputs.items()})


def softmax(logits):
    exponentials = np.exp(np.asarray(logits, "float64"))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def trained(digits):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, "relu", name=f"block{i}") for i in range(2)]
    backbone = keras.Sequential([keras.Input((64,)), *layers], name="mlp")
    model = lp.transfer_model(
        backbone, [str(i) for i in range(10)], pretrained=False, trainable="all"
    )
    model.fit(*digits, epochs=10, verbose=0)
    return model


@pytest.fixture(scope="module")
def several(digits):
    """A trained model of four tasks; labels of "ant" and "zebra" differ, their shapes do not."""
    keras.utils.set_random_seed(0)
    tasks = {"zebra": 4, "ant": 4, "tags": lp.MultiLabel(3), "value": lp.Regression(2)}
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, "relu")])
    model = lp.multitask_model(backbone, tasks, pretrained=False, trainable="all")
    x, y = digits
    labels = {
        "zebra": y % 4,
        "ant": y // 3,
        "tags": np.stack([y % 2, y % 3 == 0, y > 4], axis=1).astype("int32"),
        "value": np.stack([y, 1e4 + 1e3 * y], axis=1).astype("float32"),
    }
    model.fit(x, labels, epochs=10, verbose=0)
    return model, labels


def recurrent(cell):
    ids = keras.Input((6,), dtype="int32", name="ids")
    x = cell(keras.layers.Embedding(30, 8, mask_zero=True)(ids))
    return lp.transfer_model(keras.Model(ids, x), 3)


# What the file computes


def test_the_file_gives_kerass_probabilities(trained, digits, tmp_path):
    path = tmp_path / "model.tflite"
    report = lp.export_tflite(trained, path)
    expected = softmax(trained.predict(digits[0][:20], verbose=0))
    rows = [run(path, input=x[None])["predictions"][0] for x in digits[0][:20]]
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert report.size == path.stat().st_size
    assert report.outputs == {"predictions": (1, 10)}


def test_quantization_makes_the_file_smaller(mlp, tmp_path):
    model = lp.transfer_model(mlp((512, 512)), 10)
    sizes = {}
    for quantization in (None, "float16", "dynamic"):
        path = tmp_path / "m.tflite"
        report = lp.export_tflite(model, path, quantization=quantization, verify=False)
        sizes[quantization] = report.size
    assert sizes["float16"] == pytest.approx(sizes[None] / 2, rel=0.1)
    assert sizes["dynamic"] == pytest.approx(sizes[None] / 4, rel=0.1)


def test_int8_computes_in_8_bits_and_takes_what_the_model_takes(trained, digits, tmp_path):
    path = tmp_path / "m.tflite"
    x = tf.data.Dataset.from_tensor_slices(digits).batch(50)
    report = lp.export_tflite(trained, path, quantization="int8", calibration_data=x)
    assert report.contents.int8_operations == 4  # three Dense, a softmax
    assert "int8 in 4 of 4 operations" in str(report)
    assert report.verified_on == "calibration_data"
    outputs = run(path, input=digits[0][:1])["predictions"]
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, softmax(trained(digits[0][:1])), atol=0.05)


def test_several_tasks_keep_their_names_and_activations(several, digits, tmp_path):
    model, _ = several
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    assert set(report.outputs) == {"zebra", "ant", "tags", "value"}
    x = digits[0][:1]
    outputs = run(tmp_path / "m.tflite", input=x)
    raw = {name: np.asarray(value) for name, value in model(x).items()}
    for name in ("zebra", "ant"):
        np.testing.assert_allclose(outputs[name], softmax(raw[name]), atol=1e-6)
    np.testing.assert_allclose(outputs["tags"], 1 / (1 + np.exp(-raw["tags"])), atol=1e-6)
    np.testing.assert_allclose(outputs["value"], raw["value"], rtol=1e-5)
    assert 5e3 < outputs["value"][0, 1] < 2e4  # the units of the labels


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
    np.testing.assert_allclose(outputs, softmax(logits), atol=1e-6)


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_a_recurrent_text_model_needs_no_flex_operations(tmp_path, cell):
    model = recurrent(getattr(keras.layers, cell)(4))
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    assert "WHILE" in report.contents.operations
    ids = np.array([[3, 29, 7, 0, 0, 0]], "int32")
    outputs = run(tmp_path / "m.tflite", ids=ids)["predictions"]
    np.testing.assert_allclose(outputs, softmax(model(ids)), atol=1e-6)


def test_int8_of_a_recurrent_model_has_no_loop(tmp_path):
    model = recurrent(keras.layers.Bidirectional(keras.layers.GRU(4)))
    ids = np.random.default_rng(0).integers(1, 30, (100, 6)).astype("int32")
    report = lp.export_tflite(
        model, tmp_path / "m.tflite", quantization="int8", calibration_data=ids, tolerance=0.5
    )
    assert "WHILE" not in report.contents.operations
    outputs = run(tmp_path / "m.tflite", ids=ids[:1])["predictions"]
    np.testing.assert_allclose(outputs, softmax(model(ids[:1])), atol=0.02)


def test_int8_refuses_another_loop(tmp_path):
    """The converter would end the process."""

    class Loop(keras.layers.Layer):
        def call(self, x):
            return tf.while_loop(lambda x: tf.reduce_sum(x) < 1e3, lambda x: (2 * x + 1,), (x,))[0]

    model = keras.Sequential([keras.Input((3,)), Loop(name="doubling"), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"one in 'doubling'.*\"dynamic\""):
        lp.export_tflite(
            model, tmp_path / "m.tflite", quantization="int8", calibration_data=np.ones((4, 3))
        )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_another_precision_is_exported_from_a_float32_copy(digits, tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((8, 8))
        x = keras.layers.Bidirectional(keras.layers.GRU(4))(inputs)
        x = keras.layers.Dense(8, "relu")(keras.layers.BatchNormalization()(x))
        model = lp.transfer_model(keras.Model(inputs, x * 2), 3)
    finally:
        keras.config.set_dtype_policy("float32")
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    x = digits[0][:1].reshape(1, 8, 8)
    outputs = run(tmp_path / "m.tflite", input=x)["predictions"]
    np.testing.assert_allclose(outputs, softmax(model(x)), atol=1e-2)
    assert report.copied_from
    assert "float32 copy" in str(report)
    assert {layer.compute_dtype for layer in model._flatten_layers()} >= set(report.copied_from)


def test_adapters_are_folded_in(mlp, digits, tmp_path):
    model = lp.transfer_model(mlp((64, 64)), 10)
    plain = lp.export_tflite(model, tmp_path / "plain.tflite", verify=False)
    model = lp.finetune_model(model, lora=lp.LoRA(rank=4), learning_rate=1e-2)
    model.fit(*digits, epochs=2, verbose=0)
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    assert report.size == pytest.approx(plain.size, rel=0.02)
    outputs = run(tmp_path / "m.tflite", input=digits[0][:1])["predictions"]
    np.testing.assert_allclose(outputs, softmax(model(digits[0][:1])), atol=1e-5)


@pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
def test_a_federated_model_gives_what_the_federation_evaluates(mlp, digits, tmp_path):
    model = lp.transfer_model(mlp(), 10, trainable="all", optimizer="sgd", learning_rate=0.5)
    clients = lp.partition(digits, clients=4)
    federated = lp.FederatedAveraging(model)
    federated.fit(clients, rounds=5, verbose=0)
    expected = federated.evaluate(clients)["accuracy"]
    report = lp.export_tflite(federated.model, tmp_path / "m.tflite", verification_data=digits)
    (one,) = report.comparisons.values()
    assert one.scores == pytest.approx((expected, expected), abs=1e-6)
    assert expected > 0.3  # it has learned something


def test_a_keras_file_in_place_of_a_model(trained, tmp_path):
    trained.save(tmp_path / "m.keras")
    lp.export_tflite(trained, tmp_path / "a.tflite", verify=False)
    lp.export_tflite(tmp_path / "m.keras", tmp_path / "b.tflite", verify=False)
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()


def test_batches_of_one_size(trained, digits, tmp_path):
    x = digits[0][:11]
    report = lp.export_tflite(trained, tmp_path / "m.tflite", batch_size=4, verification_data=x)
    assert report.outputs == {"predictions": (4, 10)}
    assert report.examples == 11
    assert "a call of 4 examples" in str(report)
    outputs = run(tmp_path / "m.tflite", input=x[:4])["predictions"]
    np.testing.assert_allclose(outputs, softmax(trained(x[:4])), atol=1e-6)


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
    lp.export_tflite(model, tmp_path / "m.tflite", verify=False)
    x = digits[0][:1]
    outputs = run(tmp_path / "m.tflite", input=x)
    np.testing.assert_allclose(
        outputs["p" if wrap != "list" else "predictions"], softmax(inner(x)), atol=1e-6
    )


# What is refused


class Beta(keras.layers.Layer):
    def call(self, x):
        return tf.math.betainc(x, x, x)


def test_an_operation_outside_the_builtin_ones_is_named_with_its_layer(tmp_path):
    inner = keras.Sequential([keras.Input((3,)), Beta(name="ratio")], name="inner")
    model = keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"builtin operations.*Betainc in layer 'ratio'"):
        lp.export_tflite(model, tmp_path / "m.tflite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["comparison", "write"])
def test_a_failure_leaves_the_old_file(trained, tmp_path, monkeypatch, fails):
    path = tmp_path / "m.tflite"
    lp.export_tflite(trained, path, verify=False)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    if fails == "comparison":
        monkeypatch.setattr(export_module, "compare", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        lp.export_tflite(trained, path, quantization="float16")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_models_are_refused(mlp, tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(TypeError, match="takes a Keras model"):
        lp.export_tflite(np.ones(3), path)
    with pytest.raises(ValueError, match=r"`.keras` file.*'model.h5', which does not exist"):
        lp.export_tflite("model.h5", path)
    with pytest.raises(ValueError, match="with known inputs"):
        lp.export_tflite(keras.Sequential([keras.layers.Dense(2)]), path)
    free = lp.transfer_model(keras.Sequential([keras.Input((None, 3)), keras.layers.GRU(2)]), 2)
    with pytest.raises(ValueError, match=r"\(None, None, 3\).*`input_shape`"):
        lp.export_tflite(free, path)
    inputs = keras.Input((3,), name="my input")
    with pytest.raises(ValueError, match="'my input'"):
        lp.export_tflite(keras.Model(inputs, keras.layers.Dense(2)(inputs)), path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"quantization": "int4"}, r"one of \[None, 'dynamic', 'float16', 'int8'\]"),
        ({"quantization": "int8"}, "without calibration_data"),
        ({"calibration_data": np.ones((2, 64))}, "with calibration_data"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"tolerance": 2}, "tolerance=2"),
        ({"tolerance": 0.1, "verify": False}, "verify=False"),
    ],
)
def test_wrong_options_are_refused(mlp, tmp_path, options, error):
    with pytest.raises(ValueError, match=error):
        lp.export_tflite(lp.transfer_model(mlp(), 3), tmp_path / "m.tflite", **options)


def test_a_folder_is_no_file_to_write(mlp, tmp_path):
    with pytest.raises(ValueError, match="the folder"):
        lp.export_tflite(lp.transfer_model(mlp(), 3), tmp_path)


def test_without_the_runtime_the_error_says_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r"keras_lp\[phone\]"):
        lp.export_tflite(trained, tmp_path / "m.tflite")
    assert lp.export_tflite(trained, tmp_path / "m.tflite", verify=False).max_difference is None


@keras.saving.register_keras_serializable("tests")
class Erf(keras.layers.Layer):
    def call(self, x):
        return keras.ops.erf(x)


def words_network():
    layer = keras.layers.TextVectorization(max_tokens=9, output_sequence_length=4, name="words")
    layer.adapt(["good movie"])
    return keras.Sequential([keras.Input((1,), dtype="string"), layer, keras.layers.Dense(1)])


REFUSED = {
    "bicubic": lambda: keras.Sequential(
        [keras.Input((8, 9, 3)), keras.layers.Resizing(5, 4, "bicubic", name="smaller")]
    ),
    "area": lambda: keras.Sequential(
        [keras.Input((8, 9, 3)), keras.layers.Resizing(5, 4, "area", name="smaller")]
    ),
    "erf": lambda: keras.Sequential(
        [keras.Input((4,)), Erf(name="smaller"), keras.layers.Dense(2)]
    ),
    "words": words_network,
}


@pytest.mark.parametrize("name", REFUSED)
def test_operations_that_phones_lack_are_named_with_their_layer(name, tmp_path):
    layer = "words" if name == "words" else "smaller"
    with pytest.raises(ValueError, match=rf"Received: model .* in layer .*'{layer}'") as found:
        lp.export_tflite(REFUSED[name](), tmp_path / "m.tflite")
    assert "MLIR" not in str(found.value)
    assert len(str(found.value)) < 600
    assert not list(tmp_path.iterdir())
