"""Heads that are solved, against scikit-learn on the same features."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.class_weight import compute_sample_weight

import keras_lp as lp
from keras_lp.transfer import head_solver, linear_probe
from tests.conftest import Batches

L2 = 1e-2


def solve(model, data, **arguments):
    return lp.fit_head(model, data, **{"l2": L2, "verbose": 0, **arguments}).history


def standardised(model, x):
    """Frozen features with mean 0 and deviation 1; constant columns are 0."""
    z = model.get_layer("mlp").predict(x, verbose=0).astype("float64")
    std = z.std(0)
    return (z - z.mean(0)) / np.where(std > 0, std, 1)


def logistic(z, y, weight=None, l2=L2):
    total = len(y) if weight is None else weight.sum()
    solver = LogisticRegression(C=1 / (l2 * total), tol=1e-9, max_iter=10_000)
    return solver.fit(z, y, sample_weight=weight)


def probabilities(model, x):
    return tf.nn.softmax(model.predict(x, verbose=0)).numpy()


def objective(z, y, kernel, bias, weight):
    """Loss and gradient of a softmax head, written out."""
    logits = z @ kernel + bias
    logits = logits - logits.max(1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]) @ weight / weight.sum()
    p[np.arange(len(y)), y] -= 1
    gradient = z.T @ (p * weight[:, None]) / weight.sum() + L2 * kernel
    return loss + L2 / 2 * (kernel**2).sum(), gradient


@pytest.mark.parametrize("columns", [16, 300])  # fewer and more than there are examples
def test_softmax_is_the_logistic_regression_of_scikit_learn(mlp, digits, columns):
    x, y = digits
    weight = np.random.default_rng(0).uniform(0.5, 2, 200)
    model = lp.transfer_model(mlp((columns,)), 10)
    history = solve(model, (x, y, weight))
    z = standardised(model, x)
    expected = logistic(z, y, weight)
    np.testing.assert_allclose(probabilities(model, x), expected.predict_proba(z), atol=1e-5)
    raw = model.get_layer("mlp").predict(x, verbose=0).astype("float64")
    kernel, bias = (np.asarray(w, "float64") for w in model.get_layer("predictions").weights[:2])
    own, gradient = objective(
        z, y, kernel * raw.std(0)[:, None], bias + raw.mean(0) @ kernel, weight
    )
    theirs, _ = objective(z, y, expected.coef_.T, expected.intercept_, weight)
    assert own == pytest.approx(theirs, abs=1e-6)
    assert np.abs(gradient).max() < 1e-5
    evaluated = model.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)
    assert {name: history[name][-1] for name in evaluated} == pytest.approx(evaluated, abs=1e-6)
    assert history["l2"] == [L2]


def test_missing_labels_take_no_part(mlp, digits):
    x, y = digits
    present = np.random.default_rng(0).random(200) < 0.7
    model = lp.transfer_model(mlp(), 10)
    solve(model, (x, np.where(present, y, -1)))
    z = standardised(model, x)
    expected = logistic(z[present], y[present]).predict_proba(z)
    np.testing.assert_allclose(probabilities(model, x), expected, atol=1e-5)


def test_weights_of_classes(mlp, digits):
    x, y = digits
    y = np.minimum(y, 2)
    balanced = compute_sample_weight("balanced", y)
    for given, weight in [("balanced", balanced), ({1: 5.0}, np.where(y == 1, 5.0, 1.0))]:
        model = lp.transfer_model(mlp(), 3)
        solve(model, (x, y), class_weight=given)
        z = standardised(model, x)
        expected = logistic(z, y, weight).predict_proba(z)
        np.testing.assert_allclose(probabilities(model, x), expected, atol=1e-5)


def test_sigmoid_is_one_against_the_rest(mlp, digits):
    x, y = digits
    labels = np.stack([y % 2, y > 6], 1).astype(int)
    labels[::3, 1] = -1
    model = lp.transfer_model(mlp(), lp.MultiLabel(["odd", "large"]))
    history = solve(model, (x, labels))
    z, total = standardised(model, x), (labels >= 0).sum()
    for i in range(2):
        # The mean is over all labels, so each column alone has its share of the loss.
        known = labels[:, i] >= 0
        solver = LogisticRegression(C=1 / (L2 * total), tol=1e-9, max_iter=10_000)
        expected = solver.fit(z[known], labels[known, i]).decision_function(z)
        np.testing.assert_allclose(model.predict(x, verbose=0)[:, i], expected, atol=1e-4)
    assert history["loss"][0] == pytest.approx(model.evaluate(x, labels, verbose=0)[0], abs=1e-6)


def test_squared_is_the_ridge_of_scikit_learn(mlp, digits):
    x, y = digits
    labels = np.stack([10.0 * y + 500, 1.0 * y**2], 1)
    labels[:50, 0] = np.nan
    model = lp.transfer_model(mlp(), lp.Regression(units=2))
    history = solve(model, (x, labels))
    z, total = standardised(model, x), np.isfinite(labels).sum()
    for i in range(2):
        known = np.isfinite(labels[:, i])
        own = labels[known, i]
        solver = Ridge(alpha=L2 * total / 2).fit(z[known], (own - own.mean()) / own.std())
        expected = solver.predict(z) * own.std() + own.mean()
        np.testing.assert_allclose(model.predict(x, verbose=0)[:, i], expected, rtol=1e-4)
    evaluated = model.evaluate(x, labels, verbose=0, return_dict=True)
    assert history["loss"][0] == pytest.approx(evaluated["loss"], rel=1e-5)


def test_label_smoothing_is_in_the_loss(mlp, digits):
    x, y = digits
    for task, labels in [
        (lp.Classification(10, label_smoothing=0.2), y),
        (lp.MultiLabel(2, label_smoothing=0.2), np.stack([y % 2, y > 6], 1)),
    ]:
        model = lp.transfer_model(mlp(), task)
        solve(model, (x, labels), l2=1e-6)
        before = model.evaluate(x, labels, verbose=0)[0]
        kernel = model.get_layer("predictions").kernel
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, tf.constant(labels), model(x))
        assert np.abs(tape.gradient(loss, kernel.value)).max() < 1e-3
        kernel.assign(kernel * 1.05)
        assert model.evaluate(x, labels, verbose=0)[0] > before


def test_each_task_is_solved_by_itself(mlp, digits):
    x, y = digits
    backbone = mlp()
    kinds = {"digit": 10, "odd": lp.MultiLabel(1), "value": lp.Regression(weight=3.0)}
    labels = {"digit": y, "odd": (y % 2)[:, None], "value": 2.0 * y}
    both = lp.multitask_model(
        backbone, kinds, trainable="head", balancing="uncertainty", dropout=0.5
    )
    history = solve(both, (x, labels))
    for name, task in kinds.items():
        alone = lp.transfer_model(backbone, task)
        solve(alone, (x, labels[name]))
        for ours, theirs in zip(
            both.get_layer(name).weights, alone.get_layer("predictions").weights, strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert {"digit_l2", "odd_l2", "value_l2", "digit_accuracy", "value_mae"} <= set(history)
    with pytest.raises(ValueError, match=r"label with a weight above 0.*'value'"):
        solve(both, (x, {"digit": y, "odd": labels["odd"]}))


def test_every_form_of_data_gives_the_same(mlp, digits):
    x, y = digits
    model = lp.transfer_model(mlp(), 10)
    solve(model, digits)
    expected = model.predict(x, verbose=0)
    forms = [
        (x, y, np.ones(200)),
        (tf.constant(x), tf.constant(y)),
        tf.data.Dataset.from_tensor_slices(digits).batch(64),
        Batches(x, y),
    ]
    for data in forms:
        model.get_layer("predictions").kernel.assign(np.ones((16, 10)))
        history = solve(model, data, validation_data=data)
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-4)
        assert history["val_loss"] == history["loss"]


@pytest.mark.parametrize("columns", [16, 300])
def test_features_in_files_are_streamed(mlp, digits, columns, monkeypatch):
    x, y = digits
    backbone = mlp((columns,))
    expected = lp.transfer_model(backbone, 10)
    in_memory = solve(expected, digits, l2="auto")
    monkeypatch.setattr(linear_probe, "ROWS", 64)
    monkeypatch.setattr(head_solver, "ROWS", 64)
    model = lp.transfer_model(backbone, 10, cache_memory=1000)
    history = solve(model, digits, l2="auto")
    assert history["l2"] == in_memory["l2"]
    outputs = expected.predict(x, verbose=0)
    np.testing.assert_allclose(model.predict(x, verbose=0), outputs, atol=1e-4)
    assert history["loss"][0] == pytest.approx(model.evaluate(x, y, verbose=0)[0], abs=1e-6)
    # Without principal components: too many of them.
    monkeypatch.setattr(head_solver, "MOST_COMPONENTS", 8)
    solve(model, digits, l2=in_memory["l2"][0])
    np.testing.assert_allclose(model.predict(x, verbose=0), outputs, atol=1e-3)
    # In single precision.
    monkeypatch.setattr(head_solver, "DOUBLE_BYTES", 0)
    solve(model, digits, l2=in_memory["l2"][0])
    np.testing.assert_allclose(model.predict(x, verbose=0), outputs, atol=2e-2)


def test_a_prediction_a_step_respects_the_mask():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 20, (60, 7))
    tokens[:, 5:] = 0
    embedding = keras.layers.Embedding(20, 6, mask_zero=True)
    backbone = keras.Sequential([keras.Input((7,), dtype="int32"), embedding], name="mlp")
    model = lp.transfer_model(backbone, 3, pooling=None)
    y = tokens % 3
    y[:, 5:] = rng.integers(0, 3, (60, 2))  # under the mask: anything
    history = solve(model, (tokens, y), l2="auto")
    assert history["loss"][0] == pytest.approx(model.evaluate(tokens, y, verbose=0)[0], abs=1e-6)
    real = tokens > 0
    z = embedding(tokens).numpy().astype("float64")
    z = ((z - z.mean((0, 1))) / z.std((0, 1)))[real]
    expected = logistic(z, y[real], l2=history["l2"][0]).predict_proba(z)
    np.testing.assert_allclose(probabilities(model, tokens)[real], expected, atol=1e-5)


def test_auto_is_the_strength_with_the_best_cross_validated_loss(mlp, digits):
    x, y = digits
    model = lp.transfer_model(mlp((48,)), 10)
    history = solve(model, digits, l2="auto")
    z = standardised(model, x)
    folds = [
        fold
        for seed in range(3)
        for fold in StratifiedKFold(5, shuffle=True, random_state=seed).split(z, y)
    ]

    def score(l2):
        losses = []
        for train, test in folds:
            p = logistic(z[train], y[train], l2=l2).predict_proba(z[test])
            losses += [-np.log(p[np.arange(len(test)), y[test]])]
        return np.mean(np.concatenate(losses))

    (chosen,) = history["l2"]
    assert score(chosen) <= min(score(chosen * 10**0.5), score(chosen / 10**0.5)) + 0.01
    assert history["cv_loss"][0] == pytest.approx(score(chosen), abs=0.05)


def test_auto_by_validation_data(mlp, digits):
    x, y = digits
    model = lp.transfer_model(mlp((48,)), 10)
    held_out = x[100:], y[100:]
    history = solve(model, (x[:100], y[:100]), l2="auto", validation_data=held_out)
    assert "cv_loss" not in history
    assert history["val_loss"][0] == pytest.approx(
        model.evaluate(*held_out, verbose=0)[0], abs=1e-6
    )
    (chosen,), (best,) = history["l2"], history["val_loss"]
    for l2 in (chosen * 10, chosen / 10):
        other = solve(model, (x[:100], y[:100]), l2=l2, validation_data=held_out)
        assert other["val_loss"][0] > best


@pytest.mark.parametrize("each", [1, 2, 3])
def test_few_examples_a_class(mlp, digits, each):
    x, y = digits
    rows = np.concatenate([np.flatnonzero(y == c)[: each if c else 1] for c in range(10)])
    model = lp.transfer_model(mlp(), 10)
    history = solve(model, (x[rows], y[rows]), l2="auto")
    assert ("cv_loss" in history) == (each > 1)
    assert model.evaluate(x[rows], y[rows], verbose=0)[1] > 0.7


def test_folds_are_even_and_stratified():
    y = np.repeat([0, 1, 2], [103, 52, 1])
    model = lp.transfer_model(keras.Sequential([keras.Input((2,)), keras.layers.Identity()]), 3)
    examples = linear_probe._Examples(model, ({"keras_lp_features": np.zeros((156, 2))}, y))
    folds = linear_probe._folds(examples, model.get_layer("predictions"))
    assert folds.shape == (156, 5)
    for c, most in [(0, 21), (1, 11), (2, 0)]:
        held_out = (1 - folds)[y == c].sum(0)
        assert held_out.max() == most
        assert held_out.min() >= most - 1
    assert ((1 - folds).sum(1) == (y != 2)).all()


def test_the_same_every_time_and_constant_columns(digits):
    x, y = digits
    x = np.concatenate([x, np.full((200, 3), 7.0, "float32")], 1)  # border pixels are 0 too
    model = lp.transfer_model(keras.Sequential([keras.Input((67,)), keras.layers.Identity()]), 10)
    solve(model, (x, y), l2="auto")
    first = model.get_layer("predictions").kernel.numpy()
    solve(model, (x, y), l2="auto")
    np.testing.assert_array_equal(model.get_layer("predictions").kernel, first)
    assert not first[(x.std(0) == 0)].any()


def test_the_line_that_is_printed(mlp, digits, capsys):
    model = lp.transfer_model(mlp(), 10)
    history = lp.fit_head(model, digits, verbose=2).history
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"Head solved with l2={history['l2'][0]:.3g}, cv_loss={history['cv_loss'][0]:.3g}: "
        f"accuracy {history['accuracy'][0]:.4f}, loss {history['loss'][0]:.4f}"
    )
    lp.fit_head(model, digits, verbose=0)
    assert capsys.readouterr().out == ""


def test_the_model_stays_a_plain_one(mlp, digits, tmp_path):
    x, y = digits
    model = lp.transfer_model(mlp(), 10)
    solve(model, digits)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    lp.export_tflite(model, tmp_path / "model.tflite")
    before = model.evaluate(x, y, verbose=0)[0]
    assert model.fit(x, y, epochs=1, verbose=0).history["loss"][0] < before + 0.1


def test_refusals(mlp, digits):
    x, y = digits
    fine = lp.transfer_model(mlp(), 10)
    for model, message in [
        (keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)]), "keras_lp built"),
        (lp.transfer_model(mlp(), 10, trainable="all"), "not wholly frozen"),
        (lp.transfer_model(mlp(), 10, augmentation=keras.layers.GaussianNoise(1.0)), "random"),
        (lp.transfer_model(mlp(), 10, hidden_units=[8]), r"hidden_units=\(\).*`fit`"),
    ]:
        with pytest.raises(ValueError, match=message):
            lp.fit_head(model, digits)
    other = lp.transfer_model(mlp(), 10)
    other.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), optimizer="sgd"
    )
    solve(other, digits)  # the loss of the task, if by other words
    other.compile(loss="mse", optimizer="sgd")
    with pytest.raises(ValueError, match="own losses"):
        lp.fit_head(other, digits)
    two = lp.multitask_model(mlp(), {"a": 10, "b": 10}, trainable="head")
    number = lp.transfer_model(mlp(), lp.Regression())
    focal = lp.Classification(10, loss="focal")
    for model, arguments, message in [
        (fine, {"l2": 0}, "`l2` must be a number above 0"),
        (fine, {"l2": "best"}, "`l2` must be a number above 0"),
        (fine, {"class_weight": "even"}, '"balanced"'),
        (lp.transfer_model(mlp(), focal), {}, "minimises the crossentropy.*focal"),
        (fine, {"class_weight": {11: 2.0}}, "11: 2.0"),
        (two, {"class_weight": "balanced"}, "each task needs its own"),
        (number, {"class_weight": {0: 1.0}}, "Regression"),
        (fine, {"data": (x, y[:5])}, "same number of examples"),
        (fine, {"data": (x[:0], y[:0])}, "at least one"),
        (fine, {"data": (x, y + 1)}, "class numbers"),
        (fine, {"data": (x * np.nan, y)}, "finite"),
        (fine, {"data": (x, np.full(200, -1))}, "weight above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            lp.fit_head(model, **{"data": digits, "verbose": 0, **arguments})
    endless = tf.data.Dataset.from_tensor_slices(digits).batch(50).repeat()
    for data in (x, endless, (row for row in x), None):
        with pytest.raises(TypeError, match=r"`data` must be \(x, y\)"):
            lp.fit_head(fine, data, verbose=0)
