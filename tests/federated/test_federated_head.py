"""Heads solved over clients, against central solutions of scikit-learn."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.linear_model import LogisticRegression, Ridge

import keras_lp as lp
from keras_lp.federated import head
from keras_lp.federated.engine import installation
from keras_lp.federated.engine import worker as worker_module

pytestmark = pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)

L2 = 1e-2


def solve(model, clients, **arguments):
    arguments = {"l2": L2, "verbose": 0, **arguments}
    return lp.FederatedAveraging(model).fit_head(clients, **arguments)


def standardised(model, x):
    """Frozen features with mean 0 and deviation 1; constant columns are 0."""
    z = model.get_layer("mlp").predict(x, verbose=0).astype("float64")
    std = z.std(0)
    return (z - z.mean(0)) / np.where(std > 0, std, 1)


def logistic(z, y, weight=None):
    total = len(y) if weight is None else weight.sum()
    solver = LogisticRegression(C=1 / (L2 * total), tol=1e-9, max_iter=10_000)
    return solver.fit(z, y, sample_weight=weight).predict_proba(z)


def probabilities(model, x):
    return tf.nn.softmax(model.predict(x, verbose=0)).numpy()


@pytest.mark.parametrize("spread", ["equal parts", "one label per client"])
def test_the_solution_is_the_central_one(mlp, digits, spread):
    x, y = digits
    model = lp.transfer_model(mlp(), 10)
    by = {"equal parts": np.arange(200) % 8, "one label per client": y}[spread]
    history = solve(model, lp.partition(digits, by=by), validation_data=digits).history
    expected = logistic(standardised(model, x), y)
    np.testing.assert_allclose(probabilities(model, x), expected, atol=1e-4)
    evaluated = model.evaluate(x, y, verbose=0, return_dict=True)
    assert history["loss"][-1] == pytest.approx(evaluated["loss"], abs=1e-5)
    assert history["val_loss"] == pytest.approx([evaluated["loss"]], abs=1e-6)
    assert history["gradient"][-1] < 1e-6
    assert len(history["loss"]) < 100


def test_missing_labels_and_weights_of_examples_and_classes(mlp, digits):
    x, y = digits
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.5, 2, 200).astype("float32")
    labels = np.where(rng.random(200) < 0.3, -1, y)
    model = lp.transfer_model(mlp(), lp.Classification(10, class_weight={3: 4.0}))
    solve(model, lp.partition((x, labels, weight), by=y))
    kept = labels >= 0
    z = standardised(model, x)[kept]  # the unlabelled examples count for mean and deviation
    expected = logistic(z, y[kept], weight[kept] * np.where(y[kept] == 3, 4.0, 1.0))
    np.testing.assert_allclose(probabilities(model, x)[kept], expected, atol=1e-4)


def test_regression_is_ridge_on_standardised_labels(mlp, digits):
    x, y = digits
    labels = np.stack([1000 + 5.0 * y, -0.01 * y**2], axis=1).astype("float32")
    model = lp.transfer_model(mlp(), lp.Regression(2))
    history = solve(model, lp.partition((x, labels), by=y), validation_data=(x, labels))
    std = labels.std(0)
    # The mean over two entries: half of the sum of squares that Ridge has.
    ridge = Ridge(alpha=L2 * 200, tol=1e-12)
    ridge.fit(standardised(model, x), (labels - labels.mean(0)) / std)
    expected = ridge.predict(standardised(model, x))
    found = (model.predict(x, verbose=0) - labels.mean(0)) / std
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert history.history["loss"][-1] == pytest.approx(history.history["val_loss"][0], abs=1e-5)
    assert len(history.epoch) < 20


def test_several_tasks_are_each_solved_alone_in_the_same_rounds(mlp, digits):
    x, y = digits
    tags = np.stack([y % 2, y > 4, y == 0], axis=1).astype("float32")
    tags[::3, 1] = -1
    tasks = {"digit": lp.Classification(10, weight=0.5), "tags": lp.MultiLabel(3)}
    model = lp.multitask_model(mlp(), tasks, trainable="head")
    parts = {
        "a": (x[:50], {"digit": y[:50]}),
        "b": (x[50:], {"digit": y[50:], "tags": tags[50:]}),
    }
    history = solve(model, parts).history
    z = standardised(model, x)
    outputs = model.predict(x, verbose=0)
    digit = tf.nn.softmax(outputs["digit"]).numpy()
    np.testing.assert_allclose(digit, logistic(z, y), atol=1e-4)
    total = (tags[50:] >= 0).sum()
    for i in range(3):
        kept = (tags[:, i] >= 0) & (np.arange(200) >= 50)
        single = LogisticRegression(C=1 / (L2 * total), tol=1e-9, max_iter=10_000)
        expected = single.fit(z[kept], tags[kept, i]).predict_proba(z)[:, 1]
        found = tf.sigmoid(outputs["tags"][:, i]).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)
    pairs = zip(history["digit_loss"], history["tags_loss"], strict=True)
    losses = [0.5 * digit + 3 * tag for digit, tag in pairs]
    assert history["loss"] == pytest.approx(losses)


def test_only_sums_leave_a_client(mlp, digits):
    """However many examples there are; a constant column has no weight."""
    x, y = digits
    sizes = []
    for times in (1, 20):
        model = lp.transfer_model(mlp(), 10)
        model.get_layer("mlp").layers[0].kernel.assign(np.eye(64, 16))  # x[:, 0] is always 0
        many = np.repeat(x, times, 0), np.repeat(y, times)
        worker = worker_module.load_worker()
        before = worker.bytes_received
        history = solve(model, lp.partition(many, clients=2), tolerance=1e-3).history
        sizes.append((worker.bytes_received - before) / len(history["seconds"]))
        assert not model.get_layer("predictions").kernel.numpy()[0].any()
        head_bytes = 8 * (16 * 10 + 10)
        assert history["bytes_down"] == [0] + [2 * head_bytes] * len(history["loss"])
        assert set(history["bytes_up"][1:]) == {2 * (head_bytes + 16)}
        assert history["bytes_up"][0] == 2 * 8 * (1 + 16 + 16 * 16)
    assert max(sizes) < 20_000
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_many_features_are_solved_without_their_products(mlp, digits, monkeypatch):
    monkeypatch.setattr("keras_lp.federated.engine.head_sums.PRODUCT_COLUMNS", 8)
    model = lp.transfer_model(mlp(), 10)
    history = solve(model, lp.partition(digits, clients=4)).history
    expected = logistic(standardised(model, digits[0]), digits[1])
    np.testing.assert_allclose(probabilities(model, digits[0]), expected, atol=1e-4)
    assert history["bytes_up"][0] == 4 * 8 * (1 + 16 + 16)


def test_large_means_do_not_cancel(digits):
    """Features of mean 1e4 and deviation 1, as embeddings without a backbone of weights."""
    x, y = digits
    shifted = (x + 1e4).astype("float32")
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Identity()], name="mlp")
    model = lp.transfer_model(backbone, 10, cache_features=False)
    history = solve(model, lp.partition((shifted, y), clients=4)).history
    z = shifted.astype("float64") - shifted.astype("float64").mean(0)
    std = z.std(0)
    z /= np.where(std > 1e-6 * 1e4, std, np.inf)
    expected = LogisticRegression(C=1 / (L2 * 200), tol=1e-9, max_iter=10_000).fit(z, y)
    loss = -expected.predict_log_proba(z)[np.arange(200), y].mean()
    assert history["loss"][-1] == pytest.approx(loss, abs=1e-5)


class KilledError(Exception):
    pass


def test_what_was_killed_ends_with_the_weights_of_the_uninterrupted_run(
    mlp, digits, tmp_path, monkeypatch
):
    labels = digits[1].astype("float32")
    clients = lp.partition((digits[0], {"digit": digits[1], "value": labels}), clients=4)

    def make():
        keras.utils.set_random_seed(1)
        tasks = {"digit": 10, "value": lp.Regression()}
        return lp.multitask_model(mlp(), tasks, trainable="head")

    whole, killed, again = make(), make(), make()
    expected = solve(whole, clients).history
    run = head._Rounds._ask

    def ask(self, *arguments):
        if len(self.history.epoch) == 7:
            raise KilledError
        return run(self, *arguments)

    monkeypatch.setattr(head._Rounds, "_ask", ask)
    with pytest.raises(KilledError):
        solve(killed, clients, checkpoint_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 7
    damaged = tmp_path / "round_0000005.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    asked = []

    def count(self, *arguments):
        asked.append(len(self.history.epoch) + 1)
        return run(self, *arguments)

    monkeypatch.setattr(head._Rounds, "_ask", count)
    with pytest.warns(UserWarning, match=r"round_0000005.ckpt is damaged"):
        history = solve(again, clients, checkpoint_dir=tmp_path).history
    assert asked == [5, *range(8, len(history["seconds"]) + 1)]
    for a, b in zip(whole.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    with pytest.raises(ValueError, match=r"must be those that the checkpoint.*l2=0.01 \(now 0.1"):
        solve(make(), clients, checkpoint_dir=tmp_path, l2=0.1)


def test_prints_one_line_per_round(mlp, digits, capsys):
    model = lp.transfer_model(mlp(), 10)
    history = solve(model, lp.partition(digits, clients=2), verbose="auto", tolerance=1e-2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(history.epoch)
    assert lines[1].startswith("Round 2 - ")
    assert "gradient: " in lines[1]
    assert model.history is history


def test_what_cannot_be_solved_is_refused(mlp, convnet, digits):
    clients = lp.partition(digits, clients=2)
    own_loss = lp.transfer_model(mlp(), 10)
    own_loss.compile("sgd", keras.losses.CategoricalFocalCrossentropy(from_logits=True))
    plain = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    plain.compile("sgd", "mse")
    pictures = lp.partition((digits[0].reshape(-1, 8, 8, 1), digits[1]), clients=2)
    cases = [
        (lp.transfer_model(mlp(), 10, hidden_units=[8]), clients, "hidden_units=()"),
        (lp.transfer_model(mlp(), 10, trainable="all"), clients, "not wholly frozen.*fit"),
        (lp.transfer_model(convnet(), 10, augmentation="light"), pictures, "is random"),
        (own_loss, clients, "own losses.*categorical_focal_crossentropy"),
        (plain, clients, "lp.transfer_model"),
        (lp.transfer_model(mlp(), 10), {"a": (digits[0], np.full(200, -1))}, "label with a weight"),
        (lp.transfer_model(mlp(), 10), {}, "at least one client"),
    ]
    for model, given, message in cases:
        with pytest.raises(ValueError, match=message):
            solve(model, given)
    for arguments in ({"l2": 0}, {"l2": "auto"}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
            solve(lp.transfer_model(mlp(), 10), clients, **arguments)
