"""A multitask model against its single-task twins."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.balancing.ways import balancing_of
from keras_lp.multitask import comparison
from tests.conftest import assert_same, snapshot


@pytest.fixture
def examples(digits):
    x, y = digits
    return x, {"digit": np.where(np.arange(200) < 40, y, -1), "size": (y * 2.0).astype("float32")}


@pytest.fixture
def model(mlp):
    model = lp.multitask_model(
        mlp((16,)), {"digit": 10, "size": lp.Regression()}, learning_rate=1e-2
    )
    return model


def as_dataset(examples):
    return tf.data.Dataset.from_tensor_slices(examples).batch(32)


@pytest.mark.parametrize("form", [tuple, as_dataset], ids=["arrays", "dataset"])
def test_gains_are_relative_and_positive_where_the_multitask_model_is_better(
    model, examples, form, capsys
):
    before = snapshot(model)
    result = lp.compare_single_tasks(
        model, form(examples), validation_data=form(examples), epochs=2, seeds=2
    )
    assert_same(before, snapshot(model))
    assert result.metrics == {"digit": "accuracy", "size": "mae"}
    digit = 100 * (result.multitask["digit"] / result.single["digit"] - 1)
    size = 100 * (1 - result.multitask["size"] / result.single["size"])
    np.testing.assert_allclose(result.gains["digit"], digit, rtol=1e-5)
    np.testing.assert_allclose(result.gains["size"], size, rtol=1e-5)
    np.testing.assert_allclose(result.delta_m, (digit + size) / 2, rtol=1e-5)
    out = capsys.readouterr().out
    assert f"{digit.mean():+.2f} ± {np.std(digit, ddof=1):.2f}" in out
    assert "delta-m" in out
    assert "Models trained" not in out


@pytest.mark.parametrize("form", [tuple, as_dataset], ids=["arrays", "dataset"])
def test_a_twin_trains_as_many_steps_on_labelled_examples_only(
    model, examples, form, monkeypatch, capsys
):
    fits = []

    def record(self, x, y=None, batch_size=32, epochs=1, **_):
        if y is not None:
            x = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size)
        fits.append((self, list(x.as_numpy_iterator())))

    monkeypatch.setattr(lp.Model, "fit", record)
    lp.compare_single_tasks(
        model, form(examples), validation_data=examples, epochs=1, seeds=1, verbose=0
    )
    assert capsys.readouterr().out == ""
    (_, multi), (twin, digit), _ = fits
    assert len(multi) == len(digit) == 7
    assert all((y >= 0).all() for _, y in digit)
    seen = np.concatenate([x for x, _ in digit])
    assert {row.tobytes() for row in seen} == {row.tobytes() for row in examples[0][:40]}
    assert float(twin.optimizer.learning_rate) == pytest.approx(1e-2)
    assert_same(
        twin.get_layer("mlp").get_weights(),
        model.get_layer("mlp").get_weights(),
    )


def test_with_one_seed_twice_the_same_comes_out(model, examples):
    a, b = (
        lp.compare_single_tasks(
            model, examples, validation_data=examples, epochs=1, seeds=1, verbose=0
        )
        for _ in range(2)
    )
    assert a.single == b.single
    assert a.multitask == b.multitask


def test_frozen_layers_and_rates_are_those_of_the_model(mlp, examples):
    model = lp.multitask_model(mlp((16, 8)), {"digit": 10, "size": lp.Regression()})
    model = lp.finetune_model(model, trainable=1, layer_decay=0.5, learning_rate=1e-3)
    twin = comparison._twin(model, "size")
    assert [v.shape[-1] for v in twin.trainable_variables] == [8, 8, 1, 1]
    assert twin.optimizer.multipliers == [0.5, 0.5, 1.0, 1.0]


def test_balanced_models_have_plain_twins(mlp, examples):
    tasks = {"digit": 10, "size": lp.Regression()}
    model = lp.multitask_model(mlp(), tasks, balancing="uncertainty")
    twin = comparison._twin(model, "digit")
    twin.fit(examples[0], examples[1]["digit"], verbose=0)
    np.testing.assert_array_equal(balancing_of(twin).log_variances, np.zeros(2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m, mlp: keras.Sequential(), TypeError, "from lp.multitask_model"),
        (lambda m, mlp: lp.transfer_model(mlp(), 10), ValueError, "two or more tasks"),
    ],
)
def test_other_models_are_refused(model, mlp, examples, make, error, message):
    with pytest.raises(error, match=message):
        lp.compare_single_tasks(make(model, mlp), examples, validation_data=examples, epochs=1)


def test_data_that_do_not_do_are_refused(model, examples):
    x, y = examples
    endless = as_dataset(examples).repeat()
    none = (x, {"digit": y["digit"]})
    for data, message in ((endless, "cardinality"), (x, "must be .x, labels."), (none, "'size'")):
        with pytest.raises(ValueError, match=message):
            lp.compare_single_tasks(
                model, data, validation_data=examples, epochs=1, seeds=1, verbose=0
            )


@pytest.mark.parametrize("form", [tuple, as_dataset], ids=["arrays", "dataset"])
def test_sample_weights_count_in_training_and_comparison(model, examples, form, monkeypatch):
    """Examples of weight 0 are as good as none."""
    fits = []
    monkeypatch.setattr(lp.Model, "fit", lambda self, **arguments: fits.append(arguments))
    x, y = examples
    weights = {name: (np.arange(200) < 40).astype("float32") for name in y}
    found = [
        lp.compare_single_tasks(model, train, validation_data=val, epochs=1, seeds=1, verbose=0)
        for train, val in (
            (form((x, y, weights)), form((x, y, weights))),
            ((x, y), (x[:40], {name: value[:40] for name, value in y.items()})),
        )
    ]
    for name in y:
        a, b = ([one.single[name], one.multitask[name]] for one in found)
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for arguments in fits[:3]:
        weight = arguments["sample_weight"] if form is tuple else next(iter(arguments["x"]))[2]
        assert np.max([np.max(one) for one in tf.nest.flatten(weight)]) == 1
    (_, twin, _), without = fits[:3], fits[3:]
    assert all("sample_weight" not in arguments for arguments in without)
    if form is tuple:  # the examples with a label of this task are the 40 of weight 1
        np.testing.assert_array_equal(twin["sample_weight"], np.ones(200))


@pytest.mark.parametrize("form", [tuple, as_dataset], ids=["arrays", "dataset"])
def test_validation_labels_are_checked_before_training(model, examples, form, monkeypatch):
    monkeypatch.setattr(lp.Model, "fit", lambda *_, **__: pytest.fail("trained first"))
    x, y = examples
    for labels in ({"size": y["size"]}, {**y, "digit": np.full(200, -1)}):
        with pytest.raises(ValueError, match=r"labels in `validation_data`.*'digit'"):
            lp.compare_single_tasks(
                model, (x, y), validation_data=form((x, labels)), epochs=1, seeds=1
            )


def test_a_line_per_model_that_is_trained(model, examples, monkeypatch, capsys):
    monkeypatch.setattr(lp.Model, "fit", lambda *_, **__: None)
    lp.compare_single_tasks(model, examples, validation_data=examples, epochs=1, seeds=2, verbose=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" - ")[0] for line in lines[:6]] == [
        f"Models trained {i}/6" for i in range(1, 7)
    ]
    assert lines[6].startswith("task ")
