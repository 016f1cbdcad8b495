"""Heads with differential privacy: gradients against TensorFlow, and what a history tells."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.tasks.heads import heads
from keras_lp.transfer.head_solver import Labels
from keras_lp.transfer.private_head import clipped_sums, prepared, train_privately

CLASSES = [str(digit) for digit in range(10)]


def labels_of(kind, rng, count):
    weights = rng.uniform(0, 2, count).round(1) * (rng.random(count) > 0.2)  # some are missing
    if kind == "softmax":
        return Labels("softmax", rng.integers(0, 3, count), weights, 3, smoothing=0.1)
    if kind == "soft":
        return Labels("softmax", rng.dirichlet(np.ones(3), count), weights, 3)
    entries = weights[:, None] * (rng.random((count, 2)) > 0.3)
    values = rng.integers(0, 2, (count, 2)) if kind == "sigmoid" else rng.normal(size=(count, 2))
    return Labels(kind, values.astype("float64"), entries, 2)


def loss_of(labels, i, logits):
    """The loss of an example in TensorFlow."""
    y, weight = labels.values[i], labels.weights[i]
    if labels.kind == "softmax":
        y = np.eye(3)[y] if labels.values.ndim == 1 else y
        y = (1 - labels.smoothing) * y + labels.smoothing / 3
        return weight * tf.nn.softmax_cross_entropy_with_logits(y, logits)
    if labels.kind == "sigmoid":
        each = tf.nn.sigmoid_cross_entropy_with_logits(tf.constant(y), logits)
    else:
        each = (logits - y) ** 2
    return tf.reduce_mean(weight * each)


@pytest.mark.parametrize(
    "kinds", [["softmax"], ["soft"], ["sigmoid"], ["squared"], ["softmax", "squared", "sigmoid"]]
)
def test_sums_of_clipped_gradients_are_those_of_tensorflow(kinds):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)).astype("float32")
    labels = {f"{i}{kind}": labels_of(kind, rng, 40) for i, kind in enumerate(kinds)}
    weights = [rng.normal(0, 0.5, (6, one.outputs)) for one in labels.values()]
    gradients = []
    for i in range(40):
        variables = [tf.constant(weight) for weight in weights]
        row = tf.constant(np.append(x[i], 1.0))[None]
        with tf.GradientTape() as tape:
            tape.watch(variables)
            logits = [(row @ variable)[0] for variable in variables]
            pairs = zip(labels.values(), logits, strict=True)
            loss = sum(loss_of(one, i, outputs) for one, outputs in pairs)
        gradients.append([one.numpy() for one in tape.gradient(loss, variables)])
    norms = np.array([np.sqrt(sum((part**2).sum() for part in one)) for one in gradients])
    clip = float(np.median(norms)) * 1.01
    factors = np.minimum(1, clip / np.maximum(norms, 1e-30))
    sums, within = clipped_sums(*prepared(x), labels, weights, clip)
    for i, found in enumerate(sums):
        expected = sum(factor * one[i] for factor, one in zip(factors, gradients, strict=True))
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert within == (norms <= clip).sum()
    # One example more or less moves the sums, as one vector, by at most the clipping norm.
    x[0] *= 1e6
    moved, _ = clipped_sums(
        *prepared(x[1:]), {n: rest(one) for n, one in labels.items()}, weights, clip
    )
    whole, _ = clipped_sums(*prepared(x), labels, weights, clip)
    distance = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(whole, moved, strict=True)))
    assert distance <= clip * (1 + 1e-4)


def test_features_that_are_not_finite_do_not_count():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(9, 5)), {"a": labels_of("softmax", rng, 9)}
    weights = [rng.normal(size=(6, 3))]
    expected, within = clipped_sums(*prepared(x[1:]), {"a": rest(labels["a"])}, weights, 0.5)
    for value in (np.inf, np.nan, 1e38):
        x[0, 2] = value
        found, same = clipped_sums(*prepared(x), labels, weights, 0.5)
        assert np.linalg.norm(found[0] - expected[0]) <= 0.5 + 1e-5
        assert same == within


@pytest.mark.parametrize("l2", [1.0, 1e4])
def test_a_penalty_makes_the_weights_small(l2, model, data):
    norms = []
    for strength in ("auto", l2):
        lp.fit_head(model, data[0], l2=strength, privacy=private(seed=0), verbose=0)
        (head,) = heads(model).values()
        norms.append(np.linalg.norm(head.kernel))
    assert norms[1] < 0.8 * norms[0]


def rest(labels):
    return Labels(
        labels.kind, labels.values[1:], labels.weights[1:], labels.outputs, labels.smoothing
    )


@pytest.fixture
def model(mlp):
    return lp.transfer_model(mlp((64,)), CLASSES)


@pytest.fixture(scope="module")
def data():
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    x_test, y_test = lp.load_dataset("digits", split="test", batch_size=-1)
    return tuple((a.reshape(len(a), 64) / 255.0, b) for a, b in ((x, y), (x_test, y_test)))


def private(**kwargs):
    return lp.DifferentialPrivacy(**{"epsilon": 20, "delta": 1e-4, **kwargs})


def test_a_private_head_learns_and_withholds_what_depends_on_the_examples(model, data, capsys):
    train, test = data
    lp.fit_head(model, train, verbose=0)
    solved = model.evaluate(*test, verbose=0)[1]
    history = lp.fit_head(model, train, validation_data=test, privacy=private())
    assert set(history.history) == {"epsilon", "l2", "val_loss", "val_accuracy"}
    assert 19 < history.history["epsilon"][0] <= 20
    assert history.history["val_accuracy"][0] > solved - 0.06
    assert history.history["val_accuracy"][0] == model.evaluate(*test, verbose=0)[1]
    report = history.privacy_report
    assert (report.unit, report.population, report.releases) == ("example", 1437, 100)
    assert "Head solved with epsilon=" in capsys.readouterr().out


def test_less_budget_means_more_noise(model, data):
    train, test = data
    kernels = {}
    for epsilon in (0.3, 20):
        for seed in (0, 0, 1):
            lp.fit_head(model, train, privacy=private(epsilon=epsilon, seed=seed), verbose=0)
            (head,) = heads(model).values()
            kernels.setdefault((epsilon, seed), []).append(np.array(head.kernel))
    np.testing.assert_array_equal(*kernels[20, 0])
    distance = {e: np.linalg.norm(kernels[e, 0][0] - kernels[e, 1][0]) for e in (0.3, 20)}
    assert distance[0.3] > 10 * distance[20]
    noisy = private(noise_multiplier=1e3, epsilon=None, clip=5.0)
    lp.fit_head(model, train, privacy=noisy, verbose=0)
    assert model.evaluate(*test, verbose=0)[1] < 0.5


def test_the_scale_of_public_examples_is_kept(mlp, data):
    (x, y), (x_test, _) = data
    network = mlp((64,))
    model = lp.transfer_model(network, CLASSES)
    model.fit(x[400:], y[400:], verbose=0)
    (head,) = heads(model).values()
    mean, scale = np.asarray(head.input_mean), np.asarray(head.input_scale)
    assert scale.std() > 0
    settings = private(seed=0)
    lp.fit_head(model, (x[:400], y[:400]), privacy=settings, verbose=0)
    features, test = (
        (network.predict(part, verbose=0) - mean) * scale for part in (x[:400], x_test)
    )
    labels = Labels("softmax", y[:400], np.ones(400), 10)
    found, _ = train_privately(features, {"digit": labels}, 0.0, settings)
    kernel, bias = found["digit"]
    np.testing.assert_allclose(
        model.predict(x_test, verbose=0), test @ kernel + bias, rtol=1e-3, atol=1e-3
    )


def test_several_tasks_share_the_budget(mlp, data):
    (x, y), _ = data
    tasks = {"digit": 10, "ink": lp.Regression(mean=0.3, std=0.1), "even": lp.MultiLabel(1)}
    model = lp.multitask_model(mlp((64,)), tasks, trainable="head")
    labels = {"digit": y, "ink": x.mean(1), "even": (y[:, None] % 2).astype("float32")}
    before = model.evaluate(x, labels, return_dict=True, verbose=0)
    history = lp.fit_head(model, (x, labels), privacy=private(), verbose=0)
    after = model.evaluate(x, labels, return_dict=True, verbose=0)
    assert set(history.history) == {"epsilon", "l2"}
    for name in tasks:
        assert after[f"{name}_loss"] < before[f"{name}_loss"]


def test_what_cannot_be_private_is_refused(mlp, data):
    (x, y), _ = data
    balanced = lp.transfer_model(mlp(), lp.Classification(10, class_weight="balanced"))
    for model, arguments in (
        (balanced, {}),
        (lp.transfer_model(mlp(), 10), {"class_weight": "balanced"}),
    ):
        with pytest.raises(ValueError, match="counts the labels, without noise"):
            lp.fit_head(model, (x, y), privacy=private(), **arguments)
    with pytest.raises(ValueError, match="must allow a step"):
        lp.fit_head(balanced, (x, y), class_weight={0: 2.0}, privacy=private(
            epsilon=0.01, noise_multiplier=1.0
        ))  # fmt: skip
    model = lp.transfer_model(mlp(), lp.Regression())
    with pytest.raises(ValueError, match="needs `mean` and `std`"):
        lp.fit_head(model, (x, x.mean(1)), privacy=private())
    with pytest.raises(ValueError, match="`delta` must be below 1 / examples"):
        lp.fit_head(lp.transfer_model(mlp(), 10), (x, y), privacy=private(delta=1e-3))
    steps = keras.Sequential([keras.Input((4, 8)), keras.layers.Dense(6)])
    model = lp.transfer_model(steps, 3, pooling=None)
    with pytest.raises(ValueError, match=r"features of shape \(4, 6\) per example"):
        lp.fit_head(model, (np.ones((9, 4, 8)), np.zeros((9, 4), int)), privacy=private())
