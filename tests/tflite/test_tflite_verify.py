"""The comparison of a file with Keras: what it measures, and what it finds out."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.lite.tools import flatbuffer_utils

import keras_lp as lp
from keras_lp.tflite.export import export as export_module
from keras_lp.tflite.export import verify
from keras_lp.tflite.export.examples import generate_examples, read_examples
from keras_lp.tflite.export.verify import Tolerance
from keras_lp.tflite.interface import Output, describe, vocabulary_sizes
from tests.conftest import with_random_heads

pytest.importorskip("ai_edge_litert.interpreter")

CLASSES = Output("c", None, "linear", "classes")
LABELS = Output("l", None, "linear", "labels")
VALUES = Output("v", None, "linear", "values")
FLOAT32, FLOAT16, INT8 = (Tolerance.of(q, None) for q in (None, "float16", "int8"))


@pytest.fixture(scope="module")
def model(digits):
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, "relu")])
    model = lp.transfer_model(backbone, 10, pretrained=False, trainable="all")
    model.fit(*digits, epochs=20, verbose=0)
    return model


def off(monkeypatch, change):
    """Makes the file compute something else than it should."""
    load = verify.load

    def changed(content, names):
        run = load(content, names)
        return lambda batch: {name: change(value) for name, value in run(batch).items()}

    monkeypatch.setattr(export_module, "load", changed)


# What it measures


def test_answers_of_labels_are_those_above_their_thresholds():
    task = lp.MultiLabel(2, thresholds=[0.2, 0.9])
    values = np.array([[0.3, 0.8], [0.1, 0.95]])
    decided = Output("l", task, "sigmoid", "labels").decide(values)
    assert decided.tolist() == [[True, False], [False, True]]
    assert LABELS.decide(values).tolist() == [[False, True], [False, True]]


def test_accuracy_of_both_with_labels(model, digits, tmp_path):
    x, y = digits
    y = np.where(np.arange(200) % 2, y, -1)  # half of them are missing
    report = lp.export_tflite(model, tmp_path / "m.tflite", verification_data=(x, y))
    expected = np.mean(model.predict(x, verbose=0).argmax(-1)[1::2] == y[1::2])
    assert report.comparisons["predictions"].scores == pytest.approx((expected, expected))
    assert report.verified_on == "verification_data"
    assert f"accuracy {expected:.2%}, in Keras {expected:.2%}" in str(report)
    assert "compared with Keras on 200 examples of verification_data" in str(report)


def test_generated_inputs_are_told(model, tmp_path):
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    assert report.verified_on == "generated inputs"
    assert "64 examples of generated inputs" in str(report)


def test_latency_is_measured_in_milliseconds(model, tmp_path):
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    median, p95 = report.latency
    assert 0 < median <= p95
    median, _ = verify.latency(lambda batch: time.sleep(0.02), [np.ones((1, 1))], 1)
    assert median == pytest.approx(20, rel=0.3)


def test_scores_by_hand():
    ours = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    theirs = ours[:, ::-1].copy()
    theirs[0] = ours[0]
    labels = np.array([0, 1, -1, 0])
    one = verify._compare(CLASSES, ours, theirs, labels, INT8)
    assert one.agreement == 0.25
    assert one.scores == pytest.approx((2 / 3, 2 / 3))  # right: 0, 1; and 0, 3
    assert one.difference == pytest.approx(0.6)
    entries = np.array([[1, 0], [0, -1], [1, 1], [-1, -1]])  # five are there
    one = verify._compare(LABELS, ours, theirs, entries, INT8)
    assert one.scores == pytest.approx((4 / 5, 3 / 5))
    values = np.array([[1.0], [2.0], [np.nan], [5.0]])
    one = verify._compare(VALUES, np.zeros((4, 1)), np.ones((4, 1)), values, INT8)
    assert one.scores == pytest.approx((8 / 3, 5 / 3))


def test_labels_that_do_not_fit_the_output_give_no_score():
    logits = np.eye(3)
    assert verify._compare(VALUES, logits, logits, np.arange(3), INT8).scores is None
    assert verify._compare(CLASSES, logits, logits, np.full(3, -1), INT8).scores is None
    assert verify._compare(CLASSES, logits, logits, np.eye(3), INT8).scores == (1.0, 1.0)


def test_values_are_compared_as_a_share_of_the_range_of_each_entry():
    ours = np.stack([np.linspace(0, 1, 11), np.linspace(0, 1000, 11)], axis=1)
    theirs = ours + np.array([0.1, 0.0])
    error = verify._compare(VALUES, ours, theirs, None, FLOAT32).error
    assert error == pytest.approx(0.1)
    error = verify._compare(VALUES, ours, theirs, None, INT8).error
    assert error == pytest.approx(0.05)


# What it finds out


@pytest.mark.parametrize(
    ("quantization", "bad", "good"), [(None, 2e-4, 5e-5), ("float16", 0.02, 5e-3)]
)
def test_a_file_too_far_from_keras_is_refused(
    model, tmp_path, monkeypatch, quantization, bad, good
):
    path = tmp_path / "m.tflite"
    off(monkeypatch, lambda value: value + bad)
    with pytest.raises(ValueError, match=r"output 'predictions', largest difference .*generated"):
        lp.export_tflite(model, path, quantization=quantization)
    assert list(tmp_path.iterdir()) == []
    lp.export_tflite(model, path, quantization=quantization, tolerance=0.03)
    path.unlink()
    monkeypatch.undo()
    off(monkeypatch, lambda value: value + good)
    lp.export_tflite(model, path, quantization=quantization)


def test_quantized_classes_must_agree(model, digits, tmp_path, monkeypatch):
    off(monkeypatch, lambda value: np.roll(value, 1, axis=-1))
    options = {"quantization": "dynamic", "verification_data": digits[0]}
    with pytest.raises(ValueError, match=r"agree .* at least 0.9 .* top-1 agreement 0.0%"):
        lp.export_tflite(model, tmp_path / "m.tflite", **options)


def test_quantized_values_must_be_near_on_the_mean(mlp, digits, tmp_path, monkeypatch):
    model = with_random_heads(lp.transfer_model(mlp(), lp.Regression(1, mean=100, std=10)))
    spread = np.ptp(model.predict(digits[0], verbose=0))
    options = {"quantization": "dynamic", "verification_data": digits[0]}
    off(monkeypatch, lambda value: value + 0.03 * spread)
    report = lp.export_tflite(model, tmp_path / "m.tflite", **options)
    assert report.top1_agreement is None
    monkeypatch.undo()
    off(monkeypatch, lambda value: value + 0.1 * spread)
    with pytest.raises(ValueError, match=r"at most 0.05 of the range of the values on average"):
        lp.export_tflite(model, tmp_path / "n.tflite", **options)


def test_nan_is_refused(model, tmp_path, monkeypatch):
    off(monkeypatch, lambda value: value * np.nan)
    for quantization in (None, "dynamic"):
        with pytest.raises(ValueError, match="largest difference nan"):
            lp.export_tflite(model, tmp_path / "m.tflite", quantization=quantization)


def test_nineteen_of_twenty_are_enough():
    ours = np.eye(2)[np.arange(20) % 2]
    for wrong, tolerance in ((1, Tolerance.of("int8", 0.95)), (2, INT8)):  # 18 by default
        theirs = ours.copy()
        theirs[:wrong] = theirs[:wrong, ::-1]
        one = verify._compare(CLASSES, ours, theirs, None, tolerance)
        assert one.error <= one.allowed
        theirs[wrong] = theirs[wrong, ::-1]
        one = verify._compare(CLASSES, ours, theirs, None, tolerance)
        assert not one.error <= one.allowed


def test_outputs_that_do_not_vary_prove_nothing(mlp, tmp_path):
    model = lp.transfer_model(mlp(), 3)
    model.get_layer("predictions").kernel.assign(np.zeros((16, 3)))
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    assert not report.outputs_vary
    assert "cannot be verified" in str(report)


def test_outputs_vary_where_no_constant_would_pass():
    tiny = 0.5 + np.array([[1e-4, -1e-4], [-1e-4, 1e-4]])  # half of it is within 1e-4
    assert not verify._compare(CLASSES, tiny, tiny, None, FLOAT32).varies
    enough = 0.5 + 2 * (tiny - 0.5)
    assert verify._compare(CLASSES, enough, enough, None, FLOAT32).varies
    assert not verify._compare(CLASSES, enough, enough, None, FLOAT16).varies
    classes = np.eye(2)[[0] * 18 + [1] * 2]  # one that always says 0 agrees on 0.9
    assert not verify._compare(CLASSES, classes, classes, None, INT8).varies
    classes = np.eye(2)[[0] * 17 + [1] * 3]
    assert verify._compare(CLASSES, classes, classes, None, INT8).varies
    values = np.linspace(0, 1, 9)[:, None]
    assert verify._compare(VALUES, values, values, None, INT8).varies


# What it is verified on


def text_model(ids):
    x = keras.layers.Embedding(50, 4, mask_zero=True, name="tokens")(ids)
    return keras.layers.GlobalAveragePooling1D()(x)


def test_generated_ids_go_up_to_the_embedding_and_end_in_padding():
    """Ids of 0 and 1 leave a masked mean with one value or none."""
    ids, segments = (keras.Input((9,), dtype="int32", name=name) for name in ("ids", "segments"))
    x = text_model(ids) + keras.layers.GlobalAveragePooling1D()(
        keras.layers.Embedding(3, 4)(keras.layers.Reshape((9,))(segments))
    )
    model = lp.transfer_model(keras.Model([ids, segments], x), 3)
    assert vocabulary_sizes(model) == {0: 50, 1: 3}
    texts, parts = generate_examples(describe(model)).inputs
    assert texts.max() == 49
    assert parts.max() == 2
    assert (texts[:, 0] > 0).all()
    assert (np.diff((texts == 0).astype(int), axis=1) >= 0).all()
    assert 0.2 < (texts == 0).mean() < 0.8


def test_a_text_model_is_verified_on_generated_ids(tmp_path):
    ids = keras.Input((9,), dtype="int32")
    model = with_random_heads(lp.transfer_model(keras.Model(ids, text_model(ids)), 3))
    report = lp.export_tflite(model, tmp_path / "m.tflite")
    assert report.outputs_vary


@pytest.mark.parametrize("form", ["dataset", "pair", "dict"])
def test_forms_of_examples(form):
    inputs = {"b": keras.Input((2,), name="b"), "a": keras.Input((3,), name="a")}
    joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    model = keras.Model(inputs, keras.layers.Dense(2, name="out")(joined))
    x = {"a": np.arange(15).reshape(5, 3), "b": np.arange(10).reshape(5, 2)}
    y = np.arange(10).reshape(5, 2)
    data = {
        "dataset": lambda: tf.data.Dataset.from_tensor_slices((x, y)).batch(2),
        "pair": lambda: (x, {"out": y}),
        "dict": lambda: x,
    }[form]()
    examples = read_examples(describe(model), data, "verification_data")
    np.testing.assert_array_equal(examples.inputs[0], x["a"])
    np.testing.assert_array_equal(examples.inputs[1], x["b"])
    assert examples.inputs[0].dtype == np.float32
    assert set(examples.labels) == (set() if form == "dict" else {"out"})


def test_calibration_examples_are_spread_evenly():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    data = (np.arange(1000)[:, None], np.arange(1000))
    thinned = read_examples(describe(model), data, "calibration_data").thinned(4)
    np.testing.assert_array_equal(thinned.inputs[0][:, 0], [0, 333, 666, 999])
    np.testing.assert_array_equal(next(iter(thinned.labels.values())), [0, 333, 666, 999])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (np.ones((4, 63)), r"shape \(64,\).*\(4, 63\)"),
        (np.ones((0, 64)), r"\[0\] examples"),
        (np.full((4, 64), np.nan), "finite"),
        ((np.ones((4, 64)), np.zeros(3)), "a label for each of its 4"),
        ((np.ones((4, 64)), np.full(4, 7)), "from 0 to 2"),
        ((np.ones((4, 64)), {"prediction": np.zeros(4)}), "Did you mean 'predictions'"),
        (tf.data.Dataset.from_tensors(np.ones((4, 64))).repeat(), "endless"),
    ],
)
def test_examples_that_do_not_fit_are_refused(mlp, data, error):
    with pytest.raises(ValueError, match=error):
        read_examples(describe(lp.transfer_model(mlp(), 3)), data, "verification_data")


# The default of quantized files


def test_a_file_that_is_more_accurate_is_accepted():
    """30.5 against 24.0 %, an agreement of a half: nothing is lost."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 200)
    ours, theirs = (rng.dirichlet(np.ones(10), 200) for _ in range(2))
    better = rng.random(200) < 0.3
    theirs[better] = 0.9 * np.eye(10)[labels[better]] + 0.01
    one = verify._compare(CLASSES, ours, theirs, labels, INT8)
    assert one.scores[1] > one.scores[0]
    assert one.error <= one.allowed


@pytest.mark.parametrize(("count", "accepted"), [(100, True), (5000, False)])
def test_a_loss_is_one_where_chance_does_not_explain_it(count, accepted):
    """Three points less: within the interval of 100 examples, not of 5,000."""
    ours = np.eye(2)[np.zeros(count, int)]
    theirs = ours.copy()
    lost, won = int(0.04 * count), int(0.01 * count)
    theirs[:lost] = theirs[:lost, ::-1]
    ours[-won:] = ours[-won:, ::-1]
    one = verify._compare(CLASSES, ours, theirs, np.zeros(count, int), INT8)
    change = np.array([1] * lost + [-1] * won + [0] * (count - lost - won))
    expected = change.mean() - 1.645 * change.std() / np.sqrt(count)
    assert one.error == pytest.approx(expected)
    assert (one.error <= one.allowed) == accepted


def test_answers_that_are_nearly_tied_do_not_count():
    rng = np.random.default_rng(0)
    ours = 0.1 + 0.002 * rng.uniform(-1, 1, (100, 10))
    theirs = 0.1 + 0.002 * rng.uniform(-1, 1, (100, 10))
    one = verify._compare(CLASSES, ours, theirs, None, INT8)
    assert one.agreement < 0.5
    assert one.error <= one.allowed
    assert not one.varies  # and it proves nothing
    clear = np.full((100, 10), 0.05) + 0.5 * np.eye(10)[rng.integers(0, 10, 100)]
    one = verify._compare(CLASSES, clear, np.roll(clear, 1, axis=1), None, INT8)
    assert not one.error <= one.allowed
    half = 0.5 + 0.4 * np.sign(rng.normal(size=(100, 3)))  # labels, all clear
    assert not verify._compare(LABELS, half, half[::-1], None, INT8).error <= 1


def test_probabilities_must_be_near_on_the_mean():
    ours = np.tile([0.9, 0.1], (50, 1))
    for difference, accepted in ((0.13, True), (0.17, False)):
        theirs = np.tile([0.9 - difference, 0.1 + difference], (50, 1))
        one = verify._compare(CLASSES, ours, theirs, None, INT8)
        assert one.agreement == 1
        assert (one.error <= one.allowed) == accepted


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("quantization", ["dynamic", "int8", "float16"])
def test_a_file_with_broken_weights_is_refused(
    labelled, quantization, digits, tmp_path, monkeypatch
):
    """Real digits, a trained network, and the largest buffer of the file in disorder."""
    x, y = digits
    layers = [keras.Input((64,)), keras.layers.Dense(32, "relu")]
    model = lp.transfer_model(
        keras.Sequential(layers), 10, pretrained=False, trainable="all", learning_rate=0.01
    )
    model.fit(x, y, epochs=15, verbose=0)
    options = {"quantization": quantization, "verification_data": (x, y) if labelled else x}
    if quantization == "int8":
        options["calibration_data"] = x
    lp.export_tflite(model, tmp_path / "good.tflite", **options)
    whole = export_module._converted

    def broken(*arguments):
        content = whole(*arguments)
        parsed = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
        largest = max(
            (one for one in parsed.buffers if one.data is not None), key=lambda one: len(one.data)
        )
        largest.data = np.random.default_rng(0).permutation(np.asarray(largest.data))
        return bytes(flatbuffer_utils.convert_object_to_bytearray(parsed))

    monkeypatch.setattr(export_module, "_converted", broken)
    with pytest.raises(ValueError, match=r"point less accurate|not nearly tied"):
        lp.export_tflite(model, tmp_path / "broken.tflite", **options)
    assert not (tmp_path / "broken.tflite").exists()
