"""The page of a model against figures by hand and scikit-learn."""

import base64
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from sklearn.metrics import confusion_matrix

import keras_lp as lp
from keras_lp.utils.page import line_chart, matrix, page, paragraphs, picture, preformatted
from tests.conftest import with_random_heads


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    network = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten()]
    )
    model = lp.transfer_model(network, [f"<{i}>" for i in range(10)], pooling=None)
    data, test = (x[:300], y[:300]), (x[300:500], y[300:500])
    history = model.fit(*data, epochs=3, validation_data=test, verbose=0)
    return model, history, test


def test_the_results_are_those_of_the_model(trained, tmp_path):
    model, history, (x, y) = trained
    made = lp.report(model, history, (x, y), path=tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert made.html == text == made._repr_html_()
    assert made.path == str(tmp_path / "a.html")
    logits = model.predict(x, verbose=0)
    right = int((logits.argmax(1) == y).sum())
    interval = stats.binomtest(right, 200).proportion_ci(method="wilson")
    line = (
        f"accuracy {right / 200:.1%} (95 % interval {interval.low:.1%} to {interval.high:.1%}, "
        "200 labels)"
    )
    assert line.capitalize() in text
    assert f"- predictions: {line}" in made.card
    cells = re.findall(r"<td style[^>]*>(\d+)</td>", text)
    np.testing.assert_array_equal(
        np.array(cells, int).reshape(10, 10), confusion_matrix(y, logits.argmax(1))
    )
    assert not re.search(r"https?:|<script|<link", text)
    assert "&lt;3&gt;" in text
    assert "<3>" not in text


def test_the_calibration_is_that_of_calibrate(trained, tmp_path):
    model, _, test = trained
    model.save(tmp_path / "model.keras")
    before = model.predict(test[0], verbose=0)
    text = lp.report(model, test_data=test, path=None).html
    np.testing.assert_array_equal(model.predict(test[0], verbose=0), before)
    copy = keras.models.load_model(tmp_path / "model.keras")
    one = lp.calibrate(copy, test).tasks["predictions"]
    assert (
        f"Calibration error {one.error_before:.3f}; {one.error:.3f} with the temperature "
        f"{one.temperature:.2f}" in text
    )


def test_the_worst_errors_come_first(trained):
    model, _, (x, y) = trained
    logits = model.predict(x, verbose=0).astype("float64")
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = np.flatnonzero(logits.argmax(1) != y)
    worst = wrong[np.argsort(p[wrong, y[wrong]])][:8]
    text = lp.report(model, test_data=(x, y), path=None).html
    images = re.findall(r"data:image/png;base64,([^\"]+)", text)
    shown = [tf.io.decode_png(base64.b64decode(code)).numpy() for code in images]
    np.testing.assert_array_equal(shown, x[worst])
    rows = re.findall(
        r"^ *(\d+) +&lt;(\d)&gt; +&lt;(\d)&gt; +([\d.]+)(?:</pre>)?$", text, re.MULTILINE
    )
    assert [int(row[0]) for row in rows] == worst.tolist()
    assert [int(row[1]) for row in rows] == y[worst].tolist()
    assert [int(row[2]) for row in rows] == logits[worst].argmax(1).tolist()


def test_without_history_and_data(trained):
    model, history, _ = trained
    made = lp.report(model, path=None)
    assert made.path is None
    assert "<h2>Training</h2>" not in made.html
    assert "Test results of" not in made.html
    assert "Not measured." in made.card
    curves = lp.report(model, history.history, path=None).html
    assert curves.count("<svg") == 2  # loss and accuracy, each with validation
    assert curves.count("<polyline") == 4
    assert "trainable parameters: 650 of" in curves


def test_several_tasks_and_missing_labels(mlp):
    tasks = {"a": 3, "b": lp.MultiLabel(2, thresholds=0.3), "c": lp.Regression(), "d": 2}
    model = with_random_heads(lp.multitask_model(mlp(), tasks))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 64)).astype("float32")
    y = {"a": rng.integers(-1, 3, 60), "b": rng.integers(-1, 2, (60, 2)), "c": rng.normal(size=60)}
    y["c"][:10] = np.nan
    outputs = model.predict(x, verbose=0)
    made = lp.report(model, test_data=(x, y), path=None)
    assert re.findall(r"Test results of (\w+)", made.html) == ["a", "b", "c"]
    here = y["a"] >= 0
    accuracy = np.mean(outputs["a"].argmax(1)[here] == y["a"][here])
    assert f"- a: accuracy {accuracy:.1%}" in made.card
    assert f"{here.sum()} labels)" in made.card
    present = y["b"] >= 0
    chosen = 1 / (1 + np.exp(-outputs["b"])) > 0.3
    assert f"- b: right labels {np.mean((chosen == y['b'])[present]):.1%}" in made.card
    errors = np.abs(outputs["c"].reshape(-1) - y["c"])[10:]
    margin = stats.sem(errors) * stats.t.ppf(0.975, 49)
    assert f"- c: mean absolute error {errors.mean():.4g} ± {margin:.2g}" in made.card


def test_texts_are_shown():
    texts = ["A good one", "bad & long", "good again", "a bad day"] * 5
    encoder = lp.TextEncoder.fit(texts, length=4)
    pooled = keras.layers.GlobalAveragePooling1D()
    network = keras.Sequential([keras.Input((4,), dtype="int32"), encoder.embedding(8), pooled])
    model = lp.transfer_model(network, 2, pretrained=False, trainable="all")
    model.layers[-1].bias.assign([5.0, 0.0])
    text = lp.report(model, test_data=(encoder(texts), np.array([1, 0, 1, 0] * 5)), path=None).html
    assert re.search(r"^(<pre>)?0: a good one$", text, re.MULTILINE)
    assert "2: good again" in text


def test_a_federation():
    logs = {
        "loss": [1.0, 0.5], "clients": [5, 5], "dropped": [0, 0], "bytes_up": [100, 120],
        "bytes_down": [100, 100], "update_norm": [1, 1], "epsilon": [0.5, 0.75], "seconds": [1, 1],
    }  # fmt: skip
    backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    text = lp.report(lp.transfer_model(backbone, 2), logs, path=None).html
    for line in ("rounds *2", "bytes sent by clients *220", "epsilon spent *0.750"):
        assert re.search(line, text)
    assert text.count("<svg") == 1
    assert ">round</text>" in text


def test_the_phases_of_a_training_are_marked(trained):
    model, history, _ = trained
    assert 'class="phase"' not in lp.report(model, history, path=None).html
    more = {"loss": [0.5, 0.25], "extra": [1.0, 2.0], "val_loss": [0.75]}  # validated once
    text = lp.report(model, [history, more, {"loss": [0.125], "val_loss": [0.5]}], path=None).html
    assert (
        "<figcaption>loss (epochs: training 1: 1 to 3; training 2: 4 to 5; training 3: 6)" in text
    )
    loss = text[text.index("<figcaption>loss") :]
    # Six epochs: the second training begins between the third and the fourth.
    assert '<path class="phase" d="M260.0,15 V185"/>' in loss
    assert len(re.search('class="line first" points="([^"]*)"', loss)[1].split()) == 6
    validated = re.search('class="line second" points="([^"]*)"', loss)[1].split()
    assert [point.split(",")[0] for point in validated[3:]] == ["302.0", "470.0"]  # 4 and 6
    extra = text[text.index("<figcaption>extra") :]
    assert re.search('class="line first" points="([^"]*)"', extra)[1] == "302.0,180.0 386.0,20.0"


def test_the_phases_of_two_phase():
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "relu", name="block1")])
    model = lp.transfer_model(network, 2)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    data = x, (x[:, 0] > 0).astype("int32")
    history = lp.fit_two_phase(model, data, epochs=2, learning_rate=1e-3, verbose=0)
    assert history.phases == {"head": 1, "all layers": 2}
    text = lp.report(model, history, path=None).html
    assert "loss (epochs: head: 1; all layers: 2 to 3)" in text
    history = lp.fit_two_phase(model, data, epochs=1, head_epochs=0, learning_rate=1e-3, verbose=0)
    assert history.phases == {"all layers": 1}


def test_the_files_of_a_model(trained, tmp_path):
    model = trained[0]
    files = [
        lp.export_tflite(model, tmp_path / f"{kind}.tflite", quantization=kind, verbose=0)
        for kind in (None, "float16")
    ]
    made = lp.report(model, path=None, exported=files)
    for file in files:
        assert f"{file.path}: {file.size / 1024:,.1f} KiB" in made.html
        assert f"    {file.path}" in made.card
    assert lp.report(model, path=None, exported=files[0]).html.count("one thread") == 2


def test_wrong_input(trained):
    model, history, (x, y) = trained
    with pytest.raises(ValueError, match="`exported` must be the output"):
        lp.report(model, path=None, exported=["model.tflite"])
    for wrong in ("model.tflite", None):
        with pytest.raises(ValueError, match=f"Received: {wrong!r}"):
            lp.report(model, path=None, exported=wrong)
    with pytest.raises(ValueError, match=r"`history` must be the output .*Received: 3\."):
        lp.report(model, [history, 3], path=None)
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="takes a model that keras_lp built"):
        lp.report(plain)
    with pytest.raises(ValueError, match=r"`test_data` must be arrays \(x, y\). Received: list"):
        lp.report(model, test_data=[x, y])
    with pytest.raises(ValueError, match="12"):
        lp.report(model, test_data=(x, np.full(len(x), 12)))


def test_charts_by_hand():
    chart = line_chart({"a<b": [0.0, 1.0, float("nan"), 2.0], "other": [4.0]}, "epoch", "loss")
    assert 'points="50.0,180.0 190.0,140.0 470.0,100.0"' in chart
    assert '<circle class="second" cx="50.0" cy="20.0" r="3"/>' in chart
    assert ">a&lt;b</text>" in chart
    assert "<figcaption>loss</figcaption>" in chart
    assert ">4</text>" in chart
    assert "nan" not in line_chart({"a": [float("nan")] * 3}, "epoch", "loss")


def test_parts_of_pages():
    assert paragraphs("a\n<b>") == "<p>a</p>\n<p>&lt;b&gt;</p>"
    assert preformatted("<") == "<pre>&lt;</pre>"
    text = page("A & B", {"C": ["<p>d</p>"]})
    assert "<title>A &amp; B</title>" in text
    assert "<h2>C</h2>\n<p>d</p>" in text
    table = matrix(np.array([[3, 1], [0, 0]]), ["x", "y"], "label", "guess")
    assert "rgb(0 114 178 / 0.450)" in table
    assert table.count("<td") == 4
    three = picture(np.arange(8.0).reshape(2, 2, 2), 0, 7)
    np.testing.assert_array_equal(
        tf.io.decode_png(three).numpy()[..., 0],
        np.round(255 / 7 * np.array([[0.5, 2.5], [4.5, 6.5]])),
    )
