"""Temperatures against brute force and known ones, and where they go."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import special

import keras_lp as lp
from keras_lp.model.calibration import best_temperature, calibration_error, cross_entropy
from keras_lp.tasks.heads import heads, tasks
from tests.conftest import assert_same, snapshot, with_random_heads


def drawn(temperature, n=4000, classes=5, seed=0):
    """Logits, and labels that are drawn from the softmax at a temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (n, classes))
    p = special.softmax(logits / temperature, axis=1)
    y = (p.cumsum(1) < rng.uniform(size=(n, 1))).sum(1).clip(max=classes - 1)
    return logits.astype("float32"), y


def passing(task, units=5, **arguments):
    """A model whose logits are its inputs."""
    backbone = keras.Sequential([keras.Input((units,)), keras.layers.Identity()])
    model = lp.transfer_model(backbone, task, **arguments)
    for head in heads(model).values():
        if head.units == units:
            head.set_raw_weights(np.eye(units), np.zeros(units))
    return model


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_the_labels_is_found(temperature):
    logits, y = drawn(temperature)
    model = passing(5)
    found = lp.calibrate(model, (logits, y)).tasks["predictions"]
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.error < 0.02
    if temperature != 1:
        assert found.error_before > 0.05
        assert found.loss < found.loss_before
    again = lp.calibrate(model, (logits, y)).tasks["predictions"]
    assert again.temperature == pytest.approx(1, abs=1e-3)
    assert again.loss_before == pytest.approx(found.loss, abs=1e-5)


def test_brute_force():
    logits, y = drawn(2.0, n=300)
    weight = np.random.default_rng(1).uniform(0, 2, 300)
    target = logits[np.arange(300), y]
    grid = np.exp(np.linspace(-3, 3, 3001))
    losses = []
    for t in grid:
        p = special.softmax(logits.astype("float64") / t, axis=1)[np.arange(300), y]
        losses.append(np.average(-np.log(p), weights=weight))
    best = best_temperature(logits, target, weight)
    assert best == pytest.approx(grid[np.argmin(losses)], rel=3e-3)
    assert cross_entropy(logits, target, weight, best) <= min(losses) + 1e-6


def test_the_error_by_hand():
    # Probabilities of 0.7, 0.72 and 0.9: two bins, as 0.7 * 15 = 10.5 and 0.72 * 15 = 10.8.
    p = np.array([[0.7, 0.3], [0.28, 0.72], [0.9, 0.1]])
    right, weight = np.array([1.0, 0.0, 1.0]), np.array([1.0, 1.0, 2.0])
    expected = (abs(1 - 0.7 - 0.72) + abs(2 * (1 - 0.9))) / 4
    np.testing.assert_allclose(calibration_error(np.log(p), right, weight), expected)
    sure = np.array([[0.0, 800.0]])
    assert calibration_error(sure, np.ones(1), np.ones(1)) == 0


def test_predictions_stay_and_the_loss_is_that_of_evaluate(digits, mlp):
    x, y = digits
    model = lp.transfer_model(mlp(), 10)
    lp.fit_head(model, (x[:60], y[:60]), l2=1e-6, verbose=0)
    before = model.predict(x[60:], verbose=0)
    loss = model.evaluate(x[60:], y[60:], verbose=0)[0]
    found = lp.calibrate(model, (x[60:], y[60:])).tasks["predictions"]
    assert found.temperature > 1.1  # a head that fits 60 examples is too sure
    np.testing.assert_allclose(
        model.predict(x[60:], verbose=0), before / found.temperature, rtol=1e-4, atol=1e-5
    )
    assert found.loss_before == pytest.approx(loss, rel=1e-4)
    assert found.loss == pytest.approx(model.evaluate(x[60:], y[60:], verbose=0)[0], rel=1e-4)
    plain = lp.plain_model(model)
    np.testing.assert_allclose(
        plain.predict(x[60:], verbose=0), before / found.temperature, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("form", ["one-hot", "dataset", "weights", "missing"])
def test_all_forms_of_data(form):
    logits, y = drawn(2.0, n=500)
    expected = lp.calibrate(passing(5), (logits[:400], y[:400])).tasks["predictions"]
    if form == "one-hot":
        data = logits[:400], np.eye(5, dtype="float32")[y[:400]]
    elif form == "dataset":
        data = tf.data.Dataset.from_tensor_slices((logits[:400], y[:400])).batch(64)
    elif form == "weights":
        data = logits, y, np.arange(500) < 400
    else:
        data = logits, np.where(np.arange(500) < 400, y, -1)
    found = lp.calibrate(passing(5), data).tasks["predictions"]
    for name in ("temperature", "loss", "loss_before", "error", "error_before"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-5)


def test_multi_label_keeps_the_labels_above_its_thresholds():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (3000, 3)).astype("float32")
    y = (special.expit(logits / 2.5) > rng.uniform(size=logits.shape)).astype("int32")
    y[::7, 1] = -1
    model = passing(lp.MultiLabel(3, thresholds=[0.2, 0.5, 0.9]), units=3)
    before = lp.decode_predictions(model, model.predict(logits[:50], verbose=0), top=None)
    found = lp.calibrate(model, (logits, y)).tasks["predictions"]
    assert found.temperature == pytest.approx(2.5, rel=0.1)
    after = lp.decode_predictions(model, model.predict(logits[:50], verbose=0), top=None)
    assert [[name for name, _ in one] for one in after] == [
        [name for name, _ in one] for one in before
    ]
    moved = special.expit(special.logit([0.2, 0.5, 0.9]) / found.temperature)
    np.testing.assert_allclose(tasks(model)["predictions"].thresholds, moved)
    rare = passing(lp.MultiLabel(3), units=3)
    lp.calibrate(rare, (logits, y))
    assert tasks(rare)["predictions"].thresholds is None
    here = y >= 0
    p = special.expit(logits.astype("float64"))
    losses = -np.log(np.where(y == 1, p, 1 - p))[here]
    assert found.loss_before == pytest.approx(losses.mean(), rel=1e-5)


def test_several_tasks(mlp, tmp_path):
    model = with_random_heads(
        lp.multitask_model(mlp(), {"a": 3, "b": lp.MultiLabel(2), "c": lp.Regression(), "d": 4})
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 64)).astype("float32")
    y = {"a": rng.integers(0, 3, 80), "b": rng.integers(0, 2, (80, 2)), "c": rng.normal(size=80)}
    before = model.predict(x, verbose=0)
    found = lp.calibrate(model, (x, y))
    assert list(found.tasks) == ["a", "b"]
    after = model.predict(x, verbose=0)
    for name, one in found.tasks.items():
        np.testing.assert_allclose(
            after[name], before[name] / one.temperature, rtol=1e-4, atol=1e-5
        )
    for name in ("c", "d"):  # no logits, and no labels
        np.testing.assert_array_equal(after[name], before[name])
    lines = str(found).splitlines()
    assert lines[0].split() == [
        *("task", "temperature", "cross-entropy", "calibrated", "error", "calibrated"),
    ]
    assert lines[1].split()[0] == "a"
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0)["a"], after["a"])


def test_only_the_head_changes(digits, mlp):
    model = with_random_heads(lp.transfer_model(mlp(), 10))
    state = snapshot(model.layers[1])
    lp.calibrate(model, digits)
    assert_same(snapshot(model.layers[1]), state)


def test_wrong_input(digits, mlp):
    x, y = digits
    values = lp.transfer_model(mlp(), lp.Regression())
    with pytest.raises(ValueError, match=r"needs a model with an lp\.Classification"):
        lp.calibrate(values, (x, y))
    model = lp.transfer_model(mlp(), 10)
    with pytest.raises(ValueError, match="without a label of theirs"):
        lp.calibrate(model, (x, np.full(len(x), -1)))
    with pytest.raises(ValueError, match="12"):
        lp.calibrate(model, (x, np.full(len(x), 12)))
    model.layers[-1].kernel.assign(np.full((16, 10), np.nan))
    with pytest.raises(ValueError, match="Outputs must not be NaN"):
        lp.calibrate(model, (x, y))


def test_the_exported_file_is_calibrated(digits, mlp, tmp_path):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    x, y = digits
    model = lp.transfer_model(mlp(), 10)
    lp.fit_head(model, (x[:60], y[:60]), l2=1e-6, verbose=0)
    logits = model.predict(x[60:70], verbose=0)
    temperature = lp.calibrate(model, (x[60:], y[60:])).tasks["predictions"].temperature
    assert temperature > 1.1
    lp.export_tflite(model, tmp_path / "model.tflite", verbose=0)
    run = interpreter.Interpreter(str(tmp_path / "model.tflite")).get_signature_runner()
    name = next(iter(run.get_input_details()))
    for example, row in zip(x[60:70], logits, strict=True):
        found = run(**{name: example[None].astype("float32")})["predictions"][0]
        np.testing.assert_allclose(found, special.softmax(row / temperature), atol=1e-5)
