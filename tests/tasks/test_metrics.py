"""The metrics of `MultiLabel` against scikit-learn."""

import keras
import numpy as np
import pytest

import keras_lp as lp

sklearn = pytest.importorskip("sklearn.metrics")


def rare_labels(missing=0.3):
    """Labels from frequent to rare; the last is never there, and entries of -1 are missing."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 5), scale=2).astype("float32") - 1
    y = (rng.uniform(size=(500, 5)) < [0.5, 0.2, 0.1, 0.05, 0]).astype("int32")
    logits += 1.5 * y
    return np.where(rng.uniform(size=y.shape) < missing, -1, y), logits


def expected(y, logits):
    """Macro F1 and mean average precision over the labels that have a positive."""
    f1, precision = [], []
    for i in range(y.shape[1]):
        here = y[:, i] >= 0
        own, given = y[here, i], logits[here, i]
        if own.any():
            f1.append(sklearn.f1_score(own, given > 0))
            precision.append(sklearn.average_precision_score(own, given))
    return np.mean(f1), np.mean(precision)


def updated(metric, task, y, logits, batch=64):
    for i in range(0, len(y), batch):
        labels, outputs, weight = task.mask_missing(y[i : i + batch], logits[i : i + batch])
        metric.update_state(labels, outputs, weight)
    return metric


def test_both_equal_scikit_learn_over_the_labels_that_are_there():
    y, logits = rare_labels()
    task = lp.MultiLabel(5)
    f1, precision = (float(updated(m, task, y, logits).result()) for m in task.make_metrics())
    wanted = expected(y, logits)
    assert f1 == pytest.approx(wanted[0], abs=1e-6)
    assert precision == pytest.approx(wanted[1], abs=5e-3)


def test_f1_equals_scikit_learns_macro_average():
    y, logits = rare_labels(missing=0)
    y, logits = y[:, :4], logits[:, :4]
    task = lp.MultiLabel(4)
    f1 = float(updated(task.make_metrics()[0], task, y, logits).result())
    assert f1 == pytest.approx(sklearn.f1_score(y, logits > 0, average="macro"), abs=1e-6)


def test_f1_with_thresholds_equals_scikit_learns():
    y, logits = rare_labels(missing=0)
    y, logits, thresholds = y[:, :4], logits[:, :4], [0.2, 0.7, 0.5, 0.05]
    task = lp.MultiLabel(4, thresholds=thresholds)
    f1 = float(updated(task.make_metrics()[0], task, y, logits).result())
    chosen = 1 / (1 + np.exp(-logits.astype("float64"))) > thresholds
    assert f1 == pytest.approx(sklearn.f1_score(y, chosen, average="macro"), abs=1e-6)


def test_a_threshold_tells_neighbouring_float32_logits_apart():
    """Midway between two logits with nothing between them, the upper one alone is above."""
    lower = np.random.default_rng(0).normal(size=200, scale=3).astype("float32")
    upper = np.nextafter(lower, np.float32(np.inf))
    middle = (lower.astype("float64") + upper) / 2
    task = lp.MultiLabel(200, thresholds=1 / (1 + np.exp(-middle)))
    for logits, above in ((lower, 0.0), (upper, 1.0)):
        (metric, *_) = task.make_metrics()
        metric.update_state(np.ones((1, 200)), logits[None])
        assert float(metric.result()) == above
        assert task.is_predicted(logits).all() == bool(above)


def test_a_probability_of_exactly_the_threshold_is_not_above_it():
    metric = lp.MultiLabel(2, thresholds=0.5).make_metrics()[0]
    metric.update_state([[1, 1]], [[0.0, 1e-30]])
    assert float(metric.result()) == 0.5


@pytest.mark.parametrize("index", [0, 1])
def test_states_of_parts_add_up_to_that_of_all(index):
    y, logits = rare_labels()
    task = lp.MultiLabel(5)
    whole, first, second = (task.make_metrics()[index] for _ in range(3))
    updated(whole, task, y, logits)
    updated(first, task, y[:100], logits[:100])
    updated(second, task, y[100:], logits[100:])
    for a, b in zip(first.variables, second.variables, strict=True):
        a.assign_add(b)
    assert float(first.result()) == pytest.approx(float(whole.result()), abs=1e-6)


@pytest.mark.parametrize("thresholds", [None, 0.3])
@pytest.mark.parametrize("index", [0, 1])
def test_config_gives_the_same_metric(index, thresholds):
    metric = lp.MultiLabel(5, thresholds=thresholds).make_metrics()[index]
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert type(again) is type(metric)
    assert again.get_config() == metric.get_config()


def test_evaluate_of_a_model_gives_both(mlp):
    y, _ = rare_labels()
    x = np.random.default_rng(1).normal(size=(500, 64)).astype("float32")
    model = lp.transfer_model(mlp(), lp.MultiLabel(5))
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    f1, precision = expected(y, model.predict(x, verbose=0))
    assert logs["f1"] == pytest.approx(f1, abs=1e-6)
    assert logs["map"] == pytest.approx(precision, abs=5e-3)
