"""Results without a label: unknown, never 0, never the best."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp

TASKS = ("digit", "odd")
B_NAMES = ("odd_loss", "odd_accuracy")


@pytest.fixture
def examples(digits):
    x, y = digits
    return x, {"digit": y, "odd": y % 2}


@pytest.fixture
def model(mlp):
    return lp.multitask_model(mlp(), {"digit": 10, "odd": 2})


class Seen(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.logs = []

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))


MISSING = {
    "no key": lambda y: {"digit": y["digit"]},
    "all missing": lambda y: {**y, "odd": np.full_like(y["odd"], -1)},
}


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("dataset", [False, True], ids=["arrays", "dataset"])
def test_a_validation_without_labels_of_a_task_is_nan_and_hidden(model, examples, missing, dataset):
    x, y = examples
    val = (x, missing(y))
    if dataset:
        val = tf.data.Dataset.from_tensor_slices(val).batch(64)
    seen = Seen()
    history = model.fit(x, y, epochs=2, validation_data=val, callbacks=[seen], verbose=0).history
    for name in B_NAMES:
        assert np.isnan(history[f"val_{name}"]).all()
        assert np.isfinite(history[name]).all()
        assert all(f"val_{name}" not in logs and name in logs for logs in seen.logs)
    expected = model.evaluate(x, {"digit": y["digit"]}, verbose=0, return_dict=True)
    assert np.isnan([expected.pop(name) for name in B_NAMES]).all()
    for name, value in expected.items():
        assert history[f"val_{name}"][-1] == pytest.approx(value, abs=1e-6)
    # The loss is that of the other task, by NumPy.
    logits = model.predict(x, verbose=0)["digit"].astype("float64")
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(x)), y["digit"]]
    assert expected["loss"] == pytest.approx(losses.mean(), abs=1e-5)


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
def test_an_epoch_without_labels_of_a_task_is_nan_and_hidden(model, examples, missing):
    x, y = examples
    seen = Seen()
    history = model.fit(
        x, missing(y), validation_data=(x, y), callbacks=[seen], epochs=2, verbose=0
    ).history
    for name in B_NAMES:
        assert np.isnan(history[name]).all()
        assert np.isfinite(history[f"val_{name}"]).all()
        assert all(name not in logs and f"val_{name}" in logs for logs in seen.logs)


def test_an_epoch_with_labels_again_is_seen_again(model, examples):
    x, y = examples
    seen, none = Seen(), {"digit": y["digit"], "odd": np.full_like(y["odd"], -1)}
    batches = [(x, labels) for labels in (y, none, y)]
    data = tf.data.Dataset.from_generator(
        lambda: iter(batches),
        output_signature=tf.nest.map_structure(tf.TensorSpec.from_tensor, (
            tf.constant(x), tf.nest.map_structure(tf.constant, y)
        )),
    )  # fmt: skip
    history = model.fit(
        data.repeat(), steps_per_epoch=1, epochs=3, callbacks=[seen], verbose=0
    ).history
    assert list(np.isnan(history["odd_accuracy"])) == [False, True, False]
    assert ["odd_accuracy" in logs for logs in seen.logs] == [True, False, True]


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
def test_early_stopping_does_not_take_it_for_the_best(model, examples, missing):
    x, y = examples
    stopping = keras.callbacks.EarlyStopping(
        "val_odd_loss", patience=1, mode="min", restore_best_weights=True
    )
    with pytest.warns(UserWarning, match="not available. Available metrics"):
        history = model.fit(
            x, y, epochs=3, validation_data=(x, missing(y)), callbacks=stopping, verbose=0
        ).history
    assert len(history["loss"]) == 3
    assert stopping.best is None or not np.isfinite(stopping.best)


def test_a_callback_list_and_sample_weights_of_0(model, examples):
    x, y = examples
    seen = Seen()
    given = keras.callbacks.CallbackList([seen], add_history=True, model=model, epochs=1)
    weights = {"digit": np.ones(200), "odd": np.zeros(200)}
    history = model.fit(x, y, sample_weight=weights, callbacks=given, verbose=0).history
    assert np.isnan(history["odd_loss"][0])
    assert "odd_loss" not in seen.logs[0]
    assert history["digit_loss"][0] > 0
    assert [one for one in given.callbacks if isinstance(one, keras.callbacks.History)]


def test_one_task_without_labels(mlp, digits):
    x, y = digits
    model = lp.transfer_model(mlp(), 10, trainable="all")
    none = np.full_like(y, -1)
    assert np.isnan(model.evaluate(x, none, verbose=0)).all()
    history = model.fit(x, y, validation_data=(x, none), verbose=0).history
    assert np.isnan([history["val_loss"][0], history["val_accuracy"][0]]).all()
    with_labels = model.evaluate(x[:50], y[:50], verbose=0)
    half = np.where(np.arange(200) < 50, y, -1)
    np.testing.assert_allclose(model.evaluate(x, half, verbose=0), with_labels, atol=1e-5)


def test_the_weights_of_balanced_tasks_need_no_label(mlp, examples):
    x, y = examples
    model = lp.multitask_model(mlp(), {"digit": 10, "odd": 2}, balancing="mgda")
    history = model.fit(x, {"digit": y["digit"]}, verbose=0).history
    assert history["odd_weight"] == [0]
    assert np.isnan(history["odd_loss"][0])
