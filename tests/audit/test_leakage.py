"""Attacks on updates against data that is known, and defences against the attacks."""

import base64
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_lp as lp
from keras_lp.audit import attacks, leakage
from keras_lp.audit.twin import gradients, input_of, twin_of
from keras_lp.audit.updates import update_of
from keras_lp.backbones.images import Augmentation
from keras_lp.federated.engine import installation

NOISE = lp.DifferentialPrivacy(noise_multiplier=1.0, delta=1e-5)


@pytest.fixture(scope="module")
def pictures():
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    return x[:6].astype("float32") / 255, y[:6]


def wide():
    """A network whose first trained layer is dense."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(32, "relu")]
    return trained(keras.Sequential(layers))


def convolutional(activation="sigmoid"):
    """A smooth convolutional network with weights as in Zhu et al., 2019."""
    keras.utils.set_random_seed(0)
    uniform = keras.initializers.RandomUniform(-0.5, 0.5)
    options = {"kernel_initializer": uniform, "bias_initializer": uniform, "padding": "same"}
    return trained(
        keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Conv2D(12, 3, activation=activation, **options),
                keras.layers.Conv2D(12, 3, strides=2, activation=activation, **options),
                keras.layers.Flatten(),
            ]
        )
    )


def trained(backbone, **arguments):
    options = {"pretrained": False, "trainable": "all", "optimizer": "sgd", "learning_rate": 0.1}
    return lp.transfer_model(backbone, 10, pooling=None, **{**options, **arguments})


def audit(model, x, y, **arguments):
    return lp.audit_update_leakage(model, x, y, verbose=0, **arguments)


def test_the_analytic_attack_reads_the_inputs_of_a_dense_layer(pictures):
    x, y = pictures
    found = audit(wide(), x, y)
    assert found.attack == "analytic"
    result = found.results["none"]
    np.testing.assert_allclose(result.reconstructions, x, atol=1e-4)
    np.testing.assert_allclose(result.features, 1, atol=1e-6)
    assert result.labels == 1
    assert result.read == len(x)
    np.testing.assert_allclose(result.ssim, 1, atol=1e-5)


def test_gradient_matching_reads_pictures_of_a_convolutional_network(pictures):
    x, y = (part[:2] for part in pictures)
    found = audit(convolutional(), x, y)
    assert found.attack == "gradient_matching"
    result = found.results["none"]
    assert result.psnr.min() > 60
    assert result.labels == 1
    assert result.features is None


@pytest.mark.slow
def test_gradient_matching_reads_mnist_with_the_network_of_the_paper(tfds_dir):
    x, y = lp.load_dataset("mnist", split="test[:6]", batch_size=-1, data_dir=tfds_dir)
    keras.utils.set_random_seed(0)
    uniform = keras.initializers.RandomUniform(-0.5, 0.5)
    options = {"kernel_initializer": uniform, "bias_initializer": uniform, "padding": "same"}
    layers = [
        keras.layers.Conv2D(12, 5, strides=strides, activation="sigmoid", **options)
        for strides in (2, 2, 1)
    ]
    model = trained(keras.Sequential([keras.Input((28, 28, 1)), *layers, keras.layers.Flatten()]))
    result = audit(model, x.astype("float32") / 255, y).results["none"]
    assert result.psnr.min() > 60
    assert result.labels == 1


@pytest.mark.parametrize("make", [wide, convolutional])
def test_noise_hides_the_pictures_from_both_attacks(make, pictures):
    x, y = (part[:3] for part in pictures)
    for seed in range(3):
        found = audit(make(), x, y, defense=NOISE, max_iterations=200, seed=seed)
        result = found.results["noise multiplier 1"]
        assert result.psnr.max() < 10
        assert result.read == 0
        assert "reads" not in found.verdict
        assert "No example is read with: noise multiplier 1." in found.verdict


def test_a_head_on_a_frozen_network_reveals_its_features(pictures):
    x, y = (part[:2] for part in pictures)
    keras.utils.set_random_seed(0)

    def frozen(*layers):
        return lp.transfer_model(
            keras.Sequential([keras.Input((8, 8, 1)), *layers, keras.layers.Flatten()]),
            10, pooling=None, optimizer="sgd", cache_features=False,
        )  # fmt: skip

    few = audit(frozen(keras.layers.Conv2D(2, 3, 3, activation="relu")), x, y, max_iterations=100)
    many = audit(frozen(keras.layers.Conv2D(8, 3, activation="sigmoid")), x, y)
    for found in (few, many):
        assert found.attack == "analytic"
        np.testing.assert_allclose(found.results["none"].features, 1, atol=1e-6)
    assert few.results["none"].read == 0  # 8 features of 64 pixels
    assert "inputs of the first trained layer (the features) of all of them" in few.verdict
    assert many.results["none"].read == 2
    assert "features" not in many.verdict


def test_the_features_of_a_trained_head_are_read_too(pictures):
    """`fit` scales the inputs of the head, and the gradient of its kernel has the scaled ones."""
    x, y = pictures
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8, 8, 1)), keras.layers.Conv2D(8, 3, activation="sigmoid")]
    network = keras.Sequential([*layers, keras.layers.Flatten()])
    model = lp.transfer_model(network, 10, pooling=None, optimizer="sgd", learning_rate=0.1)
    model.fit(x, y, epochs=2, verbose=0)
    assert np.abs(model.layers[-1].input_mean).max() > 0
    result = audit(model, x[:2], y[:2]).results["none"]
    np.testing.assert_allclose(result.features, 1, atol=1e-5)
    assert result.read == 2


def test_batch_normalization_and_dropout(pictures):
    x, y = (part[:2] for part in pictures)
    keras.utils.set_random_seed(0)

    def made(*layers):
        network = [keras.Input((8, 8, 1)), keras.layers.Conv2D(12, 3, padding="same"), *layers]
        return trained(keras.Sequential([*network, keras.layers.Flatten()]))

    normalized = made(keras.layers.BatchNormalization(), keras.layers.Activation("tanh"))
    assert audit(normalized, x, y).results["none"].read == 2
    twin = twin_of(made(keras.layers.Dropout(0.5), Augmentation(keras.layers.RandomFlip())))
    one = tf.constant(x, "float64")
    np.testing.assert_array_equal(twin(one, training=True), twin(one, training=False))


def test_a_good_guess_is_not_reading():
    rng = np.random.default_rng(0)
    x = (rng.uniform(size=(16, 400)) < 0.006).astype("float32")
    network = keras.Sequential([keras.Input((400,)), keras.layers.Dense(32, "relu")])
    found = audit(trained(network), x, np.arange(16) % 10, defense=[None, NOISE])
    assert found.guess > 20
    assert found.results["none"].read == 16
    assert found.results["noise multiplier 1"].read == 0
    assert "whoever adds it sees updates without it" in found.verdict


def test_clients_of_a_batch_are_of_about_the_same_size():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(9, 64)).astype("float32")
    model = trained(keras.Sequential([keras.Input((64,)), keras.layers.Dense(4, "relu")]))
    found = audit(model, x, np.arange(9), defense="batch", batch_size=8)
    assert list(found.results) == ["batch of 9"]
    assert found.results["batch of 9"].read < 9
    assert list(audit(model, x, np.arange(9), defense="batch", batch_size=4).results) == [
        "batch of 4"
    ]


def test_a_layer_that_is_used_on_steps():
    x = np.random.default_rng(0).uniform(size=(2, 5, 3))
    found = audit(sequence(), x, np.array([0, 1]), max_iterations=20)
    assert found.attack == "gradient_matching"


def test_all_defences(pictures):
    x, y = pictures
    found = audit(wide(), x, y, defense="all", batch_size=4, local_steps=3)
    assert list(found.results) == [
        "none",
        "batch of 6",
        "3 local steps",
        "Quantize(bits=1)",
        "TopK(fraction=0.01)",
        "noise multiplier 1",
    ]
    text = str(found)
    header, *rows = text.splitlines()[1:8]
    assert re.split("  +", header) == [
        *("defence", "read", "PSNR", "highest", "SSIM", "inputs of the layer", "labels"),
    ]
    assert [re.split("  +", row)[:2] for row in rows] == [
        [name, f"{one.read} of 6"] for name, one in found.results.items()
    ]
    assert f"Guessing the mean of the other examples: {found.guess:.1f} dB" in text
    assert "Without a defence, the attacker reads 6 of 6 examples." in text
    assert "3 local steps (6 of 6)" in found.verdict
    for result in found.results.values():
        assert result.reconstructions.shape == x.shape
        np.testing.assert_allclose(
            result.psnr, leakage.psnr(x, result.reconstructions, x.max() - x.min())
        )


def test_other_tasks_and_models(pictures):
    x, _ = (part[:2] for part in pictures)
    backbone = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()])
    values = lp.transfer_model(
        backbone, lp.Regression(), pretrained=False, trainable="all", pooling=None, optimizer="sgd",
        hidden_units=[16],
    )  # fmt: skip
    found = audit(values, x, np.array([0.5, -1.0], "float32"))
    np.testing.assert_allclose(found.results["none"].reconstructions, x, atol=1e-4)
    assert found.results["none"].labels is None
    assert "labels" not in str(found).splitlines()[1]

    layers = [keras.Input((64,)), keras.layers.Dense(16, "tanh"), keras.layers.Dropout(0.3)]
    plain = keras.Sequential([*layers, keras.layers.Dense(1, "sigmoid")])
    plain.compile("adam", "binary_crossentropy")
    found = audit(plain, x.reshape(2, 64), np.array([1, 0]))
    np.testing.assert_allclose(found.results["none"].reconstructions, x.reshape(2, 64), atol=1e-4)
    assert found.results["none"].labels == 1
    assert np.isnan(found.results["none"].ssim).all()
    assert "SSIM" not in str(found).splitlines()[1]
    plain = keras.Sequential([keras.Input((64,)), keras.layers.Dense(3, "softmax")])
    plain.compile("sgd", "categorical_crossentropy")
    found = audit(plain, x.reshape(2, 64), np.eye(3)[[2, 0]], attack="gradient_matching")
    assert found.results["none"].labels == 1
    assert found.results["none"].read == 2


def test_class_names_as_labels(pictures):
    model = trained(keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()]))
    named = lp.transfer_model(
        keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(9)]),
        ["even", "odd"], pretrained=False, trainable="all", pooling=None, optimizer="sgd",
    )  # fmt: skip
    x, y = (part[:3] for part in pictures)
    names = np.array(["even", "odd"])[y % 2]
    assert audit(named, x, names).results["none"].labels == 1
    assert audit(model, x, y).results["none"].labels == 1


def test_an_audit_does_not_change_the_model(pictures):
    x, y = (part[:1] for part in pictures)
    model = wide()
    before = [np.array(variable) for variable in model.variables]
    audit(model, x, y, defense=[None, lp.Quantize(8)])
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert keras.config.floatx() == "float32"
    assert all("call" not in vars(layer) for layer in model.layers)


def test_the_same_seed_gives_the_same_audit(pictures):
    x, y = (part[:1] for part in pictures)
    model = wide()
    first, again, other = (
        audit(model, x, y, defense=NOISE, seed=seed).results["noise multiplier 1"]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.reconstructions, again.reconstructions)
    assert not np.array_equal(first.reconstructions, other.reconstructions)


@pytest.mark.skipif(
    installation.unsupported_platform() is not None, reason="TFF has wheels for Linux x86-64 only"
)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_update_is_that_of_a_federation(steps, pictures):
    x, y = pictures
    model, rate = wide(), 0.1
    update = update_of(model, x, y, rate, steps, None, seed=0)
    before = [np.array(variable) for variable in model.trainable_variables]
    federated = lp.FederatedAveraging(model, batch_size=None, local_epochs=steps)
    federated.fit({"a": (x, y)}, rounds=1, verbose=0)
    for one, old, new in zip(update, before, model.trainable_variables, strict=True):
        np.testing.assert_allclose(rate * steps * one, old - np.array(new), atol=1e-6)


def test_clipping_and_noise(pictures):
    x, y = (part[:1] for part in pictures)
    model = wide()

    def flat(defense, seed=0):
        update = update_of(model, x, y, 0.1, 1, defense, seed)
        return 0.1 * np.concatenate([one.ravel() for one in update])

    def private(noise, clip="adaptive"):
        return lp.DifferentialPrivacy(noise_multiplier=noise, clip=clip, delta=1e-5)

    plain = flat(None)
    norm = np.linalg.norm(plain)
    np.testing.assert_allclose(flat(private(1e-9)), plain, atol=1e-6)
    clipped = flat(private(1e-9, clip=float(norm / 4)))
    np.testing.assert_allclose(clipped, plain / 4, atol=1e-6)
    np.testing.assert_allclose(flat(private(1e-9, clip=float(4 * norm))), plain, atol=1e-6)
    noise = flat(private(2.0, clip=float(norm / 4))) - clipped
    # The standard deviation of n draws is within 5 / sqrt(2 n) of the true one.
    assert abs(noise.std() / (norm / 2) - 1) < 5 / np.sqrt(2 * noise.size)
    top = flat(lp.TopK(0.1))
    assert (top != 0).sum() == round(0.1 * top.size)


def test_the_attacker_computes_in_float64(pictures, convnet):
    x, y = pictures
    backbone = convnet()
    model = lp.transfer_model(backbone, 10, optimizer="sgd", pooling="avg")
    model.layers[-1].kernel.assign(np.random.default_rng(0).normal(size=(8, 10)))
    twin = twin_of(model)
    assert {variable.dtype for variable in twin.trainable_variables} == {"float64"}
    exact = np.asarray(twin(tf.constant(x, "float64")))
    assert exact.dtype == np.float64
    np.testing.assert_allclose(exact, model.predict(x, verbose=0), atol=1e-5)
    ours = gradients(model, x, y, model.trainable_variables)
    theirs = gradients(twin, tf.constant(x, "float64"), y, twin.trainable_variables)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert other.dtype == tf.float64
    assert abs(exact - np.asarray(model(x), "float64")).max() > 1e-12


def test_the_input_of_a_layer_inside_a_network():
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    inputs = keras.Input((3,))
    model = keras.Model(inputs, inner(2 * inputs))
    first, second = inner.layers
    x = tf.ones((1, 3))
    np.testing.assert_allclose(input_of(first, lambda: model(x)), 2 * x)
    np.testing.assert_allclose(input_of(second, lambda: model(x)), first(2 * x))
    np.testing.assert_allclose(model(x), second(first(2 * x)))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10_000))
def test_the_label_of_one_example_is_in_the_bias(classes, seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(classes)
    odds = np.exp(rng.normal(0, 3, classes))
    gradient = odds / odds.sum() - np.eye(classes)[label]
    assert attacks.read_labels(gradient, 1).tolist() == [label]


def test_labels_of_a_batch_and_of_one_output():
    # Probabilities of 1/4 each, labels 0, 1, 1: the sums of probability minus label.
    gradient = np.array([0.75 - 1, 0.75 - 2, 0.75, 0.75]) / 3
    assert sorted(attacks.read_labels(gradient, 3).tolist()) == [0, 1, 1]
    assert attacks.read_labels(np.array([0.3]), 1).tolist() == [0]
    assert attacks.read_labels(np.array([-0.7]), 2).tolist() == [1, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 10_000))
def test_dense_inputs_by_hand(columns, units, seed):
    rng = np.random.default_rng(seed)
    x, slopes = rng.normal(size=(1, columns)), rng.normal(size=units)
    found = attacks.read_dense_inputs(np.outer(x, slopes), slopes, x)
    np.testing.assert_allclose(found, x, rtol=1e-9)
    # Two examples, each of which a unit of its own sees.
    x = rng.normal(size=(2, columns + 1))
    kernel, bias = x.T @ np.diag([3.0, -2.0]), np.array([3.0, -2.0])
    np.testing.assert_allclose(attacks.read_dense_inputs(kernel, bias, x), x, rtol=1e-9)


def test_scores_by_hand():
    x = np.zeros((2, 12, 12, 1), "float32")
    x[1] = 1
    other = x + np.array([0.1, 0.5], "float32")[:, None, None, None]
    np.testing.assert_allclose(leakage.psnr(x, other, 1.0), [20, 20 * np.log10(2)], rtol=1e-5)
    np.testing.assert_allclose(leakage.psnr(x, 2 * other - x, 2.0), [20, 20 * np.log10(2)], 1e-5)
    assert leakage.psnr(x, x, 1.0).tolist() == [300, 300]
    # Two constant pictures have no structure: only the term of the means is left.
    terms = [1e-4 / (0.01 + 1e-4), (2 * 1.5 + 1e-4) / (1 + 2.25 + 1e-4)]
    np.testing.assert_allclose(leakage.ssim(x, other, 1.0), terms, rtol=5e-3)


def test_the_guess_by_hand(pictures):
    x = np.array([[0.0, 1.0], [1.0, 1.0], [0.5, 0.0]], "float32")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    # Differences to the means of the other two.
    differences = np.array([[-0.75, 0.5], [0.75, 0.5], [0.0, -1.0]])
    expected = np.mean(-10 * np.log10(np.mean(differences**2, axis=1)))
    np.testing.assert_allclose(audit(model, x, np.array([0, 1, 1])).guess, expected, rtol=1e-5)


def test_the_page_has_the_pictures_and_needs_nothing_else(tmp_path, pictures):
    x, y = pictures
    found = audit(wide(), x, y, defense=[None, lp.Quantize(8)])
    found.save(tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text()
    encoded = re.findall(r'alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)
    assert [name for name, _ in encoded[::6]] == [
        f"{name}, example 1" for name in ("original", "no defence", "Quantize(bits=8)")
    ]
    images = np.array([tf.io.decode_png(base64.b64decode(code)).numpy() for _, code in encoded])
    np.testing.assert_array_equal(images[:6], np.round(255 * x))
    np.testing.assert_allclose(images[6:12], images[:6], atol=1)
    assert "without a defence, the attacker reads 6 of 6 examples." in page.lower()
    assert not re.search(r"https?:|<script|<link", page)
    columns = audit(
        trained(keras.Sequential([keras.Input((64,)), keras.layers.Dense(9)])),
        x.reshape(6, 64), y,
    )  # fmt: skip
    columns.save(tmp_path / "columns.html", {"More & more": found})
    page = (tmp_path / "columns.html").read_text()
    assert page.index("<h2>What an update reveals") < page.index("<h2>More &amp; more</h2>")
    assert "<img" not in page[: page.index("<h2>More")]
    assert page.count("<img") == 18


class Same(keras.layers.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


def sequence():
    inputs = keras.Input((5, 3))
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.Dense(4)(inputs))
    return compiled(inputs, keras.layers.Dense(2)(x))


def compiled(inputs, outputs):
    model = keras.Model(inputs, outputs)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def embedding():
    inputs = keras.Input((5,), dtype="int32")
    return compiled(inputs, keras.layers.Flatten()(keras.layers.Embedding(9, 2)(inputs)))


def unnamed():
    inputs = keras.Input((3,))
    return compiled(inputs, keras.layers.Dense(2)(Same(lambda x: 2 * x)(inputs)))


def frozen():
    inputs = keras.Input((3,))
    model = compiled(inputs, keras.layers.Dense(2)(inputs))
    model.trainable = False
    return model


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)
        self.compile("sgd", "mse")

    def call(self, x):
        return self.dense(x)


def resting():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    rate = keras.optimizers.schedules.CosineDecay(0.0, 9, warmup_target=0.1, warmup_steps=3)
    model.compile(
        keras.optimizers.SGD(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


X3 = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("make", "x", "arguments", "message"),
    [
        (
            sequence,
            np.random.rand(2, 5, 3),
            {"attack": "analytic"},
            "used at several places of each example",
        ),
        (
            embedding,
            np.ones((2, 5), int),
            {},
            "inputs of dtype int32. Build it with floating-point",
        ),
        (unnamed, X3, {}, "layers and losses must have a config"),
        (frozen, X3, {}, "Only trained weights are sent"),
        (lambda: "model", X3, {}, "needs a compiled Keras model. Received: 'model'"),
        (wide, np.zeros((2, 8, 8, 1)), {}, "`x` must be finite and not all the same"),
        (wide, np.random.rand(2, 64), {}, "the rank of the model's input"),
        (wide, np.random.rand(3, 8, 8, 1), {}, r"shapes \(3, 8, 8, 1\) and \(2,\)"),
        (wide, np.random.rand(2, 8, 8, 1), {"attack": "guess"}, "`attack` must be one of"),
        (wide, np.random.rand(2, 8, 8, 1), {"restarts": 0}, "`restarts` must be an integer"),
        (wide, np.random.rand(2, 8, 8, 1), {"defense": "noise"}, "`defense` must be None"),
        (wide, np.random.rand(2, 8, 8, 1), {"defense": []}, "at least one entry"),
        (wide, np.random.rand(2, 8, 8, 1), {"defense": [np.ones(2)]}, "`defense` must be None"),
        (wide, 3.0, {}, "the rank of the model's input"),
        (Subclassed, X3, {}, "needs a Functional or Sequential model"),
        (resting, X3, {}, "learning rate must be above 0. Received: .*0.0"),
        (
            wide,
            np.random.rand(2, 8, 8, 1),
            {"defense": lp.DifferentialPrivacy(epsilon=8, delta=1e-5)},
            "An audit needs the noise itself",
        ),
    ],
)
def test_wrong_input(make, x, arguments, message):
    with pytest.raises(ValueError, match=message):
        audit(make(), x, np.array([0, 1]), **arguments)


def test_more_wrong_input(pictures):
    x, y = pictures
    with pytest.raises(ValueError, match='The defence "batch" needs two examples'):
        audit(wide(), x[:1], y[:1], defense="batch")
    inputs = keras.Input((8, 8, 1))
    model = compiled(inputs, keras.layers.Flatten()(keras.layers.Conv2D(2, 3)(inputs)))
    with pytest.raises(ValueError, match="needs a trained Dense layer with a bias"):
        audit(model, x, y, attack="analytic")
    several = lp.multitask_model(
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]), {"a": 2, "b": 2}
    )
    with pytest.raises(ValueError, match="one input and one task"):
        audit(several, np.ones((1, 4)), np.array([0]))
    with pytest.raises(ValueError, match="12"):
        audit(wide(), x[:1], np.array([12]))
    with pytest.raises(ValueError, match="1 missing labels of the task 'predictions'"):
        audit(wide(), x[:2], np.array([3, -1]))
