"""Weights of examples: checked before training, by task where there are several."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from tests.conftest import assert_same, snapshot

BAD = {"NaN": np.nan, "infinite": np.inf, "negative": -1.0}


@pytest.fixture
def examples(digits):
    x, y = digits
    return x, {"digit": y, "odd": y % 2}


def model_of(mlp):
    keras.utils.set_random_seed(0)
    return lp.multitask_model(mlp(), {"digit": 10, "odd": 2}, optimizer="sgd")


def as_dataset(*parts):
    return tf.data.Dataset.from_tensor_slices(parts).batch(50)


CALLS = {
    "fit": lambda m, x, y, w: m.fit(x, y, sample_weight=w, verbose=0),
    "fit, data set": lambda m, x, y, w: m.fit(as_dataset(x, y, w), verbose=0),
    "evaluate": lambda m, x, y, w: m.evaluate(x, y, sample_weight=w, verbose=0),
    "evaluate by position": lambda m, x, y, w: m.evaluate(x, y, 32, 0, w),
    "evaluate, data set": lambda m, x, y, w: m.evaluate(as_dataset(x, y, w), verbose=0),
    "validation": lambda m, x, y, w: m.fit(x, y, validation_data=(x, y, w), verbose=0),
    "client": lambda m, x, y, w: lp.FederatedAveraging(m).fit({"a": (x, y, w)}, 1, verbose=0),
    "validation of clients": lambda m, x, y, w: lp.FederatedAveraging(m).fit(
        {"a": (x, y)}, 1, validation_data=(x, y, w), verbose=0
    ),
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("by_task", [False, True])
def test_what_is_no_weight_is_refused(mlp, examples, call, value, by_task):
    model = model_of(mlp)
    before = snapshot(model)
    weights = np.ones(200, "float32")
    weights[3] = value
    if by_task:
        weights = {"digit": np.ones(200, "float32"), "odd": weights}
    with pytest.raises(ValueError, match=rf"finite numbers of 0 or more.*the value {value}.*1 of"):
        call(model, *examples, weights)
    assert_same(before, snapshot(model))


def test_the_error_says_which_data_have_the_weights(mlp, digits):
    x, y = digits
    model, bad = lp.transfer_model(mlp(), 10), np.full(200, -1.0)
    for data, where in ({"data": (x, y, bad)}, "sample_weight with"), (
        {"data": (x, y), "validation_data": (x, y, bad)}, "sample_weight of validation_data with",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=where):
            lp.fit_head(model, verbose=0, **data)
    labels = lp.transfer_model(mlp(), lp.MultiLabel(2))
    with pytest.raises(ValueError, match="sample_weight of validation_data with the value -1"):
        lp.choose_thresholds(labels, (x, np.zeros((200, 2)), bad))


@pytest.mark.parametrize(
    "call", [CALLS["fit"], CALLS["fit, data set"], CALLS["validation"]], ids=["fit", "set", "val"]
)
def test_a_task_without_weights_has_weights_of_1(mlp, examples, call):
    half = np.where(np.arange(200) % 2, 0.5, 2.0).astype("float32")
    results = []
    for weights in ({"digit": half}, {"odd": np.ones(200, "float32"), "digit": half}):
        model = model_of(mlp)
        results.append((call(model, *examples, weights).history, snapshot(model)))
    (some, a), (both, b) = results
    assert_same(a, b)
    assert some == both


def test_evaluate_with_weights_of_one_task_equals_numpy(mlp, examples):
    x, y = examples
    model = model_of(mlp)
    model.fit(x, y, verbose=0)
    weights = np.linspace(0, 3, 200).astype("float32")
    found = model.evaluate(x, y, sample_weight={"digit": weights}, verbose=0, return_dict=True)
    right = {
        name: model.predict(x, verbose=0)[name].argmax(1) == labels for name, labels in y.items()
    }
    assert found["digit_accuracy"] == pytest.approx(np.average(right["digit"], weights=weights))
    assert found["odd_accuracy"] == pytest.approx(right["odd"].mean())


def test_weights_that_fit_no_task_are_refused(mlp, examples):
    x, y = examples
    model = model_of(mlp)
    ones = np.ones(200, "float32")
    for weights, message in (
        ({"digits": ones}, r"sample_weight with \['digits'\]. Did you mean 'digit'"),
        ([ones, ones], "a list of 2 arrays"),
        (np.array(["a"] * 200), "the value a"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(x, y, sample_weight=weights, verbose=0)
    with pytest.raises(ValueError, match=r"sample_weight with \['digits'\]"):
        model.fit(as_dataset(x, y, {"digits": ones}), verbose=0)
