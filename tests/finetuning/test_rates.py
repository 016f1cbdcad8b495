"""Layerwise rates: each against NumPy or plain Keras."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_lp as lp


def network(**kwargs):
    layers = [keras.layers.Dense(5, activation="tanh", name=f"block{i}") for i in (1, 2)]
    return keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1, name="top")])


@pytest.fixture
def xy():
    rng = np.random.default_rng(0)
    return rng.normal(size=(16, 4)).astype("float32"), rng.normal(size=(16, 1)).astype("float32")


def moves(model, xy, **kwargs):
    """How far each variable moves in one `fit` on one batch."""
    before = [np.array(v) for v in model.trainable_variables]
    model.fit(*xy, batch_size=16, shuffle=False, verbose=0, **kwargs)
    return [np.asarray(v) - b for v, b in zip(model.trainable_variables, before, strict=True)]


def ratios(optimizer_with, xy, compile_kwargs=None, **fit_kwargs):
    """The moves with layer rates over those of the plain optimizer, a number a variable."""
    compared = []
    for layered in (True, False):
        keras.utils.set_random_seed(0)
        model = network()
        optimizer = optimizer_with()
        if layered:
            optimizer = lp.layerwise(optimizer, model, layer_decay=0.5)
        model.compile(optimizer, "mse", **(compile_kwargs or {}))
        compared.append(moves(model, xy, **fit_kwargs))
    return [np.median(a / b) for a, b in zip(*compared, strict=True)]


DECAYED = [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "RMSprop", "Adagrad", "Nadam", "Lion"])
def test_blocks_move_in_the_promised_ratios(optimizer, jit, xy):
    found = ratios(
        lambda: getattr(keras.optimizers, optimizer)(1e-3), xy, {"jit_compile": jit}, epochs=1
    )
    np.testing.assert_allclose(found, DECAYED, rtol=1e-3)


def test_one_step_of_sgd_by_hand(xy):
    """A linear model, so that NumPy knows its gradient."""
    x, y = xy
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False, name="a")])
    model.compile(lp.layerwise(keras.optimizers.SGD(0.2), model, layer_rates={"a": 0.05}), "mse")
    w = np.array(model.get_layer("a").kernel)
    gradient = 2 * x.T @ (x @ w - y) / 16
    (moved,) = moves(model, xy)
    np.testing.assert_allclose(moved, -0.05 * gradient, rtol=1e-4)


def test_rates_by_name_and_glob(xy):
    model = network()
    rates = {"head": 1e-1, "block1": 1e-3, "block*": 1e-2}
    optimizer = lp.layerwise(keras.optimizers.SGD(1.0), model, layer_rates=rates)
    np.testing.assert_allclose(optimizer.multipliers, [1e-3] * 2 + [1e-2] * 2 + [1e-1] * 2)
    assert float(optimizer.learning_rate) == 1.0


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (keras.optimizers.schedules.CosineDecay(0.5, 10), 0.5),
        (keras.optimizers.schedules.CosineDecay(0.0, 10, warmup_target=0.25, warmup_steps=2), 0.25),
        (keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.2, 0.1]), 0.2),
    ],
)
def test_rates_under_a_schedule_are_those_of_its_peak(schedule, reference):
    optimizer = lp.layerwise(keras.optimizers.SGD(schedule), network(), layer_rates={"*": 0.05})
    np.testing.assert_allclose(optimizer.multipliers, [0.05 / reference] * 6, rtol=1e-6)


def test_low_and_high_are_spread_geometrically(mlp):
    model = lp.transfer_model(mlp((8, 8, 8)), 2)
    model = lp.finetune_model(model, learning_rate=(1e-5, 1e-2))
    rates = np.array(model.optimizer.multipliers) * float(model.optimizer.learning_rate)
    np.testing.assert_allclose(rates[::2], [1e-5, 1e-4, 1e-3, 1e-2], rtol=1e-5)


def test_finetune_takes_rates_by_name(mlp):
    model = lp.transfer_model(mlp((8, 8)), 2)
    model = lp.finetune_model(
        model, learning_rate=0.1, layer_rates={"head": 0.1, "*": 0.01}, trainable=1
    )
    np.testing.assert_allclose(model.optimizer.multipliers, [0.1, 0.1, 1, 1])


def test_gradient_accumulation_keeps_the_ratios(xy):
    found = ratios(lambda: keras.optimizers.SGD(0.01, gradient_accumulation_steps=2), xy, epochs=2)
    np.testing.assert_allclose(found, DECAYED, rtol=1e-3)


def test_the_moving_average_of_weights_is_kept(xy):
    model = network()
    base = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
    model.compile(lp.layerwise(base, model, layer_decay=0.5), "mse")
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(np.array(self.model.get_layer("top").kernel))

    model.fit(*xy, batch_size=16, epochs=2, verbose=0, callbacks=[Look()])
    average = 0.5 * seen[0] + 0.5 * seen[1]  # which Keras puts in place of the weights at the end
    np.testing.assert_allclose(model.get_layer("top").kernel, average, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_sparse_gradients_of_an_embedding(optimizer):
    tokens = np.array([[1, 2, 2], [3, 1, 1]])
    y = np.ones((2, 1), "float32")
    compared = []
    for decay in (1.0, 0.5, None):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Embedding(6, 4, name="embedding"),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(1, name="top"),
            ]
        )
        made = getattr(keras.optimizers, optimizer)(0.01)
        if decay is not None:
            made = lp.layerwise(made, model, layer_decay=decay)
        model.compile(made, "mse")
        before = np.array(model.layers[0].embeddings)
        model.fit(tokens, y, verbose=0)
        compared.append(np.asarray(model.layers[0].embeddings) - before)
    same, half, plain = compared
    np.testing.assert_allclose(same, plain, atol=1e-7)
    np.testing.assert_allclose(half, plain / 2, rtol=1e-3, atol=1e-6)
    assert not np.any(half[[4, 5]][:, 0]) or optimizer == "AdamW"  # tokens that did not occur


MIRRORED = """
import os, sys, warnings
warnings.simplefilter("ignore")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, numpy as np, keras_lp as lp

x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
y = x[:, :1] * 2
results = []
for strategy in (tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"]), None):
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else tf.device("cpu:0"):
        layers = [keras.layers.Dense(5, name="low"), keras.layers.Dense(1, name="top")]
        model = keras.Sequential([keras.Input((4,)), *layers])
        optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
        model.compile(lp.layerwise(optimizer, model, layer_decay=0.1), "mse")
    model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    results.append([np.asarray(w) for w in model.get_weights()])
print(max(float(np.abs(a - b).max()) for a, b in zip(*results)))
"""


def test_two_replicas_of_a_mirrored_strategy_equal_one_device():
    result = subprocess.run(
        [sys.executable, "-c", MIRRORED], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout.split()[-1]) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either `layer_decay` or `layer_rates`"),
        ({"layer_decay": 0.5, "layer_rates": {"*": 1}}, "either"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"layer_decay": 0}, "layer_decay=0"),
        ({"layer_rates": {"block*": 1e-3}}, r"nothing matches \['top'\].*'\*'"),
        ({"layer_rates": {"*": 1e-3, "blok1": 1e-3}}, r"\['blok1'\].*Did you mean 'block1'"),
        ({"layer_rates": {"*": 0.0}}, "must be a number above 0"),
        ({"layer_rates": {}}, "a dict of rates"),
        ({"layer_rates": [1e-3]}, "a dict of rates"),
    ],
)
def test_wrong_rates_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lp.layerwise(keras.optimizers.SGD(), network(), **arguments)


def test_another_optimizer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"SGD.*Lion.*type Adadelta"):
        lp.layerwise(keras.optimizers.Adadelta(), network(), layer_decay=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": (1e-3, 1e-5)}, "low must be at most high"),
        ({"learning_rate": (1e-3,)}, r"\(low, high\)"),
        ({"learning_rate": (0.0, 1e-3)}, "above 0"),
        ({"learning_rate": (1e-5, 1e-3), "layer_decay": 0.5}, "in one way"),
        ({"layer_rates": {"*": 1e-3}, "layer_decay": 0.5}, "in one way"),
        ({"layer_rates": {"head": 1e-3}}, "nothing matches"),
    ],
)
def test_a_refused_call_leaves_the_model_as_it_was(arguments, message, mlp):
    model = lp.transfer_model(mlp(), 2)
    with pytest.raises(ValueError, match=message):
        lp.finetune_model(model, **arguments)
    assert len(model.trainable_variables) == 2
    model.fit(np.zeros((4, 64)), np.zeros(4), verbose=0)
