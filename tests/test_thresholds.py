"""Thresholds of labels, against a search over all of them with scikit-learn's F1."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

import keras_lp as lp
from keras_lp.thresholds import _best


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)).astype("float32")
    y = (x @ rng.normal(size=(12, 3)) + rng.normal(size=(400, 3)) > [5.0, 0.0, -4.0]).astype(int)
    return (x[:200], y[:200]), (x[200:], y[200:])


def solved(problem, task=None, **options):
    backbone = keras.Sequential([keras.Input((12,)), keras.layers.Identity()])
    model = lp.transfer_model(backbone, task or lp.MultiLabel(["a", "b", "c"]), **options)
    lp.fit_head(model, problem[0], verbose=0)
    return model


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 19), st.booleans(), st.sampled_from([0.0, 0.5, 2.0])),
        min_size=1,
        max_size=12,
    )
)
def test_no_threshold_has_a_larger_f1(rows):
    p, y, weight = (np.array(part, float) for part in zip(*rows, strict=True))
    p /= 20
    found = _best(p, y, weight)
    if not (weight * y).any():
        assert found == 0.5
        return

    def score(t):
        return f1_score(y, p > t, sample_weight=weight, zero_division=0)

    assert score(found) == pytest.approx(max(score(t) for t in np.arange(0.025, 1, 0.05)))
    assert 0 < found < 1


@pytest.mark.parametrize("form", ["arrays", "weights", "dataset"])
def test_evaluate_decode_and_metric_use_the_thresholds(problem, form):
    x, y = problem[1]
    model = solved(problem)
    before = model.evaluate(x, y, verbose=0, return_dict=True)
    data = {
        "arrays": (x, y),
        "weights": (x, y, np.ones(200)),
        "dataset": tf.data.Dataset.from_tensor_slices((x, y)).batch(64),
    }[form]
    thresholds = lp.choose_thresholds(model, data)
    assert thresholds.shape == (3,)
    assert model.get_layer("predictions").task.thresholds == tuple(thresholds)
    outputs = model.predict(x, verbose=0)
    probabilities = 1 / (1 + np.exp(-outputs.astype("float64")))
    after = model.evaluate(x, y, verbose=0, return_dict=True)
    expected = f1_score(y, probabilities > thresholds, average="macro")
    assert after["f1"] == pytest.approx(expected, abs=1e-6)
    assert after["f1"] > before["f1"] + 0.01
    assert after["loss"] == pytest.approx(before["loss"])
    decoded = lp.decode_predictions(model, outputs[:20])
    for row, p in zip(decoded, probabilities, strict=False):
        assert {name for name, _ in row} == {
            n for n, v in zip("abc", p > thresholds, strict=True) if v
        }
        assert [value for _, value in row] == sorted((value for _, value in row), reverse=True)
    assert [len(row) for row in lp.decode_predictions(model, outputs[:2], top=2)] == [2, 2]


def test_missing_entries_take_no_part(problem):
    x, y = problem[1]
    hidden = y.copy()
    hidden[::2, 0] = -1
    model = solved(problem)
    some = lp.choose_thresholds(model, (x, hidden))
    other = lp.choose_thresholds(model, (x[1::2], y[1::2]))
    assert some[0] == other[0]
    assert lp.choose_thresholds(model, (x, np.zeros_like(y))).tolist() == [0.5] * 3


def test_several_tasks(problem):
    (x, y), held = problem
    backbone = keras.Sequential([keras.Input((12,)), keras.layers.Identity()])
    tasks = {"marks": lp.MultiLabel(3), "kind": 2}
    model = lp.multitask_model(backbone, tasks, trainable="head")
    lp.fit_head(model, (x, {"marks": y, "kind": y[:, 0]}), verbose=0)
    found = lp.choose_thresholds(model, (held[0], {"marks": held[1]}))
    assert list(found) == ["marks"]
    assert found["marks"] == pytest.approx(lp.choose_thresholds(solved(problem), held), abs=1e-6)


def test_they_are_saved_and_exported(problem, tmp_path):
    x, y = problem[1]
    model = solved(problem)
    thresholds = lp.choose_thresholds(model, (x, y))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.get_layer("predictions").task.thresholds == tuple(thresholds)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert loaded.evaluate(x, y, verbose=0, return_dict=True) == pytest.approx(expected)
    copy = keras.models.clone_model(model)
    assert copy.get_layer("predictions").task.thresholds == tuple(thresholds)
    tuned = lp.finetune_model(loaded, learning_rate=1e-9)
    tuned.set_weights(model.get_weights())
    assert tuned.evaluate(x, y, verbose=0, return_dict=True)["f1"] == pytest.approx(expected["f1"])
    contents = pytest.importorskip("keras_lp.tflite.contents")
    pytest.importorskip("ai_edge_litert.interpreter")
    lp.export_tflite(model, tmp_path / "m.tflite", verification_data=x)
    found = contents.read_contents((tmp_path / "m.tflite").read_bytes())
    assert found.thresholds(found.outputs[0]) == pytest.approx(thresholds, rel=1e-5)
    assert f"present above {thresholds[0]:.3g}, " in str(found)
    assert "thresholds.txt, 3 lines" in str(found)


def test_thresholds_given_by_hand():
    assert lp.MultiLabel(2, thresholds=0.3).thresholds == (0.3, 0.3)
    assert lp.MultiLabel(2, thresholds=[0.3, 0.6]).thresholds == (0.3, 0.6)
    for wrong in (0, 1, [0.1, 0.2, 0.3], "low", [0.5, np.nan]):
        with pytest.raises(ValueError, match=r"`thresholds` of MultiLabel must be"):
            lp.MultiLabel(2, thresholds=wrong)


def test_refusals(problem, mlp, digits):
    with pytest.raises(ValueError, match=r"needs a model with a MultiLabel task.*Classification"):
        lp.choose_thresholds(lp.transfer_model(mlp(), 10), digits)
    with pytest.raises(TypeError, match="`validation_data` must be"):
        lp.choose_thresholds(solved(problem), problem[1][0])
