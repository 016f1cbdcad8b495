"""Labels as people have them: numbers, one-hot, soft, names; in every form of data."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

import keras_lp as lp
from keras_lp.federated.engine import installation
from tests.conftest import Batches, with_random_heads

NAMES = tuple("abcdefghij")
L2 = 1e-2

needs_tff = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


def with_missing(y):
    return np.where(np.arange(len(y)) % 5 == 0, -1, y)


def one_hot(y):
    return np.where(y[:, None] < 0, -1, np.eye(10, dtype="int64")[np.maximum(y, 0)])


def with_nan(y):
    return np.where(y[:, None] < 0, np.nan, np.eye(10)[np.maximum(y, 0)]).astype("float32")


def names(y):
    return np.array([*NAMES, ""])[y]


FORMS = {
    "column": lambda y: y[:, None],
    "one-hot": one_hot,
    "one-hot, NaN": with_nan,
    "names": names,
    "objects": lambda y: names(y).astype(object),
}


@pytest.fixture
def model(mlp):
    """Makes models on one backbone."""
    backbone = mlp()

    def make(task=None, **options):
        task = lp.Classification(NAMES) if task is None else task
        options = {"optimizer": "sgd", "learning_rate": 0.1, **options}
        return lp.transfer_model(backbone, task, **options)

    return make


def weights(model):
    return model.get_layer("predictions").raw_weights()


def assert_equal(ours, expected, atol=1e-5):
    for own, other in zip(weights(ours), weights(expected), strict=True):
        np.testing.assert_allclose(own, other, atol=atol)


@pytest.mark.parametrize(
    ("data", "form"),
    [
        *itertools.product(["arrays", "data set", "cached data set"], FORMS),
        # Keras takes no strings from a PyDataset.
        *itertools.product(
            ["PyDataset"], [form for form in FORMS if form not in ("names", "objects")]
        ),
    ],
)
def test_every_form_trains_as_class_numbers_do(model, digits, data, form):
    x, y = digits[0], with_missing(digits[1])
    cache = True if data == "cached data set" else "auto"
    expected, other = model(cache_features=cache), model(cache_features=cache)

    def as_data(labels):
        if data == "arrays":
            return (x, labels)
        if data == "PyDataset":
            return (Batches(x, labels),)
        if labels.dtype == object:
            labels = labels.astype(str)
        return (tf.data.Dataset.from_tensor_slices((x, labels)).batch(50),)

    labels = FORMS[form](y)
    for one, own in ((expected, y), (other, labels)):
        one.fit(*as_data(own), epochs=2, shuffle=False, verbose=0)
    assert_equal(other, expected)
    one, two = (m.evaluate(*as_data(own), verbose=0) for m, own in ((expected, y), (other, labels)))
    np.testing.assert_allclose(two, one, atol=1e-5)


def test_validation_data_and_lists_of_names(model, digits):
    x, y = digits
    one, two = model(), model()
    first = one.fit(x, y, validation_data=(x, y), shuffle=False, verbose=0).history
    own = names(y).tolist()
    second = two.fit(x, own, validation_data=(x, names(y)), shuffle=False, verbose=0).history
    assert second["val_loss"] == pytest.approx(first["val_loss"])


def test_soft_labels_train_as_plain_keras_does(model, digits):
    x, _ = digits
    soft = np.random.default_rng(0).dirichlet(np.ones(10), 200).astype("float32")
    ours = model(cache_features=False)
    features = ours.get_layer("mlp").predict(x, verbose=0)
    plain = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(10, kernel_initializer="zeros")]
    )
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    plain.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    expected = plain.fit(features, soft, epochs=2, shuffle=False, verbose=0).history
    found = ours.fit(x, soft, epochs=2, shuffle=False, verbose=0).history
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], expected["accuracy"], rtol=1e-5)


def test_the_loss_of_soft_labels_by_hand(model, digits):
    """With missing rows and weights of classes: a row weighs the mean weight of its classes."""
    x, _ = digits
    rng = np.random.default_rng(0)
    soft = rng.dirichlet(np.ones(10), 200)
    present = rng.random(200) < 0.6
    factors = rng.uniform(0.5, 3, 10)
    task = lp.Classification(NAMES, class_weight=dict(enumerate(factors)))
    one = with_random_heads(model(task))
    each = -(soft * log_softmax(one.predict(x, verbose=0).astype("float64"), axis=1)).sum(1)
    weight = (soft @ factors) * present
    for missing in (np.nan, -1):
        labels = np.where(present[:, None], soft, missing)
        found = one.evaluate(x, labels, batch_size=64, verbose=0, return_dict=True)
        assert found["loss"] == pytest.approx((weight * each).sum() / weight.sum(), rel=1e-5)
    correct = one.predict(x, verbose=0).argmax(1) == soft.argmax(1)
    assert found["accuracy"] == pytest.approx(correct[present].mean())


@pytest.mark.parametrize("form", FORMS)
def test_solved_heads_are_those_of_class_numbers(model, digits, form):
    x, y = digits[0], with_missing(digits[1])
    one, two = model(), model()
    first = lp.fit_head(one, (x, y), class_weight="balanced", verbose=0).history
    second = lp.fit_head(two, (x, FORMS[form](y)), class_weight="balanced", verbose=0).history
    assert second["l2"] == first["l2"]
    assert_equal(two, one, atol=1e-4)


def soft_solution(features, soft):
    """By scikit-learn: each example once for each class, weighted by the class's share."""
    z = features.astype("float64")
    std = z.std(0)
    z = (z - z.mean(0)) / np.where(std > 0, std, 1)
    repeated, labels = np.repeat(z, 10, 0), np.tile(np.arange(10), len(z))
    solver = LogisticRegression(C=1 / (L2 * len(z)), tol=1e-9, max_iter=10_000)
    return solver.fit(repeated, labels, sample_weight=soft.ravel()).predict_proba(z)


def probabilities(model, x):
    return tf.nn.softmax(model.predict(x, verbose=0)).numpy()


def test_the_solved_head_of_soft_labels_is_that_of_scikit_learn(model, digits):
    x, _ = digits
    soft = np.random.default_rng(0).dirichlet(0.2 * np.ones(10), 200)
    one = model()
    lp.fit_head(one, (x, soft), l2=L2, verbose=0)
    expected = soft_solution(one.get_layer("mlp").predict(x, verbose=0), soft)
    np.testing.assert_allclose(probabilities(one, x), expected, atol=1e-4)


@needs_tff
@pytest.mark.parametrize("form", FORMS)
def test_clients_train_as_on_class_numbers(model, digits, form):
    x, y = digits[0], with_missing(digits[1])
    one, two = model(), model()
    histories = [
        lp.FederatedAveraging(own).fit(
            lp.partition((x, labels), by=np.arange(200) % 3), 2, verbose=0
        )
        for own, labels in ((one, y), (two, FORMS[form](y)))
    ]
    first, second = (history.history for history in histories)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert_equal(two, one)


@needs_tff
def test_clients_solve_heads_on_soft_labels(model, digits):
    x, _ = digits
    soft = np.random.default_rng(0).dirichlet(0.2 * np.ones(10), 200)
    one = model()
    clients = lp.partition((x, soft), by=np.arange(200) % 3)
    lp.FederatedAveraging(one).fit_head(clients, l2=L2, verbose=0)
    expected = soft_solution(one.get_layer("mlp").predict(x, verbose=0), soft)
    np.testing.assert_allclose(probabilities(one, x), expected, atol=1e-4)


@needs_tff
def test_a_head_counts_by_its_own_soft_labels(mlp, digits):
    """Two clients, one with a single label of task b: so it weighs one."""
    x, y = digits
    rates = {"optimizer": "sgd", "learning_rate": 0.1}
    models = [
        lp.multitask_model(mlp(), {"a": 10, "b": 10}, pooling=None, **rates) for _ in range(2)
    ]
    models[1].set_weights(models[0].get_weights())
    few = np.where(np.arange(200) < 101, y, -1)
    for one, form in zip(models, (lambda y: y, with_nan), strict=True):
        labels = {"a": y, "b": form(few)}
        clients = lp.partition((x, labels), by=np.arange(200) // 100)
        lp.FederatedAveraging(one).fit(clients, 1, verbose=0)
    for ours, expected in zip(models[1].get_weights(), models[0].get_weights(), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_mixed_streams_and_comparisons_take_them(mlp, digits):
    x, y = digits
    stream = lp.mix({"a": (x[:100], with_nan(y[:100])), "b": (x[100:], y[100:])}, seed=1)
    numbers = lp.mix({"a": (x[:100], y[:100]), "b": (x[100:], y[100:])}, seed=1)
    models = [lp.multitask_model(mlp(), {"a": 10, "b": 10}, pooling=None) for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    histories = [
        model.fit(data, epochs=1, verbose=0).history
        for model, data in zip(models, (numbers, stream), strict=True)
    ]
    assert histories[1]["a_loss"] == pytest.approx(histories[0]["a_loss"], rel=1e-4)


def test_names_in_mixed_streams_and_comparisons(mlp, digits):
    x, y = digits
    kinds = {"a": lp.Classification(NAMES), "b": 10}
    parts = {"a": (x[:100], names(y[:100])), "b": (x[100:], y[100:])}
    named = lp.mix(parts, seed=1, tasks=kinds)
    numbers = lp.mix({**parts, "a": (x[:100], y[:100])}, seed=1, tasks=kinds)
    for (_, ours), (_, expected) in zip(named, numbers, strict=True):
        np.testing.assert_array_equal(ours["a"], expected["a"])
    with pytest.raises(TypeError, match=r"lp\.Classification\(names\)"):
        lp.mix(parts)
    model = lp.multitask_model(mlp(), kinds, pooling=None)
    few = with_missing(y)
    found = [
        lp.compare_single_tasks(
            model, (x, {"a": form(few), "b": y}),
            validation_data=(x, {"a": form(y), "b": y}),
            epochs=1, verbose=False,
        )
        for form in (lambda y: y, names, with_nan)
    ]  # fmt: skip
    for other in found[1:]:
        assert other.multitask["a"] == pytest.approx(found[0].multitask["a"], abs=1e-6)


def test_one_form_after_the_other(model, digits):
    x, y = digits[0], with_missing(digits[1])
    one, two = model(), model()
    for first, second in ((y, one_hot(y)), (with_nan(y), y), (y[:, None], with_nan(y))):
        one.fit(x, first, shuffle=False, verbose=0)
        one.fit(x, second, shuffle=False, verbose=0)
        two.fit(x, y, epochs=2, shuffle=False, verbose=0)
        assert_equal(one, two)
        for labels in (first, second):
            found, expected = one.evaluate(x, labels, verbose=0), two.evaluate(x, y, verbose=0)
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_steps_of_a_sequence():
    """As many steps as classes: class numbers and one-hot labels are told apart by rank."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3, 4)).astype("float32")
    y = rng.integers(0, 3, (40, 3))
    backbone = keras.Sequential([keras.Input((3, 4)), keras.layers.Dense(6, "relu")])
    models = [lp.transfer_model(backbone, 3, pooling=None, learning_rate=0.01) for _ in range(2)]
    for model, labels in zip(models, (y, np.eye(3)[y]), strict=True):
        model.fit(x, labels, epochs=3, shuffle=False, verbose=0)
    assert_equal(models[1], models[0])
    with pytest.raises(ValueError, match="sum to 1"):
        models[0].fit(x, np.ones((40, 3, 3)), verbose=0)


def test_scikit_learns_wrapper_passes_one_hot_labels(model, digits):
    x, y = digits
    classifier = keras.wrappers.SKLearnClassifier(
        lambda X, y: model(10, learning_rate=0.5),  # noqa: N803
        fit_kwargs={"epochs": 20, "verbose": 0},
    )
    classifier.fit(x, np.array(NAMES)[y])
    assert (classifier.predict(x) == np.array(NAMES)[y]).mean() > 0.8


def test_unknown_names_are_refused_with_the_near_ones(model, digits):
    x, y = digits
    labels = names(y)
    labels[7] = "A"
    one = model()
    data = tf.data.Dataset.from_tensor_slices((x, labels)).batch(50)
    calls = (
        lambda: one.fit(x, labels),
        lambda: one.evaluate(data, verbose=0),
        lambda: lp.fit_head(one, (x, labels)),
        lambda: lp.fit_head(one, data, verbose=0),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^Labels that are names.*y with 'A'.*mean 'a'"):
            call()
    with pytest.raises(ValueError, match=r"y of validation_data with 'A'.*mean 'a'"):
        one.fit(x, y, validation_data=(x, labels))


@needs_tff
def test_clients_with_unknown_names_are_named(model, digits):
    federated = lp.FederatedAveraging(model())
    clients = {"client_0": (digits[0], np.full(200, "Z"))}
    with pytest.raises(ValueError, match=r"y of client 'client_0' with 'Z'"):
        federated.fit(clients, 1, verbose=0)
