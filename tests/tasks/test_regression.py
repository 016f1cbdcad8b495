"""Numbers as a task: standardised inside, predicted in the units of the labels."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.tasks.regression import standardize
from tests.conftest import Batches, assert_same, snapshot

nan = float("nan")


@pytest.fixture
def heights(digits):
    """Two columns in units of their own, far from 0, some missing."""
    x, y = digits
    labels = np.stack([1700 + 3.0 * y, 1e-3 * y], axis=1).astype("float32")
    labels[np.arange(200) % 4 == 0, 0] = nan
    labels[:20] = nan
    return x, labels


def fitted(head):
    return np.asarray(head.mean), np.asarray(head.std)


FORMS = {
    "arrays": lambda x, y: (x, y),
    "dataset": lambda x, y: (tf.data.Dataset.from_tensor_slices((x, y)).batch(32),),
    "PyDataset": lambda x, y: (Batches(x, y),),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_fit_takes_mean_and_deviation_from_the_labels_present(form, mlp, heights):
    model = lp.transfer_model(mlp(), lp.Regression(2))
    model.fit(*form(*heights), shuffle=form is FORMS["arrays"], verbose=0)
    mean, std = fitted(model.get_layer("predictions"))
    np.testing.assert_allclose(mean, np.nanmean(heights[1].astype("float64"), axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, np.nanstd(heights[1].astype("float64"), axis=0), rtol=1e-4)


def test_validation_split_is_not_looked_at(mlp, heights):
    model = lp.transfer_model(mlp(), lp.Regression(2))
    model.fit(*heights, validation_split=0.5, verbose=0)
    np.testing.assert_allclose(
        fitted(model.get_layer("predictions"))[0], np.nanmean(heights[1][:100], axis=0), rtol=1e-5
    )


def test_an_endless_dataset_is_read_for_one_epoch(mlp, heights):
    model = lp.transfer_model(mlp(), lp.Regression(2))
    endless = tf.data.Dataset.from_tensor_slices(heights).batch(50).repeat()
    model.fit(endless, steps_per_epoch=2, verbose=0)
    np.testing.assert_allclose(
        fitted(model.get_layer("predictions"))[0], np.nanmean(heights[1][:100], axis=0), rtol=1e-5
    )


def test_training_equals_plain_keras_on_standardised_labels(mlp, digits):
    x, y = digits
    y = (1000 + 50 * y).astype("float32")
    model = lp.transfer_model(mlp(), lp.Regression(), trainable="all", optimizer="sgd")
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)
    plain = keras.Sequential([keras.Input((64,)), *mlp().layers, keras.layers.Dense(1)])
    plain.set_weights(model.get_weights()[:4])
    plain.compile(keras.optimizers.SGD(0.01), "mse")
    loss = plain.fit(x, (y - y.mean()) / y.std(), shuffle=False, epochs=2, verbose=0).history
    history = model.fit(x, y, shuffle=False, epochs=2, verbose=0).history
    np.testing.assert_allclose(history["loss"], loss["loss"], rtol=1e-4)
    expected = plain.predict(x, verbose=0) * y.std() + y.mean()
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5)
    error = np.abs(model.predict(x, verbose=0)[:, 0] - y).mean()
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    assert logs["mae"] == pytest.approx(error, rel=1e-4)


def test_large_numbers_are_learned_at_the_usual_rate(mlp, digits):
    x, y = digits
    year = (1900 + y).astype("float32")
    model = lp.transfer_model(mlp(), lp.Regression(), trainable="all", learning_rate=1e-2)
    model.fit(x, year, epochs=30, verbose=0)
    assert model.evaluate(x, year, verbose=0, return_dict=True)["mae"] < 1


def test_a_second_fit_keeps_the_units_of_the_first(mlp, heights):
    model = lp.transfer_model(mlp(), lp.Regression(2))
    model.fit(*heights, verbose=0)
    before = fitted(model.get_layer("predictions"))
    model.fit(heights[0], heights[1] * 2, verbose=0)
    assert_same(before, fitted(model.get_layer("predictions")))


def test_given_mean_and_deviation_stay(mlp, heights):
    task = lp.Regression(2, mean=[1710, 0], std=2)
    model = lp.transfer_model(mlp(), task)
    model.fit(*heights, verbose=0)
    assert_same(fitted(model.get_layer("predictions")), [[1710, 0], [2, 2]])


def test_labels_that_do_not_vary_keep_a_deviation_of_one(mlp, digits):
    model = lp.transfer_model(mlp(), lp.Regression())
    model.fit(digits[0], np.full(200, 7.0), verbose=0)
    assert_same(fitted(model.get_layer("predictions")), [[7.0], [1.0]])


def test_no_label_at_all_leaves_the_head_as_it_is(mlp, digits):
    model = lp.multitask_model(mlp(), {"a": 10, "b": lp.Regression()})
    model.fit(digits[0], {"a": digits[1]}, verbose=0)
    assert_same(fitted(model.get_layer("b")), [[0.0], [1.0]])
    standardize({"b": model.get_layer("b")}, [{"b": np.full(3, nan)}])
    assert_same(fitted(model.get_layer("b")), [[0.0], [1.0]])


def test_units_survive_saving(mlp, heights, tmp_path):
    model = lp.transfer_model(mlp(), lp.Regression(2))
    model.fit(*heights, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(snapshot(model), snapshot(loaded))
    assert_same(fitted(model.get_layer("predictions")), fitted(loaded.get_layer("predictions")))


def test_the_rate_finder_sees_standardised_labels_and_puts_them_back(mlp, digits):
    model = lp.transfer_model(mlp(), lp.Regression())
    found = lp.find_learning_rate(model, (digits[0], 1e6 * digits[1]), steps=20)
    assert found.losses[0] < 100
    assert_same(fitted(model.get_layer("predictions")), [[0.0], [1.0]])


@pytest.mark.parametrize(
    "options",
    [{"mean": 3.0}, {"std": 1.0}, {"mean": 0.0, "std": 0.0}, {"mean": [1, 2], "std": [1, 2]}],
)
def test_wrong_units_are_refused(options):
    with pytest.raises(ValueError, match=r"`mean` and `std` .* together"):
        lp.Regression(3, **options)
