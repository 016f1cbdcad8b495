"""Weights of classes, from the labels or given; losses and metrics for uneven classes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk
from sklearn.utils.class_weight import compute_class_weight

import keras_lp as lp
from keras_lp.federated.engine import installation
from tests.conftest import Batches, with_random_heads

needs_tff = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
NAMES = ["zero", "one", "more"]


def uneven(digits):
    """A class in ten, a class in ten, the rest; a fifth of the labels is missing."""
    x, y = digits
    return x, np.where(np.arange(200) % 5 == 0, -1, np.minimum(y, 2))


def balanced(y):
    present = y[y >= 0]
    return compute_class_weight("balanced", classes=np.unique(present), y=present)


def make(backbone, task, **options):
    options = {"optimizer": "sgd", "learning_rate": 0.1, **options}
    return lp.transfer_model(backbone, task, **options)


def head_of(model):
    return model.get_layer("predictions")


def one_hot(y, classes=3):
    return np.where(y[:, None] < 0, -1, np.eye(classes, dtype=int)[y])


@pytest.mark.parametrize("form", ["numbers", "one-hot", "names", "data set", "PyDataset"])
def test_balanced_weights_are_those_of_scikit_learn(mlp, digits, form):
    x, y = uneven(digits)
    labels = {"one-hot": one_hot(y), "names": np.array([*NAMES, ""])[y]}.get(form, y)
    data = {
        "data set": lambda: (tf.data.Dataset.from_tensor_slices((x, y)).batch(64),),
        "PyDataset": lambda: (Batches(x, y),),
    }.get(form, lambda: (x, labels))
    model = make(mlp(), lp.Classification(NAMES, class_weight="balanced"))
    model.fit(*data(), verbose=0)
    np.testing.assert_allclose(head_of(model).class_weight, balanced(y), rtol=1e-6)
    model.fit(x[:100], np.zeros(100, int), verbose=0)  # set by the first fit, and by no other
    np.testing.assert_allclose(head_of(model).class_weight, balanced(y), rtol=1e-6)


def test_a_balanced_task_trains_as_one_with_these_weights(mlp, digits, tmp_path):
    x, y = uneven(digits)
    backbone = mlp()
    one = make(backbone, lp.Classification(3, class_weight="balanced"))
    two = make(backbone, lp.Classification(3, class_weight=balanced(y)))
    for model in (one, two):
        model.fit(x, y, epochs=2, shuffle=False, verbose=0)
    np.testing.assert_allclose(head_of(one).kernel, head_of(two).kernel, atol=1e-6)
    one.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.evaluate(x, y, verbose=0) == pytest.approx(one.evaluate(x, y, verbose=0))
    lp.fit_head(one, (x, y), l2=0.01, verbose=0)
    lp.fit_head(two, (x, y), l2=0.01, verbose=0)
    np.testing.assert_allclose(head_of(one).kernel, head_of(two).kernel, atol=1e-4)


def test_multi_label_balances_positives_and_negatives(mlp, digits):
    x, y = digits
    labels = np.stack([y == 3, y > 3, y > 20], 1).astype(int)
    labels[::4, 0] = -1
    model = make(mlp(), lp.MultiLabel(3, class_weight="balanced"))
    model.fit(x, labels, verbose=0)
    positives, negatives = ((labels == one).sum(0) for one in (1, 0))
    expected = [*(negatives / np.maximum(positives, 1))[:2], 1.0]
    np.testing.assert_allclose(head_of(model).class_weight, expected, rtol=1e-6)


@needs_tff
@pytest.mark.parametrize("task", ["classes", "labels"])
def test_clients_give_the_weights_by_sums(mlp, digits, task):
    x, y = uneven(digits)
    if task == "labels":
        y = one_hot(y)
        make_task = lambda weight: lp.MultiLabel(3, class_weight=weight)  # noqa: E731
    else:
        make_task = lambda weight: lp.Classification(3, class_weight=weight)  # noqa: E731
    backbone = mlp()
    central, federated, solved = (make(backbone, make_task("balanced")) for _ in range(3))
    central.fit(x, y, batch_size=200, verbose=0)
    clients = lp.partition((x, y), by=np.arange(200) % 3)
    history = lp.FederatedAveraging(federated).fit(clients, 1, verbose=0)
    lp.FederatedAveraging(solved).fit_head(clients, verbose=0)
    for model in (federated, solved):
        np.testing.assert_allclose(
            head_of(model).class_weight, head_of(central).class_weight, rtol=1e-6
        )
    # The update, the sums of the features, and the counts of both kinds for each class.
    assert history.history["bytes_up"] == [3 * (4 * 51 + 8 * 33 + 4 * 6)]
    lp.fit_head(central, (x, y), l2=1e-3, verbose=0)
    ours, expected = (softmax(model.predict(x, verbose=0), 1) for model in (solved, central))
    np.testing.assert_allclose(ours, expected, atol=1e-3)


@pytest.mark.parametrize("form", ["arrays", "data set", "PyDataset", "generator", "split"])
@pytest.mark.parametrize("weights", ["numbers", "names", "balanced"])
def test_class_weight_of_fit_is_the_weight_of_examples(mlp, digits, form, weights):
    """Missing labels too; a share that `fit` splits off is not weighed, as in Keras."""
    x, y = uneven(digits)
    own = np.random.default_rng(0).uniform(0.5, 2, 200).astype("float32")
    backbone = mlp()
    cache = form != "generator"  # which is read once, so its features get no scale
    one, two = (
        make(backbone, lp.Classification(NAMES), cache_features=cache and "auto") for _ in range(2)
    )
    count = 150 if form == "split" else 200
    factors = balanced(y[:count]) if weights == "balanced" else np.array([1.0, 4.0, 0.5])
    given = {
        "numbers": dict(enumerate(factors)),
        "names": dict(zip(NAMES, factors, strict=True)),
        "balanced": "balanced",
    }[weights]

    def batches():
        for i in range(0, 200, 50):
            yield x[i : i + 50], y[i : i + 50], own[i : i + 50]

    if form == "generator" and weights == "balanced":
        with pytest.raises(ValueError, match="can be read before training"):
            one.fit(batches(), class_weight=given, verbose=0)
        return
    data = {
        "arrays": lambda: ((x, y, 50), {"sample_weight": own}),
        "split": lambda: ((x, y, 50), {"sample_weight": own, "validation_split": 0.25}),
        "data set": lambda: (
            (tf.data.Dataset.from_tensor_slices((x, y, own)).batch(50),),
            {},
        ),
        "PyDataset": lambda: ((Batches(x, y, own),), {}),
        "generator": lambda: ((batches(),), {"steps_per_epoch": 4}),
    }[form]
    positional, named = data()
    first = one.fit(*positional, **named, class_weight=given, shuffle=False, verbose=0).history
    weight = own * factors[np.maximum(y, 0)]
    validation = (x[150:], y[150:], own[150:]) if form == "split" else None
    options = {"validation_data": validation, "shuffle": False, "verbose": 0}
    rows = slice(count)
    second = two.fit(x[rows], y[rows], 50, sample_weight=weight[rows], **options).history
    for name, values in second.items():
        assert first[name] == pytest.approx(values, rel=1e-5)
    np.testing.assert_allclose(head_of(one).kernel, head_of(two).kernel, atol=1e-6)


def test_class_weight_with_weights_of_examples_in_a_column(mlp, digits):
    x, y = uneven(digits)
    own = np.random.default_rng(0).uniform(0.5, 2, 200).astype("float32")
    backbone = mlp()
    one, two = (make(backbone, lp.Classification(NAMES)) for _ in range(2))
    for model, weight in ((one, own), (two, own[:, None])):
        options = {"sample_weight": weight, "class_weight": {1: 4.0}, "shuffle": False}
        model.fit(x, y, **options, verbose=0)
    np.testing.assert_allclose(head_of(one).kernel, head_of(two).kernel, atol=1e-6)


def test_class_weight_of_fit_for_labels_and_what_is_refused(mlp, digits):
    x, y = digits
    labels = np.stack([y == 3, y > 3], 1).astype(int)
    backbone = mlp()
    one, two = (make(backbone, lp.MultiLabel(["a", "b"])) for _ in range(2))
    one.fit(x, labels, class_weight={"a": 9.0}, shuffle=False, verbose=0)
    weight = np.where(labels == 1, [9.0, 1.0], 1.0)
    two.fit(x, labels, sample_weight=weight, shuffle=False, verbose=0)
    np.testing.assert_allclose(head_of(one).kernel, head_of(two).kernel, atol=1e-6)
    for wrong in ({"c": 2.0}, {2: 2.0}, {"a": -1.0}, "even"):
        with pytest.raises(ValueError, match="`class_weight`"):
            one.fit(x, labels, class_weight=wrong, verbose=0)
    number = make(backbone, lp.Regression())
    with pytest.raises(ValueError, match="need a task with classes"):
        number.fit(x, 1.0 * y, class_weight={0: 2.0}, verbose=0)


def loss_and_logits(model, x, y):
    return model.evaluate(x, y, verbose=0), model.predict(x, verbose=0).astype("float64")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_focal_loss_by_hand(mlp, digits, smoothing):
    x, y = uneven(digits)
    task = lp.Classification(3, loss="focal", label_smoothing=smoothing)
    model = with_random_heads(make(mlp(), task))
    (found, _), logits = loss_and_logits(model, x, y)
    target = np.eye(3)[y] * (1 - smoothing) + smoothing / 3
    p = np.exp(log_softmax(logits, 1))
    each = (target * (1 - p) ** 2 * -np.log(p)).sum(1)
    assert found == pytest.approx(each[y >= 0].mean(), rel=1e-4)


def test_losses_of_keras(mlp, digits, tmp_path):
    x, y = uneven(digits)
    hinge = lp.Classification(3, loss=keras.losses.CategoricalHinge(), class_weight=[1, 2, 3])
    model = with_random_heads(make(mlp(), hinge))
    (found, _), logits = loss_and_logits(model, x, y)
    own = np.take_along_axis(logits, np.maximum(y, 0)[:, None], 1)[:, 0]
    other = np.where(np.eye(3)[y] > 0, 0.0, logits).max(1)  # Keras's own definition
    each, weight = np.maximum(other - own + 1, 0), np.array([1, 2, 3])[np.maximum(y, 0)]
    present = y >= 0
    assert found == pytest.approx(np.average(each[present], weights=weight[present]), rel=1e-4)
    model.fit(x, one_hot(y), verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.evaluate(x, y, verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0))
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain = make(model.get_layer("mlp"), lp.Classification(3, loss=sparse))
    assert plain.evaluate(x, y, verbose=0)[0] == pytest.approx(np.log(3), rel=1e-5)


def scores(y, logits):
    """By scikit-learn; the area needs probabilities that sum to 1."""
    p = softmax(logits.astype("float64"), 1)
    found = logits.argmax(1)
    return {
        "f1": sk.f1_score(y, found, average="macro"),
        "balanced_accuracy": sk.balanced_accuracy_score(y, found),
        "auc": sk.roc_auc_score(y, p[:, 1])
        if p.shape[1] == 2
        else sk.roc_auc_score(y, p, multi_class="ovr"),
    }


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_by_name_are_those_of_scikit_learn(mlp, digits, classes):
    x, y = uneven(digits)
    y = np.minimum(y, classes - 1)
    task = lp.Classification(classes, metrics=["f1", "balanced_accuracy", "auc"])
    model = with_random_heads(make(mlp(), task))
    present = y >= 0
    expected = scores(y[present], model.predict(x[present], verbose=0))
    for labels in (y, one_hot(y, classes)):
        found = model.evaluate(x, labels, batch_size=32, verbose=0, return_dict=True)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("examples", [30, 1000, 30_000])
@pytest.mark.parametrize(
    ("scale", "precision"), [(0.1, 1e-4), (1.0, 1e-6), (10.0, 1e-6), (100.0, 1e-6)]
)
def test_the_area_under_the_curve_of_many_examples(examples, scale, precision):
    rng = np.random.default_rng(examples)
    y = (rng.random((examples, 2)) < 0.3).astype("float32")
    logits = (scale * (rng.normal(size=(examples, 2)) + 0.7 * y)).astype("float32")
    weight = rng.integers(1, 4, (examples, 2)).astype("float32")
    metric = lp.MultiLabel(2, metrics=["auc"]).make_metrics()[-1]
    for rows in np.array_split(np.arange(examples), 7):
        metric.update_state(y[rows], logits[rows], weight[rows])
    expected = np.mean(
        [sk.roc_auc_score(y[:, i], logits[:, i], sample_weight=weight[:, i]) for i in (0, 1)]
    )
    assert float(metric.result()) == pytest.approx(expected, abs=precision)


def test_the_area_with_infinite_logits():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (300, 1))
    finite = rng.normal(size=y.shape).astype("float32") + y
    largest = np.where(finite > 1, 1e9, np.where(finite < -1, -1e9, finite))
    infinite = np.where(np.abs(largest) == 1e9, largest * np.inf, largest)
    metric = lp.MultiLabel(1, metrics=["auc"]).make_metrics()[-1]
    metric.update_state(y, infinite.astype("float32"))
    assert float(metric.result()) == pytest.approx(sk.roc_auc_score(y, largest), abs=1e-6)


@pytest.mark.parametrize("round_to", [10.0, 1.0, 0.1])
def test_the_area_of_tied_logits(round_to):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (5000, 1))
    logits = (np.round((rng.normal(size=y.shape) + y) / round_to) * round_to).astype("float32")
    metric = lp.MultiLabel(1, metrics=["auc"]).make_metrics()[-1]
    for rows in np.array_split(np.arange(len(y)), 50):
        metric.update_state(y[rows], logits[rows])
    assert float(metric.result()) == pytest.approx(sk.roc_auc_score(y, logits), abs=1e-7)
    assert float(lp.MultiLabel(2, metrics=["auc"]).make_metrics()[-1].result()) == 0  # nothing yet


def test_the_area_of_labels_with_missing_entries(mlp, digits):
    x, y = digits
    labels = np.stack([y == 3, y > 3, y > 20], 1).astype(int)  # the last is never there
    labels[::4, 0] = -1
    model = with_random_heads(make(mlp(), lp.MultiLabel(3, metrics=["auc"])))
    logits = model.predict(x, verbose=0)
    here = labels[:, 0] >= 0
    areas = [
        sk.roc_auc_score(labels[here, 0], logits[here, 0]),
        sk.roc_auc_score(labels[:, 1], logits[:, 1]),
    ]
    found = model.evaluate(x, labels, verbose=0, return_dict=True)["auc"]
    assert found == pytest.approx(np.mean(areas), abs=1e-6)


@needs_tff
def test_metrics_by_name_over_clients(mlp, digits):
    x, y = uneven(digits)
    task = lp.Classification(3, metrics=["f1", "balanced_accuracy", "auc"])
    model = with_random_heads(make(mlp(), task))
    clients = lp.partition((x, y), by=y)  # one class per client
    found = lp.FederatedAveraging(model).evaluate(clients)
    expected = scores(y[y >= 0], model.predict(x[y >= 0], verbose=0))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6)


def test_sequences_and_saved_metrics(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4, 5)).astype("float32")
    y = rng.integers(-1, 3, (60, 4))
    backbone = keras.Sequential([keras.Input((4, 5)), keras.layers.Dense(6, "relu")])
    task = lp.Classification(3, metrics=["f1", "balanced_accuracy"], class_weight="balanced")
    model = with_random_heads(lp.transfer_model(backbone, task, pooling=None))
    expected = scores(y[y >= 0], model.predict(x, verbose=0)[y >= 0])
    model.save(tmp_path / "m.keras")
    for one in (model, keras.models.load_model(tmp_path / "m.keras")):
        found = one.evaluate(x, y, verbose=0, return_dict=True)
        assert found["f1"] == pytest.approx(expected["f1"], abs=1e-6)
        assert found["balanced_accuracy"] == pytest.approx(expected["balanced_accuracy"], abs=1e-6)
    model.fit(x, y, verbose=0)
    np.testing.assert_allclose(head_of(model).class_weight, balanced(y.ravel()), rtol=1e-6)
