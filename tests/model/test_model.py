"""The model subclass: missing labels, checks before training, saving."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.tasks.heads import tasks as lp_tasks

nan = float("nan")


@pytest.fixture
def two_heads(mlp):
    """Two heads of equal shape and one of another."""
    return lp.multitask_model(mlp(), {"zebra": 4, "ant": 4, "value": lp.Regression(2)})


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    zebra, ant = rng.integers(-1, 4, 50), rng.integers(-1, 4, 50)
    ant[:40] = -1  # so batches differ in their counts
    value = rng.normal(size=(50, 2)).astype("float32")
    value[rng.random((50, 2)) < 0.4] = nan
    return {"zebra": zebra, "ant": ant, "value": value}


def numpy_results(model, x, labels, std=1.0):
    """Loss and metrics of each task over its labels present, in float64.

    `std` are the deviations that the regression's loss is in units of.
    """
    outputs = {name: np.asarray(out, "float64") for name, out in model(x).items()}
    logs = {}
    for name in ("zebra", "ant"):
        known = labels[name] >= 0
        logits, y = outputs[name][known], labels[name][known]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        logs[f"{name}_loss"] = -logp[np.arange(len(y)), y].mean()
        logs[f"{name}_accuracy"] = np.mean(logits.argmax(-1) == y)
    error = outputs["value"] - labels["value"]
    logs["value_loss"] = np.nanmean((error / std) ** 2)
    logs["value_mae"] = np.nanmean(np.abs(error))
    logs["loss"] = sum(value for name, value in logs.items() if name.endswith("_loss"))
    return logs


@pytest.mark.parametrize("batch_size", [50, 7])
def test_masked_loss_and_metrics_equal_numpy(two_heads, digits, labels, batch_size):
    x = digits[0][:50]
    logs = two_heads.evaluate(x, labels, batch_size=batch_size, verbose=0, return_dict=True)
    expected = numpy_results(two_heads, x, labels)
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        assert logs[name] == pytest.approx(value, abs=1e-6), name


def test_history_of_fit_counts_labels_too(two_heads, digits, labels):
    x = digits[0][:50]
    two_heads.compile(
        "sgd",
        loss=two_heads.loss,
        weighted_metrics=two_heads._compile_metrics._user_weighted_metrics,
    )
    two_heads.optimizer.learning_rate = 0.0
    history = two_heads.fit(x, labels, batch_size=7, verbose=0).history
    std = np.nanstd(labels["value"], axis=0)
    for name, value in numpy_results(two_heads, x, labels, std).items():
        assert history[name][0] == pytest.approx(value, abs=1e-6), name


def test_evaluate_as_a_list_names_each_result_once(two_heads, mlp, digits, labels):
    assert len(two_heads.evaluate(digits[0][:50], labels, verbose=0)) == 7
    single = lp.transfer_model(mlp(), 10)
    loss, accuracy = single.evaluate(*digits, verbose=0)
    logs = single.evaluate(*digits, verbose=0, return_dict=True)
    assert logs == {"loss": loss, "accuracy": accuracy}


def test_missing_labels_give_the_gradients_of_the_labels_present(mlp, digits):
    x, y = digits
    known = np.arange(200) < 60
    tasks = {"a": 10, "b": 10}
    some, all_known = (lp.multitask_model(mlp(), tasks, optimizer="sgd") for _ in range(2))
    all_known.set_weights(some.get_weights())
    some.train_on_batch(x, {"a": np.where(known, y, -1), "b": np.full(200, -1)})
    all_known.train_on_batch(x[known], {"a": y[known]})
    for a, b in zip(some.get_weights(), all_known.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_a_task_absent_from_the_labels_leaves_its_head_alone(two_heads, digits, labels):
    before = [v.numpy() for v in two_heads.get_layer("ant").weights]
    two_heads.fit(digits[0][:50], {"zebra": labels["zebra"]}, verbose=0)
    for old, new in zip(before, two_heads.get_layer("ant").weights, strict=True):
        np.testing.assert_array_equal(old, new.numpy())


def test_heads_of_equal_shape_learn_their_own_labels(mlp, digits):
    x, y = digits
    model = lp.multitask_model(mlp((32,)), {"zebra": 10, "ant": 10}, learning_rate=1e-2)
    model.fit(x, {"zebra": y, "ant": 9 - y}, epochs=30, verbose=0)
    outputs = model.predict(x, verbose=0)
    assert np.mean(outputs["zebra"].argmax(-1) == y) > 0.9
    assert np.mean(outputs["ant"].argmax(-1) == 9 - y) > 0.9


def test_sample_weights_weigh_each_task(two_heads, digits, labels):
    """A weight of 0 is as good as a missing label."""
    x = digits[0][:50]
    drop = np.arange(50) % 3 == 0
    weights = {"zebra": np.where(drop, 0.0, 1.0), "ant": np.ones(50), "value": np.ones(50)}
    weighted = two_heads.evaluate(
        x, labels, sample_weight=weights, batch_size=7, verbose=0, return_dict=True
    )
    masked = two_heads.evaluate(
        x, {**labels, "zebra": np.where(drop, -1, labels["zebra"])},
        batch_size=7, verbose=0, return_dict=True,
    )  # fmt: skip
    for name, value in masked.items():
        assert weighted[name] == pytest.approx(value, abs=1e-6)


def test_class_weight_of_one_task_equals_plain_keras(mlp, digits):
    x, y = digits
    class_weight = {0: 3.0, 1: 0.5}
    model = lp.transfer_model(mlp(), 10, optimizer="sgd", trainable="all")
    plain = keras.models.clone_model(model)
    plain = keras.Sequential([keras.Input((64,)), plain.layers[1], keras.layers.Dense(10)])
    plain.set_weights(model.get_weights())
    plain.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    # Keras divides by the batch size, keras_lp by the sum of the weights.
    weights = np.array([class_weight.get(int(label), 1.0) for label in y])
    plain.optimizer.learning_rate = 0.01
    model.optimizer.learning_rate = 0.01 * weights.sum() / 200
    plain.fit(x, y, class_weight=class_weight, batch_size=200, verbose=0)
    model.fit(x, y, class_weight=class_weight, batch_size=200, verbose=0)
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_penalties_stay_in_the_loss(digits):
    backbone = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.1))]
    )
    model = lp.multitask_model(backbone, {"a": 10, "b": 10})
    logs = model.evaluate(digits[0], {"a": digits[1]}, verbose=0, return_dict=True)
    penalty = 0.1 * float((backbone.get_weights()[0] ** 2).sum())
    assert logs["loss"] == pytest.approx(logs["a_loss"] + penalty, rel=1e-5)


@pytest.mark.parametrize("form", ["arrays", "dataset", "validation arrays", "validation dataset"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (np.where(x == x[3, 3], nan, x), y), "Inputs must be finite"),
        (lambda x, y: (x, y + 5), "Labels must be class numbers from 0 to 9"),
    ],
    ids=["nan", "label"],
)
def test_fit_refuses_bad_examples(mlp, digits, form, spoil, message):
    good, bad = digits, spoil(*digits)
    model = lp.transfer_model(mlp(), 10)
    before = model.get_weights()

    def as_dataset(data):
        return tf.data.Dataset.from_tensor_slices(data).batch(200)

    call = {
        "arrays": lambda: model.fit(*bad, verbose=0),
        "dataset": lambda: model.fit(as_dataset(bad), verbose=0),
        "validation arrays": lambda: model.fit(*good, validation_data=bad, verbose=0),
        "validation dataset": lambda: model.fit(*good, validation_data=as_dataset(bad), verbose=0),
    }[form]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
    if form != "validation dataset":  # that one is reached after the first epoch
        for old, new in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)


def test_a_checked_dataset_trains_as_the_arrays_do(mlp, digits):
    a, b = (lp.transfer_model(mlp(), 10, optimizer="sgd") for _ in range(2))
    b.set_weights(a.get_weights())
    a.fit(*digits, batch_size=20, shuffle=False, verbose=0)
    weights = np.ones(200, "float32")
    b.fit(tf.data.Dataset.from_tensor_slices((*digits, weights)).batch(20), verbose=0)
    for left, right in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-7)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ({"zebr": np.zeros(5)}, r"named after the tasks.*Did you mean 'zebra'"),
        (np.zeros(5), "a dict by task"),
    ],
)
def test_fit_refuses_labels_that_no_task_owns(two_heads, y, message):
    with pytest.raises(ValueError, match=message):
        two_heads.fit(np.zeros((5, 64)), y, verbose=0)


@pytest.mark.parametrize("call", ["fit", "evaluate", "train_on_batch", "dataset", "generator"])
@pytest.mark.parametrize(
    ("y", "message"), [(None, "y=None|pairs"), ({"zebr": np.zeros(5)}, "Did you mean 'zebra'")]
)
def test_no_labels_or_misnamed_ones_are_refused_everywhere(two_heads, call, y, message):
    x = np.zeros((5, 64), "float32")
    data = x if y is None else (x, y)
    calls = {
        "fit": lambda: two_heads.fit(x, y, verbose=0),
        "evaluate": lambda: two_heads.evaluate(x, y, verbose=0),
        "train_on_batch": lambda: two_heads.train_on_batch(x, y),
        "dataset": lambda: two_heads.fit(
            tf.data.Dataset.from_tensors(data), shuffle=False, verbose=0
        ),
        "generator": lambda: two_heads.fit(
            (item for item in [(x,) if y is None else data]), verbose=0
        ),
    }
    with pytest.raises(ValueError, match=message):
        calls[call]()


def test_labels_of_one_output_are_an_array(mlp, digits):
    model = lp.transfer_model(mlp(), 10)
    with pytest.raises(ValueError, match="an array"):
        model.fit(digits[0], {"predictions": digits[1]}, verbose=0)
    with pytest.raises(ValueError, match="labels"):
        model.fit(digits[0], verbose=0)
    with pytest.raises(ValueError, match="a dict by task"):
        lp.multitask_model(mlp(), {"a": 10}).fit(*digits, verbose=0)


@pytest.mark.parametrize(("units", "shape"), [(1, (200, 3)), (2, (200,)), (2, (200, 3))])
def test_labels_of_another_shape_are_refused(mlp, digits, units, shape):
    model = lp.transfer_model(mlp(), lp.Regression(units))
    with pytest.raises(ValueError, match="must have the shape"):
        model.fit(digits[0], np.zeros(shape), verbose=0)


def test_unknown_names_in_a_dataset_are_refused(mlp, digits):
    dataset = tf.data.Dataset.from_tensor_slices((digits[0], ["cat"] * 200)).batch(20)
    with pytest.raises(ValueError, match=r"^Labels that are names.*'cat'"):
        lp.transfer_model(mlp(), 10).fit(dataset, verbose=0)


def test_an_unbatched_data_set_is_refused(mlp, digits):
    model = lp.transfer_model(mlp(), 10)
    single = tf.data.Dataset.from_tensor_slices(digits)
    for call in (model.fit, model.evaluate, model.predict, lambda d: lp.fit_head(model, d)):
        with pytest.raises(ValueError, match=r"Batch it: `dataset.batch\(32\)`"):
            call(single)
    with pytest.raises(ValueError, match="Batch it"):
        model.predict(single.map(lambda x, y: x))


def test_positional_validation_data_are_checked(mlp, digits):
    model = lp.transfer_model(mlp(), 10)
    bad = (digits[0], digits[1] + 5)
    with pytest.raises(ValueError, match="class numbers"):
        model.fit(*digits, 32, 1, 0, None, 0.0, bad)


def test_the_loss_shown_is_the_loss_trained(mlp, digits):
    x, y = digits
    model = lp.multitask_model(mlp(), {"a": 10, "b": 10})
    weighted = {name: task.make_metrics() for name, task in lp_tasks(model).items()}
    model.compile("sgd", model.loss, loss_weights={"a": 0.0, "b": 0.5}, weighted_metrics=weighted)
    logs = model.evaluate(x, {"a": y, "b": 9 - y}, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(0.5 * logs["b_loss"], rel=1e-5)
    single = lp.transfer_model(mlp(), 10)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    single.compile(
        "sgd",
        lambda y, y_pred: 2 * crossentropy(y, y_pred),
        weighted_metrics=lp.Classification(10).make_metrics(),
    )
    loss = single.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(2 * float(crossentropy(y, single(x))), rel=1e-5)


def test_fit_refuses_flags_changed_since_compile(mlp, digits):
    backbone = mlp()
    model = lp.transfer_model(backbone, 10)
    backbone.trainable = True
    with pytest.raises(ValueError, match=r"last `compile`.*'mlp'"):
        model.fit(*digits, verbose=0)


def test_training_a_shared_backbone_is_noticed_by_the_first_model(mlp, digits):
    backbone = mlp()
    first = lp.transfer_model(backbone, 10)
    lp.finetune_model(lp.transfer_model(backbone, 10))
    with pytest.raises(ValueError, match="layers are shared"):
        first.fit(*digits, verbose=0)


def test_names_survive_saving_and_cloning(mlp, tmp_path):
    model = lp.multitask_model(mlp(), {"pet": ["cat", "dog"], "age": lp.Regression()})
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    for again in (loaded, clone):
        assert isinstance(again, lp.Model)
        logits = {"pet": np.array([[0.0, 9.0]])}
        assert lp.decode_predictions(again, logits)["pet"][0][0][0] == "dog"
