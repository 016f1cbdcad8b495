"""What 8 bits do to a network, and what is put right."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.tflite import int8
from keras_lp.tflite.convert import convert
from keras_lp.tflite.correction import corrected_heads
from keras_lp.tflite.interface import input_names
from keras_lp.tflite.runtime import load_interpreter
from keras_lp.tflite.verify import load, run_all

pytest.importorskip("ai_edge_litert.interpreter")


def pictures(count):
    return np.random.default_rng(0).uniform(0, 1, (count, 9, 9, 4)).astype("float32")


def with_layer(layer):
    """A network of one layer with weights, which grow along the units."""
    rng = np.random.default_rng(1)
    model = keras.Sequential([keras.Input((9, 9, 4)), layer])
    kernel, bias = layer.weights
    kernel.assign(rng.normal(size=kernel.shape) * np.linspace(1, 3, kernel.shape[-1]))
    bias.assign(rng.normal(size=bias.shape))
    return model


LAYERS = {
    "convolution": lambda: keras.layers.Conv2D(6, 3, strides=2, padding="same"),
    "dilated": lambda: keras.layers.Conv2D(3, (3, 2), dilation_rate=2),
    "groups": lambda: keras.layers.Conv2D(6, 3, groups=2),
    "depthwise": lambda: keras.layers.DepthwiseConv2D(3, strides=2, padding="same"),
    "two a channel": lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2),
    "dense": lambda: keras.layers.Dense(5),
}


@pytest.fixture
def quantized(monkeypatch):
    """Quantizes; returns the new biases, less the old ones, in the order of the layers."""

    def quantize(model, x):
        moved, set_bias = [], int8._set_bias

        def spy(file, layer, bias):
            moved.append(bias - layer.bias)
            set_bias(file, layer, bias)

        monkeypatch.setattr(int8, "_set_bias", spy)
        return convert(model, "int8", [x], activate=False), moved

    return quantize


@pytest.mark.parametrize("name", LAYERS)
def test_the_bias_takes_back_what_rounded_weights_shift(quantized, name):
    """Against Keras with the weights rounded."""
    model, x = with_layer(LAYERS[name]()), pictures(20)
    before = np.asarray(model(x))
    _, (moved,) = quantized(model, x)
    kernel = model.layers[0].weights[0]
    values = kernel.numpy()
    if name in ("depthwise", "two a channel"):  # the units are the last two axes
        step = np.abs(values).max(axis=(0, 1)) / 127
    else:
        step = np.abs(values).max(axis=tuple(range(values.ndim - 1))) / 127
    kernel.assign(np.round(values / step) * step)
    shift = np.mean(np.asarray(model(x)) - before, axis=(0, 1, 2))
    assert np.abs(shift).max() > 1e-3
    np.testing.assert_allclose(moved, -shift, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_file_rounds_weights_as_was_assumed(quantized, name):
    model = with_layer(LAYERS[name]())
    content, _ = quantized(model, pictures(5))
    interpreter = load_interpreter(content, keep_all=True)
    interpreter.allocate_tensors()
    values = model.layers[0].weights[0].numpy()
    if name in ("depthwise", "two a channel"):
        values, axis = values.reshape(1, 3, 3, -1), 3
    else:
        values, axis = np.moveaxis(values, -1, 0), 0
    (stored,) = [
        one
        for one in interpreter.get_tensor_details()
        if one["dtype"] == np.int8
        and sorted(one["shape"]) == sorted(values.shape)
        and len(one["quantization_parameters"]["scales"]) == values.shape[axis]
    ]
    scales = stored["quantization_parameters"]["scales"]
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    np.testing.assert_allclose(
        interpreter.get_tensor(stored["index"]) * scales.reshape(shape),
        int8.rounded(values, axis),
        atol=1e-6,
    )


def test_equal_biases_are_corrected_each_for_its_layer(quantized):
    """A file keeps equal constants once; here two of zeros."""
    wide = [keras.initializers.RandomNormal(stddev=1.0, seed=seed) for seed in range(2)]
    layers = [keras.layers.Dense(8, kernel_initializer=one) for one in wide]
    model = keras.Sequential([keras.Input((8,)), *layers])
    x = np.random.default_rng(0).uniform(0.5, 1, (500, 8)).astype("float32")
    content, moved = quantized(model, x)
    assert len(moved) == 2
    (found,) = run_all(load(content, ["input"]), [x], 1).values()
    assert np.abs(moved[0] - moved[1]).max() > 0.05
    np.testing.assert_allclose(found.mean(0), np.asarray(model(x)).mean(0), atol=0.01)


def test_rare_activations_do_not_widen_the_range():
    assert int8._range(np.arange(-50_000, 50_001) / 1e3) == (-49.997, 49.997)
    assert int8._range(np.array([-7.0, 0.0, 1.0, 500.0])) == (-7.0, 500.0)


def test_the_range_in_the_file_is_without_the_rare_values():
    model = keras.Sequential([keras.Input((40, 40, 1)), keras.layers.Rescaling(1.0, 0.5)])
    x = np.random.default_rng(0).uniform(0, 1, (100, 40, 40, 1)).astype("float32")
    x[0, 0, 0] = 50  # one of 160,000
    interpreter = load_interpreter(convert(model, "int8", [x]), keep_all=True)
    interpreter.allocate_tensors()
    scales = {
        one["name"]: one["quantization"][0]
        for one in interpreter.get_tensor_details()
        if one["dtype"] == np.int8 and one["shape"].size == 4
    }
    assert scales
    assert max(scales.values()) < 1.6 / 255, scales


def test_a_product_of_two_activations_is_left_alone(quantized):
    x = keras.Input((4, 3))
    model = keras.Model(x, keras.layers.Dot(axes=2)([x, x]))
    x = np.random.default_rng(0).normal(size=(20, 4, 3)).astype("float32")
    content, moved = quantized(model, x)
    assert moved == []
    (found,) = run_all(
        load(content, input_names(model)), [np.ones((1, 4, 3), "float32")], 1
    ).values()
    np.testing.assert_allclose(found, 3, atol=0.2)


def test_a_depthwise_network_comes_nearer_to_keras():
    """Each step on examples not calibrated on: the converter's own int8, ours, with its head."""
    keras.utils.set_random_seed(1)
    normal = keras.initializers.RandomNormal
    inputs = x = keras.Input((16, 16, 3))
    for _ in range(8):
        x = keras.layers.Conv2D(16, 1, bias_initializer=normal(stddev=0.3))(x)
        x = keras.layers.ReLU(6.0)(x)
        depthwise = keras.layers.DepthwiseConv2D(
            3, padding="same", depthwise_initializer=normal(stddev=0.5)
        )
        x = keras.layers.ReLU(6.0)(depthwise(x))
    backbone = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    model = lp.transfer_model(backbone, 3, pretrained=False, trainable="all")
    rng = np.random.default_rng(0)
    bright = rng.uniform(0.2, 1, (200, 1, 1, 3))
    x = (bright * rng.uniform(0, 1, (200, 16, 16, 3))).astype("float32")
    calibration, others = x[:100], x[100:]

    def error(content):
        found = run_all(load(content, ["input"]), [others], 1)["predictions"]
        return np.sqrt(np.mean((found - np.asarray(model(others))) ** 2))

    plain = error(converters_own(model, calibration))
    ours = error(convert(model, "int8", [calibration], activate=False))
    with corrected_heads(model, [calibration], 1):
        content = convert(model, "int8", [calibration], activate=False)
    assert ours < 0.6 * plain
    assert error(content) < 0.8 * ours


def converters_own(model, calibration):
    @tf.function(input_signature=[tf.TensorSpec((1, 16, 16, 3), name="input")])
    def serve(x):
        return {"predictions": model(x)}

    module = tf.Module()
    module.held = [variable.value for variable in model.variables]
    module.serve = serve
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [serve.get_concrete_function()], module
    )
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ({"input": one[None]} for one in calibration)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tf.lite.Interpreter is deprecated")
        return converter.convert()
