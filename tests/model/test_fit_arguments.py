"""The arguments of `fit` with every form of data and missing labels, against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_lp as lp
from tests.conftest import Batches, with_random_heads

COUNT = 48
NAMES = ["a", "b", "c"]
FORMS = ("arrays", "tensors", "dataset", "sequence", "generator")


def examples(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(COUNT, 4)).astype("float32")
    y = rng.integers(-1, 3, COUNT).astype("int32")  # a quarter is missing
    weights = rng.uniform(0.5, 2, COUNT).astype("float32")
    return x, y, weights


def build(trainable):
    """A model that stands still, so that each epoch has the same figures."""
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, "relu")])
    model = lp.transfer_model(
        backbone, NAMES, trainable=trainable, optimizer=keras.optimizers.SGD(0.0)
    )
    return with_random_heads(model)


def in_form(form, parts, size, steps):
    """Returns the arguments of `fit` for data in a form."""
    if form in ("arrays", "tensors"):
        parts = [tf.constant(part) for part in parts] if form == "tensors" else parts
        names = ("x", "y", "sample_weight")
        return {**dict(zip(names, parts, strict=False)), "batch_size": size}
    if form == "sequence":
        return {"x": Batches(*parts, size=size)}
    batches = [tuple(part[i : i + size] for part in parts) for i in range(0, COUNT, size)]
    if form == "generator":
        endless = (batch for _ in range(100) for batch in batches)
        return {"x": endless, "steps_per_epoch": len(batches)}
    data = tf.data.Dataset.from_tensor_slices(tuple(parts)).batch(size)
    return {"x": data.repeat(), "steps_per_epoch": len(batches)} if steps else {"x": data}


def weights_of_classes(class_weight, y):
    if class_weight is None:
        return np.ones(len(y))
    if class_weight == "balanced":
        counts = np.bincount(y[y >= 0], minlength=3)
        table = counts.sum() / (3 * counts)
    else:
        table = np.array([class_weight.get(name, class_weight.get(i, 1.0))
                          for i, name in enumerate(NAMES)])  # fmt: skip
    return table[y]


def figures(model, x, y, weights):
    """Loss and accuracy over the labels present, in NumPy."""
    logits = model.predict(x, verbose=0).astype("float64")
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    weights = weights * (y >= 0)
    right = logits.argmax(1) == y
    return {
        "loss": np.sum(losses * weights) / weights.sum(),
        "accuracy": np.sum(right * weights) / weights.sum(),
    }


@settings(max_examples=20, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    trainable=st.sampled_from(["all", "head"]),
    class_weight=st.sampled_from([None, {"b": 4.0}, {0: 0.5, 2: 3.0}, "balanced"]),
    weighted=st.booleans(),
    size=st.sampled_from([8, 16, 48]),
    steps=st.booleans(),
    shuffle=st.booleans(),
    initial_epoch=st.integers(0, 1),
    validation=st.sampled_from([None, "arrays", "weights", "dataset", "split"]),
    validation_freq=st.sampled_from([1, 2, [2]]),
)
def test_arguments_of_fit_with_missing_labels(
    form, trainable, class_weight, weighted, size, steps, shuffle, initial_epoch, validation,
    validation_freq,
):  # fmt: skip
    x, y, weights = examples(0)
    model = build(trainable)
    arguments = in_form(form, (x, y, weights) if weighted else (x, y), size, steps)
    arguments |= {"class_weight": class_weight, "shuffle": shuffle, "verbose": 0}
    arguments |= {"epochs": 2, "initial_epoch": initial_epoch, "validation_freq": validation_freq}
    val_x, val_y, val_weights = examples(1)
    rows, val = np.arange(COUNT), None
    if validation == "split" and form in ("arrays", "tensors"):
        arguments["validation_split"] = 0.25
        rows = rows[:36]
        val = (x[36:], y[36:], weights[36:] if weighted else np.ones(12))
    elif validation in ("arrays", "weights"):
        arguments["validation_data"] = (val_x, val_y, val_weights)[: 2 + (validation == "weights")]
        val = (val_x, val_y, val_weights if validation == "weights" else np.ones(COUNT))
        arguments["validation_batch_size"] = 10
    elif validation == "dataset":
        data = tf.data.Dataset.from_tensor_slices((val_x, val_y)).batch(16)
        arguments |= {"validation_data": data.repeat(), "validation_steps": 3}
        val = (val_x, val_y, np.ones(COUNT))
    if class_weight == "balanced" and form == "generator":
        with pytest.raises(ValueError, match="can be read only once"):
            model.fit(**arguments)
        return
    history = model.fit(**arguments).history
    of_all = y if class_weight != "balanced" else y[rows]
    table = weights_of_classes(class_weight, of_all)[: len(rows)]
    own = (weights if weighted else np.ones(COUNT))[rows] * table
    epochs = 2 - initial_epoch
    for name, value in figures(model, x[rows], y[rows], own).items():
        np.testing.assert_allclose(history[name], [value] * epochs, atol=2e-5, err_msg=name)
    if val is None:
        assert not any(name.startswith("val_") for name in history)
        return
    rounds = range(initial_epoch + 1, 3)
    due = [n for n in rounds if n == 2 or validation_freq == 1]
    for name, value in figures(model, *val).items():
        np.testing.assert_allclose(history[f"val_{name}"], [value] * len(due), atol=2e-5)
