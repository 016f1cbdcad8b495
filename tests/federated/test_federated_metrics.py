"""Metrics over clients against NumPy: absent labels, metrics that are not sums, many outputs."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_lp as lp
from keras_lp.federated.engine import installation

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)


def cross_entropy(logits, y):
    logits = logits.astype("float64")
    return (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]).mean()


@pytest.fixture(scope="module")
def two_tasks(digits):
    """A model of two tasks, clients of which some lack labels, and the predictions of each."""
    x, y = digits
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8, "relu")], name="mlp")
    model = lp.multitask_model(backbone, {"digit": 10, "odd": 2}, optimizer="sgd")
    none = np.full(60, -1, "int32")
    rows = {"both": slice(0, 20), "digit": slice(20, 50), "missing": slice(50, 110)}
    labels = {
        "both": {"digit": y[:20], "odd": y[:20] % 2},
        "digit": {"digit": y[20:50]},
        "missing": {"digit": y[50:110], "odd": none},
    }
    clients = {name: (x[rows[name]], labels[name]) for name in rows}
    return model, clients


def test_means_and_worst_tenths_are_over_the_clients_with_labels(two_tasks):
    model, clients = two_tasks
    found = lp.FederatedAveraging(model).evaluate(clients)
    out = {name: model.predict(x, verbose=0) for name, (x, _) in clients.items()}
    for task, names in {"digit": list(clients), "odd": ["both"]}.items():
        pairs = [(out[name][task], clients[name][1][task]) for name in names]
        losses = [cross_entropy(*pair) for pair in pairs]
        accuracies = [np.mean(p.argmax(1) == y) for p, y in pairs]
        whole = [np.concatenate(part) for part in zip(*pairs, strict=True)]
        assert found[f"{task}_loss"] == pytest.approx(cross_entropy(*whole), abs=1e-5)
        assert found[f"mean_{task}_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
        assert found[f"worst_decile_{task}_loss"] == pytest.approx(max(losses), abs=1e-5)
        assert found[f"mean_{task}_accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-6)
        assert found[f"worst_decile_{task}_accuracy"] == pytest.approx(min(accuracies), abs=1e-6)
    assert found["clients"] == 3


def test_a_task_without_any_label_is_nan_and_hidden_from_callbacks(two_tasks):
    model, clients = two_tasks
    some = {name: clients[name] for name in ("digit", "missing")}
    federated = lp.FederatedAveraging(model)
    found = federated.evaluate(some)
    for name in ("odd_loss", "mean_odd_loss", "worst_decile_odd_loss", "odd_accuracy"):
        assert np.isnan(found[name])
    logs = []
    seen = keras.callbacks.LambdaCallback(on_epoch_end=lambda _, each: logs.append(dict(each)))
    history = federated.fit(
        some, 2, validation_data=clients["digit"], callbacks=[seen], verbose=0
    ).history
    for name in ("odd_loss", "odd_accuracy", "val_odd_loss"):
        assert np.isnan(history[name]).all()
        assert not any(name in each for each in logs)
    assert np.isfinite(history["digit_loss"]).all()
    assert all("digit_loss" in each and "val_digit_loss" in each for each in logs)


@pytest.mark.parametrize("how", ["missing", "weightless"])
def test_one_task_and_a_client_without_labels(mlp, digits, how):
    x, y = digits
    model = lp.transfer_model(mlp(), 10, trainable="all", optimizer="sgd")
    clients = {"a": (x[:80], y[:80]), "b": (x[80:120], y[80:120])}
    expected = {name: model.evaluate(*pair, verbose=0) for name, pair in clients.items()}
    if how == "missing":
        clients["none"] = (x[120:], np.full(80, -1, "int32"))
    else:
        clients = {name: (*pair, np.ones(len(pair[1]))) for name, pair in clients.items()}
        clients["none"] = (x[120:], y[120:], np.zeros(80))
    found = lp.FederatedAveraging(model).evaluate(clients)
    losses, accuracies = zip(*expected.values(), strict=True)
    assert found["mean_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["mean_accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-6)
    assert found["worst_decile_accuracy"] == pytest.approx(min(accuracies), abs=1e-6)


def test_a_plain_model_and_a_client_of_weight_0(digits):
    x, y = digits
    model = plain([])
    ones, zeros = np.ones(80, "float32"), np.zeros(40, "float32")
    clients = {"a": (x[:80], y[:80], ones), "none": (x[80:120], y[80:120], zeros)}
    found = lp.FederatedAveraging(model).evaluate(clients)
    expected = model.evaluate(x[:80], y[:80], verbose=0)
    assert found["mean_loss"] == pytest.approx(expected, abs=1e-5)


class Own(keras.metrics.Metric):
    """A metric of one variable that `result` returns, as in Keras's documentation."""

    def __init__(self, name, start=0.0):
        super().__init__(name=name)
        self.start = start
        self.value = self.add_weight(name="value", shape=(), initializer="zeros")
        self.reset_state()

    def reset_state(self):
        self.value.assign(self.start)

    def result(self):
        return self.value


class Right(Own):
    def update_state(self, y_true, y_pred, sample_weight=None):
        right = ops.equal(ops.argmax(y_pred, -1), ops.cast(ops.reshape(y_true, [-1]), "int32"))
        self.value.assign_add(ops.sum(ops.cast(right, "float32")))


class Largest(Own):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(ops.maximum(self.value, ops.max(y_pred)))


class Least(Own):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(ops.minimum(self.value, ops.min(y_pred)))


class Smoothed(Own):
    """What it holds depends on the order of the examples: clients cannot merge it."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(0.9 * self.value + 0.1 * ops.mean(y_pred))


def plain(metrics, seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-30), loss, metrics=metrics)
    return model


def uneven(digits):
    x, y = digits
    rows = {"a": slice(0, 7), "b": slice(7, 90), "c": slice(90, 200)}
    return {name: (x[part], y[part]) for name, part in rows.items()}


def own_metrics():
    return [Right("right"), Right("shifted", 2.0), Largest("largest", -1e9), Least("least", 1e9)]


def test_metrics_of_ones_own_over_clients(digits):
    x, y = digits
    model = plain(own_metrics())
    out = model.predict(x, verbose=0)
    right = int((out.argmax(1) == y).sum())
    expected = {"right": right, "shifted": right + 2, "largest": out.max(), "least": out.min()}
    federated = lp.FederatedAveraging(model, batch_size=16)
    found = federated.evaluate(uneven(digits))
    history = federated.fit(uneven(digits), 2, verbose=0).history
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5)
        assert history[name] == pytest.approx([value, value], abs=1e-5)
    each = [out[:7], out[7:90], out[90:]]
    assert found["mean_largest"] == pytest.approx(np.mean([part.max() for part in each]), abs=1e-5)
    assert found["mean_least"] == pytest.approx(np.mean([part.min() for part in each]), abs=1e-5)


def test_largest_and_least_over_blocks_of_clients(digits, monkeypatch):
    """More clients than are evaluated at once, and one that is sampled."""
    monkeypatch.setattr("keras_lp.federated.engine.rounds._EVALUATED_AT_ONCE", 2)
    x, _ = digits
    model = plain(own_metrics())
    out = model.predict(x, verbose=0)
    found = lp.FederatedAveraging(model).evaluate(uneven(digits))
    assert found["largest"] == pytest.approx(out.max(), abs=1e-5)
    assert found["least"] == pytest.approx(out.min(), abs=1e-5)


def test_a_metric_that_clients_cannot_merge_is_refused_by_name(digits):
    federated = lp.FederatedAveraging(plain([Right("right"), Smoothed("smoothed")]))
    for call in (federated.evaluate, lambda data: federated.fit(data, 1, verbose=0)):
        with pytest.raises(ValueError, match=r"the metric 'smoothed'.*leave it out"):
            call(uneven(digits))


def test_kerass_metrics_are_those_of_all_examples(digits):
    x, y = digits
    metrics = [
        "accuracy",
        keras.metrics.SparseTopKCategoricalAccuracy(3),
        keras.metrics.SparseCategoricalCrossentropy(from_logits=True),
    ]
    model = plain(metrics)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    found = lp.FederatedAveraging(model).evaluate(uneven(digits))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5)


def test_losses_by_output_are_means_over_examples(digits):
    """On clients of 7, 83 and 110 examples, in batches of 16."""
    x, y = digits
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    outputs = {n: keras.layers.Dense(1, name=n)(inputs) for n in ("a", "b")}
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(1e-30), {"a": "mse", "b": "mae"}, loss_weights=None)
    labels = {"a": 1.0 * y, "b": 3.0 * y}
    out = {name: value[:, 0] for name, value in model.predict(x, verbose=0).items()}
    a, b = np.mean((out["a"] - labels["a"]) ** 2), np.mean(np.abs(out["b"] - labels["b"]))
    expected = {"loss": a + b, "a_loss": a, "b_loss": b}
    clients = {
        name: (part[0], {task: value[rows] for task, value in labels.items()})
        for (name, part), rows in zip(
            uneven(digits).items(), (slice(0, 7), slice(7, 90), slice(90, 200)), strict=True
        )
    }
    federated = lp.FederatedAveraging(model, batch_size=16)
    found = federated.evaluate(clients)
    history = federated.fit(clients, 1, verbose=0).history
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5)
        assert history[name][0] == pytest.approx(value, rel=1e-5)


def test_a_finite_update_that_overflows_is_dropped_with_a_warning(digits):
    x, y = digits
    clients = {"good": (x[:100], 1.0 * y[:100]), "huge": (x[100:], np.full(100, 1e25))}
    results = []
    for data in (clients, {"good": clients["good"]}):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.01), "mse")
        federated = lp.FederatedAveraging(model, batch_size=None)
        if len(data) == 2:
            with pytest.warns(UserWarning, match="huge"):
                history = federated.fit(data, 1, verbose=0).history
            assert history["dropped"] == [1]
        else:
            federated.fit(data, 1, verbose=0)
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
