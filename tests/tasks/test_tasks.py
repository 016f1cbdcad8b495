import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.tasks.classification import as_task
from keras_lp.tasks.heads import Head

nan = float("nan")


@pytest.mark.parametrize("names", [["cat", "dog"], ("cat", "dog")])
def test_names_mean_classification(names):
    task = as_task(names)
    assert task == lp.Classification(["cat", "dog"])
    assert task.class_names == ("cat", "dog")
    assert task.units == 2


def test_a_number_names_the_classes_by_their_index():
    assert as_task(3).class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lp.Classification(1), ValueError, "at least 2 classes. Received: classes=1"),
        (lambda: lp.MultiLabel([]), ValueError, "at least 1 classes"),
        (lambda: lp.Classification("cat"), TypeError, "number of classes or their names"),
        (lambda: lp.Classification(2.5), TypeError, "classes=2.5 of type float"),
        (lambda: lp.Classification([1, 2]), TypeError, "must be strings"),
        (lambda: lp.Classification(["a", "a"]), ValueError, "must differ"),
        (lambda: lp.Regression(0), ValueError, "`units` of 1 or more"),
        (lambda: lp.Classification(3, weight=-1), ValueError, "`weight` of Classification"),
        (lambda: lp.Regression(weight="1"), ValueError, "`weight` of Regression"),
        (lambda: lp.Classification(3, class_weight={3: 1.0}), ValueError, "3: 1.0; the classes"),
        (lambda: lp.Classification(["a", "b"], class_weight={"c": 1}), ValueError, "'c': 1"),
        (lambda: lp.MultiLabel(2, class_weight={0: -1.0}), ValueError, "0: -1.0"),
        (lambda: lp.MultiLabel(2, label_smoothing=1), ValueError, "label_smoothing=1"),
        (lambda: lp.MultiLabel(2, thresholds=1), ValueError, "above 0 and below 1.*0: 1; the"),
        (lambda: lp.MultiLabel(2, thresholds=[0.5, 0.0]), ValueError, "1: 0.0"),
        (lambda: lp.MultiLabel(2, thresholds=[0.5, nan]), ValueError, "1: nan"),
        (lambda: lp.MultiLabel(2, thresholds=[0.5]), ValueError, r"\[0.5\] for 2 labels"),
        (lambda: lp.MultiLabel(2, thresholds="ab"), ValueError, "0: 'a'"),
        (lambda: lp.MultiLabel(2, thresholds=True), ValueError, "thresholds=True"),
        (lambda: lp.MultiLabel(["a", "b"], thresholds={"c": 0.5}), ValueError, "'c': 0.5; the cla"),
        (lambda: lp.MultiLabel(2, thresholds={2: 0.5}), ValueError, "2: 0.5"),
        (lambda: lp.Classification(3, metrics=["acu"]), ValueError, "mean 'auc'"),
        (lambda: lp.MultiLabel(3, metrics=["balanced_accuracy"]), ValueError, r"are \['auc'\]"),
        (lambda: lp.Regression(metrics=["auc"]), ValueError, r"are \[\]"),
        (lambda: lp.Classification(3, metrics="auc"), TypeError, "keras.metrics objects"),
        (lambda: lp.Classification(3, loss="hinge"), ValueError, "'hinge'"),
        (
            lambda: lp.Classification(3, loss=keras.losses.CategoricalCrossentropy()),
            ValueError,
            "from_logits=False",
        ),
        (
            lambda: lp.Classification(3, loss=keras.losses.CategoricalHinge(), label_smoothing=0.1),
            ValueError,
            "its own label smoothing",
        ),
        (lambda: lp.Classification(3, class_weight="even"), ValueError, "'even'"),
        (lambda: lp.Regression(hidden_units=8), TypeError, "list of layer sizes"),
        (lambda: lp.Regression(hidden_units=[0]), ValueError, "integer of 1 or more"),
        (lambda: as_task({"a": 2}), TypeError, "lp.multitask_model"),
        (lambda: as_task(None), TypeError, "task=None"),
    ],
)
def test_wrong_tasks_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "task",
    [
        lp.Classification(3),
        lp.Classification(["a", "b"], class_weight={"b": 2.0}, label_smoothing=0.1, weight=0.5),
        lp.MultiLabel(2, class_weight={0: 3.0}, hidden_units=[4]),
        lp.MultiLabel(["a", "b"], thresholds={"b": 0.2}),
        lp.Regression(4, mean=1, std=[1, 2, 3, 4]),
    ],
)
def test_a_head_carries_its_task_through_its_config(task):
    head = Head(task, name="out")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(head))
    assert again.task == task
    assert again.units == task.units
    assert again.name == "out"


def test_a_head_stays_in_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert Head(lp.Classification(2)).compute_dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


def masked(task, y, y_pred, weight=None):
    labels, outputs, weights = task.mask_missing(y, np.asarray(y_pred, "float32"), weight)
    return float(task.make_loss()(labels, outputs, weights)), np.asarray(weights)


def test_classification_loss_is_the_mean_over_labels_present():
    logits = np.log([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])
    loss, weights = masked(lp.Classification(2), [0, 1, -1], logits)
    assert loss == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2, abs=1e-6)
    assert weights.tolist() == [1, 1, 0]


def test_multilabel_loss_is_the_mean_over_entries_present():
    y_pred = np.array([[0.0, 2.0], [-1.0, 3.0]])
    loss, weights = masked(lp.MultiLabel(2), [[1, -1], [0, 1]], y_pred)
    entries = [np.log(2), np.log1p(np.exp(-1.0)), np.log1p(np.exp(-3.0))]
    assert loss == pytest.approx(np.mean(entries), abs=1e-6)
    assert weights.tolist() == [[1, 0], [1, 1]]


def test_regression_loss_is_the_mean_over_entries_present():
    loss, _ = masked(lp.Regression(2), [[1.0, nan], [3.0, 5.0]], [[2.0, 9.0], [3.0, 1.0]])
    assert loss == pytest.approx((1 + 0 + 16) / 3)


def test_regression_takes_labels_without_an_axis_of_their_own():
    loss, _ = masked(lp.Regression(), [1.0, nan, 4.0], [[2.0], [9.0], [2.0]])
    assert loss == pytest.approx((1 + 4) / 2)


def test_sample_weights_multiply_the_labels_present():
    loss, _ = masked(lp.Regression(), [1.0, nan, 4.0], [[2.0], [9.0], [2.0]], [3.0, 5.0, 1.0])
    assert loss == pytest.approx((3 * 1 + 1 * 4) / 4)


@pytest.mark.parametrize(
    ("task", "y_pred"),
    [
        (lp.Classification(2), np.zeros((3, 2))),
        (lp.MultiLabel(2), np.zeros((3, 2))),
        (lp.Regression(2), np.zeros((3, 2))),
    ],
)
def test_an_absent_task_costs_exactly_nothing(task, y_pred):
    loss, weights = masked(task, None, y_pred)
    assert loss == 0.0
    assert not weights.any()


@pytest.mark.parametrize(
    ("task", "y", "error", "message"),
    [
        (lp.Classification(3), np.array([0, 3]), ValueError, "from 0 to 2.*label 3"),
        (lp.Classification(3), np.array([0, -2]), ValueError, "label -2"),
        (lp.Classification(3), np.array([0.5]), ValueError, "label 0.5"),
        (lp.Classification(3), np.array(["cat"]), ValueError, "class names.*'cat'"),
        (lp.Classification(["cat", "dog"]), np.array(["cat", "dgo"]), ValueError, "mean 'dog'"),
        (lp.Classification(3), np.array([[0, 1, 1]]), ValueError, r"sum to 1.*\[0.0, 1.0, 1.0\]"),
        (lp.Classification(3), np.array([[0.5, 0.4, 0]]), ValueError, "sum to 1"),
        (lp.Classification(3), np.array([[np.nan, 0, 1]]), ValueError, "sum to 1"),
        (lp.MultiLabel(2), np.array([["a", "b"]]), TypeError, "must be numbers"),
        (lp.MultiLabel(2), np.array([0, 1]), ValueError, r"shape \(examples, 2\)"),
        (lp.MultiLabel(2), np.array([[0, 2]]), ValueError, "0 or 1"),
        (lp.Regression(), np.array([np.inf]), ValueError, "1 infinite"),
    ],
)
def test_labels_that_a_task_cannot_learn_are_refused(task, y, error, message):
    with pytest.raises(error, match=message):
        task.check_labels(y)


@pytest.mark.parametrize(
    ("task", "y"),
    [
        (lp.Classification(3), np.array([0, 2, -1])),
        (lp.MultiLabel(2), np.array([[0, -1], [1, 0]])),
        (lp.Regression(), np.array([1.5, nan])),
    ],
)
def test_missing_labels_pass_the_check(task, y):
    task.check_labels(y)


def test_decode_predictions_gives_names_and_probabilities(mlp):
    model = lp.transfer_model(mlp(), ["cat", "dog", "cow"])
    logits = np.log([[0.2, 0.5, 0.3], [0.7, 0.2, 0.1]])
    decoded = lp.decode_predictions(model, logits, top=2)
    assert [[name for name, _ in row] for row in decoded] == [["dog", "cow"], ["cat", "dog"]]
    np.testing.assert_allclose([[p for _, p in row] for row in decoded], [[0.5, 0.3], [0.7, 0.2]])


def test_decode_predictions_of_several_tasks_is_a_dict(mlp):
    tasks = {"tags": lp.MultiLabel(["x", "y"]), "age": lp.Regression()}
    model = lp.multitask_model(mlp(), tasks)
    decoded = lp.decode_predictions(
        model, {"tags": np.array([[0.0, 2.0]]), "age": np.array([[41.0]])}
    )
    assert decoded["tags"] == [[("y", pytest.approx(1 / (1 + np.exp(-2.0))))]]
    assert decoded["age"].tolist() == [[41.0]]


def test_thresholds_are_one_a_label_however_they_are_given():
    for thresholds in ([0.5, 0.2], (0.5, 0.2), np.array([0.5, 0.2]), {"b": 0.2}, {1: 0.2}):
        assert lp.MultiLabel(["a", "b"], thresholds=thresholds).thresholds == (0.5, 0.2)
    assert lp.MultiLabel(3, thresholds=0.3).thresholds == (0.3, 0.3, 0.3)
    assert lp.MultiLabel(2).thresholds is None


def test_decode_predictions_gives_the_answer_of_each_task(mlp):
    tasks = {
        "tags": lp.MultiLabel(["x", "y", "z"], thresholds={"z": 0.9}),
        "pet": ["cat", "dog"],
        "age": lp.Regression(),
    }
    model = lp.multitask_model(mlp(), tasks)
    outputs = {
        "tags": np.array([[1.0, 2.0, 2.1], [0.0, -1.0, 2.3]]),  # sigmoid(2.1) is 0.89
        "pet": np.array([[0.0, 1.0], [3.0, 1.0]]),
        "age": np.array([[41.0], [3.0]]),
    }
    decoded = lp.decode_predictions(model, outputs, top=None)
    assert [[name for name, _ in row] for row in decoded["tags"]] == [["y", "x"], ["z"]]
    assert [[name for name, _ in row] for row in decoded["pet"]] == [["dog"], ["cat"]]
    assert decoded["age"].tolist() == [[41.0], [3.0]]
    several = lp.decode_predictions(model, outputs, top=2)["tags"]
    assert [[name for name, _ in row] for row in several] == [["z", "y"], ["z", "x"]]
    with pytest.raises(ValueError, match="1 or more, or None"):
        lp.decode_predictions(model, outputs, top=0)


def test_decode_predictions_refuses_what_it_cannot_name(mlp):
    model = lp.transfer_model(mlp(), 3)
    with pytest.raises(ValueError, match=r"\(examples, 3\)"):
        lp.decode_predictions(model, np.zeros((2, 4)))
    with pytest.raises(ValueError, match="keras_lp built"):
        lp.decode_predictions(keras.Sequential([keras.layers.Dense(2)]), np.zeros((2, 2)))
    several = lp.multitask_model(mlp(), {"a": 2, "b": 2})
    with pytest.raises(ValueError, match="a dict"):
        lp.decode_predictions(several, np.zeros((2, 2)))


LOGITS = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], "float32")


def loss_of(task, y, outputs=LOGITS):
    head = Head(task, name="out")
    head.build((None, 4))
    return float(head.compute_loss(task.make_loss(), np.array(y), outputs, None)[0])


def test_weights_of_classes_give_the_weighted_mean():
    task = lp.Classification(["a", "b", "c"], class_weight={"a": 4.0, 2: 0.5})
    each = -np.log(np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True))
    y, weights = [0, 2, -1, 1], np.array([4.0, 0.5, 1.0])
    expected = np.average(each[[0, 1, 3], [0, 2, 1]], weights=weights)
    assert loss_of(task, y) == pytest.approx(expected, rel=1e-6)


def test_smoothed_labels_give_the_crossentropy_with_the_smoothed_distribution():
    log_p = np.log(np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True))
    target = 0.9 * np.eye(3)[[0, 2, 1]] + 0.1 / 3
    expected = -(target * log_p[[0, 1, 3]]).sum(-1).mean()
    task = lp.Classification(3, label_smoothing=0.1)
    assert loss_of(task, [0, 2, -1, 1]) == pytest.approx(expected, rel=1e-6)


def test_multi_label_weighs_the_positive_entries_of_a_label():
    task = lp.MultiLabel(3, class_weight={1: 5.0}, label_smoothing=0.2)
    y = np.array([[1, 0, -1], [0, 1, 1], [-1, -1, -1], [1, 1, 0]])
    target = np.where(y == 1, 0.9, 0.1)
    each = np.log1p(np.exp(-LOGITS)) * target + np.log1p(np.exp(LOGITS)) * (1 - target)
    weights = np.where(y == -1, 0, np.where(y == 1, [1.0, 5.0, 1.0], 1.0))
    assert loss_of(task, y) == pytest.approx(np.average(each, weights=weights), rel=1e-5)


def test_regression_loss_is_in_units_of_the_deviation():
    task = lp.Regression(3, mean=0, std=[1.0, 2.0, 4.0])
    y = np.array([[1, 2, nan], [0, nan, 5], [nan, nan, nan], [1, 1, 1]], "float32")
    expected = np.nanmean(((LOGITS - y) / [1, 2, 4]) ** 2)
    assert loss_of(task, y) == pytest.approx(expected, rel=1e-6)


def test_options_of_a_task_reach_the_model(mlp, digits):
    top = keras.metrics.SparseTopKCategoricalAccuracy(3, name="top3")
    tasks = {
        "digit": lp.Classification(10, weight=2.0, metrics=[top], hidden_units=[6]),
        "odd": 2,
    }
    model = lp.multitask_model(mlp(), tasks, hidden_units=[5])
    assert model.get_layer("digit_hidden_0").units == 6
    assert model.get_layer("odd_hidden_0").units == 5
    x, y = digits
    logs = model.evaluate(x, {"digit": y, "odd": y % 2}, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(2 * logs["digit_loss"] + logs["odd_loss"], rel=1e-5)
    logits = model(x)["digit"].numpy()
    before = (logits > logits[np.arange(200), y][:, None]).sum(-1)  # equal ones count as found
    assert logs["digit_top3"] == pytest.approx((before < 3).mean(), abs=1e-6)


def test_metrics_of_a_task_survive_its_config():
    task = lp.MultiLabel(2, metrics=[keras.metrics.AUC(from_logits=True, name="auc")])
    config = keras.saving.serialize_keras_object(Head(task))
    again = keras.saving.deserialize_keras_object(config).task
    assert [metric.name for metric in again.make_metrics()] == ["f1", "map", "auc"]
    assert again.make_metrics()[2] is not again.make_metrics()[2]


def test_class_weights_of_keras_are_refused_where_there_are_several_tasks(mlp, digits):
    model = lp.multitask_model(mlp(), {"a": 10, "b": 10})
    with pytest.raises(ValueError, match=r"lp.Classification\(..., class_weight=...\)"):
        model.fit(digits[0], {"a": digits[1]}, class_weight={0: 2.0}, verbose=0)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            lp.Classification(2, metrics=[keras.metrics.Precision()]),
            r"Classification must take labels of shape \(2,\) and outputs.*\(2, 2\).*'precision'.*"
            r"Metric names are \['f1'",
        ),
        (lp.Classification(3, metrics=[keras.metrics.AUC(from_logits=True)]), "of type AUC"),
        (lp.Classification(3, metrics=[keras.metrics.F1Score()]), "of type F1Score"),
        (lp.MultiLabel(3, metrics=[keras.metrics.F1Score()]), "of type F1Score"),
    ],
)
def test_metrics_that_cannot_take_the_outputs_are_refused_by_the_builder(mlp, task, message):
    with pytest.raises(ValueError, match=message):
        lp.transfer_model(mlp(), task)


def test_metrics_of_keras_start_without_an_example(mlp, digits):
    task = lp.Classification(10, metrics=[keras.metrics.SparseTopKCategoricalAccuracy(3)])
    model = lp.transfer_model(mlp(), task, trainable="all")
    x, y = digits
    found = model.evaluate(x, y, verbose=0, return_dict=True)["sparse_top_k_categorical_accuracy"]
    order = np.argsort(-model.predict(x, verbose=0), axis=1)[:, :3]
    assert found == pytest.approx((order == y[:, None]).any(1).mean())
