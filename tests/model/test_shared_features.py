"""Features that several models share: computed once per data set, with the results of plain fit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.backbones.features import KEY
from keras_lp.model.shared_features import SharedFeatures
from keras_lp.utils.repeatable import mark_repeatable
from tests.conftest import Batches, assert_same, snapshot


@keras.saving.register_keras_serializable("tests")
class Counting(keras.layers.Layer):
    """Counts the examples that pass."""

    seen = 0

    def call(self, inputs):
        def count(x):
            Counting.seen += len(x)
            return x

        counted = tf.numpy_function(count, [inputs], inputs.dtype)
        counted.set_shape(inputs.shape)
        return counted

    def compute_output_shape(self, shape):
        return shape


@pytest.fixture
def network():
    Counting.seen = 0
    layers = [keras.layers.Dense(16, "relu"), Counting()]
    return keras.Sequential([keras.Input((64,)), *layers], name="network")


def arguments(digits, **other):
    x, y = digits
    held_out = x[150:], y[150:]
    given = {"x": x[:150], "y": y[:150], "validation_data": held_out, "batch_size": 25}
    return {**given, "epochs": 3, "verbose": 0, **other}


def test_results_are_those_of_fit_on_inputs(network, digits):
    given = arguments(digits)
    made = []
    for shared in (False, True):
        keras.utils.set_random_seed(0)
        model = lp.transfer_model(network, 10)
        new = SharedFeatures(model).replace(given) if shared else given
        history = model.fit(**new)
        made.append([*snapshot(model), np.array(list(history.history.values()))])
    assert_same(*made)


def test_each_data_set_is_computed_once(network, digits):
    given = arguments(digits)
    models = [lp.transfer_model(network, 10) for _ in range(3)]
    shared = SharedFeatures(models[0])
    for model in models:
        model.fit(**shared.replace(given))
    assert Counting.seen == 200
    other = arguments((digits[0].copy(), digits[1]))
    models[0].fit(**shared.replace(other))
    assert Counting.seen == 400


@pytest.mark.parametrize("marked", [False, True])
def test_data_sets_are_computed_if_they_are_repeatable(network, digits, marked):
    def batches(part):
        dataset = tf.data.Dataset.from_tensor_slices(part).batch(25)
        return mark_repeatable(dataset) if marked else dataset

    given = arguments(digits)
    data = {"x": batches((given["x"], given["y"])), "epochs": 2, "verbose": 0}
    data["validation_data"] = batches(given["validation_data"])
    model = lp.transfer_model(network, 10)
    shared = SharedFeatures(model)
    new = shared.replace(data)
    assert (KEY in new["x"]) if marked else new["x"] is data["x"]
    for _ in range(2):
        model.fit(**shared.replace(data))
    assert (Counting.seen == 200) == marked


def test_cache_features_true_keeps_any_finite_data(network, digits):
    given = arguments(digits)
    model = lp.transfer_model(network, 10, cache_features=True)
    shared = SharedFeatures(model)
    data = {"x": Batches(given["x"], given["y"]), "verbose": 0}
    for _ in range(2):
        model.fit(**shared.replace(data))
    assert Counting.seen == 150


def test_cache_features_false_is_respected(network, digits):
    model = lp.transfer_model(network, 10, cache_features=False)
    given = arguments(digits)
    assert SharedFeatures(model).replace(given)["x"] is given["x"]


def test_what_exceeds_the_memory_is_in_files_that_go_with_the_object(
    network, digits, monkeypatch, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given = arguments(digits)
    made = []
    for memory in (2**20, 1000):
        model = lp.transfer_model(network, 10, cache_memory=memory)
        shared = SharedFeatures(model)
        new = shared.replace(given)
        assert isinstance(new["x"][KEY], np.memmap) == (memory == 1000)
        history = model.fit(**new, shuffle=False)
        made.append(np.array([history.history[name] for name in ("loss", "val_loss")]))
    np.testing.assert_allclose(*made, rtol=1e-5)
    assert list(tmp_path.glob("keras_lp_features_*/*"))
    del shared
    assert not list(tmp_path.glob("keras_lp_features_*"))


def test_a_validation_split_is_that_of_the_inputs(network, digits):
    x, y = digits
    made = []
    for shared in (False, True):
        keras.utils.set_random_seed(0)
        model = lp.transfer_model(network, 10)
        given = {"x": x, "y": y, "validation_split": 0.25, "epochs": 2, "verbose": 0}
        history = model.fit(**(SharedFeatures(model).replace(given) if shared else given))
        made.append([np.array(history.history["val_loss"])])
    assert_same(*made)


def test_bad_data_are_refused_before_anything_is_computed(network, digits):
    model = lp.transfer_model(network, 10)
    x, y = digits
    with pytest.raises(ValueError, match="from 0 to 9"):
        SharedFeatures(model).replace({"x": x, "y": y + 5})
    with pytest.raises(ValueError, match="must be finite"):
        SharedFeatures(model).replace({"x": np.full_like(x, np.nan), "y": y})
    assert Counting.seen == 0
