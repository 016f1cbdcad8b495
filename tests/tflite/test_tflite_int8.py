"""What 8 bits do to a network, and what is put right."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lp as lp
from keras_lp.tflite.device.runtime import load_interpreter
from keras_lp.tflite.export import convert as convert_module
from keras_lp.tflite.export import int8
from keras_lp.tflite.export.convert import convert
from keras_lp.tflite.export.verify import load, run_all
from keras_lp.tflite.interface import describe

pytest.importorskip("ai_edge_litert.interpreter")

LAYERS = {
    "convolution": lambda: keras.layers.Conv2D(6, 3, strides=2, padding="same"),
    "dilated": lambda: keras.layers.Conv2D(3, (3, 2), dilation_rate=2),
    "groups": lambda: keras.layers.Conv2D(6, 3, groups=2),
    "depthwise": lambda: keras.layers.DepthwiseConv2D(3, strides=2, padding="same"),
    "two a channel": lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2),
    "dense": lambda: keras.layers.Dense(5),
}


def uniform(*shape):
    return np.random.default_rng(0).uniform(0, 1, shape).astype("float32")


def units_of(layer):
    """The last axes of a kernel, which are the units: of depthwise convolutions two."""
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    return layer.weights[0].shape[-1 - depthwise :]


def with_layer(name):
    """A network of one layer with weights, which grow along the units; the first are all 0."""
    rng = np.random.default_rng(1)
    layer = LAYERS[name]()
    model = keras.Sequential([keras.Input((9, 9, 4)), layer])
    kernel, bias = layer.weights
    sizes = np.linspace(0, 3, layer.bias.shape[0]).reshape(units_of(layer))
    kernel.assign(rng.normal(size=kernel.shape) * sizes)
    bias.assign(rng.normal(size=bias.shape))
    return model


def rounded(layer):
    """A layer's kernel in 127 steps either way for each unit."""
    values = layer.weights[0].numpy()
    step = np.abs(values.reshape(-1, *units_of(layer))).max(axis=0) / 127
    return np.round(values / np.maximum(step, 1e-9)) * step


def outputs_of(content, model, *inputs, batch_size=1):
    (found,) = run_all(
        load(content, describe(model).input_names), list(inputs), batch_size
    ).values()
    return found


@pytest.fixture
def quantized(monkeypatch):
    """Quantizes; returns the file, and by how much the bias of each layer moved."""

    def quantize(model, *inputs, batch_size=1):
        moved, set_bias = [], int8._set_bias

        def spy(file, layer, bias):
            moved.append(bias - layer.bias)
            set_bias(file, layer, bias)

        monkeypatch.setattr(int8, "_set_bias", spy)
        return convert(describe(model), "int8", list(inputs), batch_size), moved

    return quantize


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_the_bias_takes_back_what_rounded_weights_shift(quantized, name, batch_size):
    """Against Keras with the weights rounded."""
    model, x = with_layer(name), uniform(16, 9, 9, 4)
    before = np.asarray(model(x))
    _, (moved,) = quantized(model, x, batch_size=batch_size)
    model.layers[0].weights[0].assign(rounded(model.layers[0]))
    shift = np.mean(np.asarray(model(x)) - before, axis=(0, 1, 2))
    assert np.abs(shift).max() > 1e-3
    np.testing.assert_allclose(moved, -shift, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_file_rounds_weights_as_was_assumed(quantized, name):
    model = with_layer(name)
    content, _ = quantized(model, uniform(5, 9, 9, 4))
    interpreter = load_interpreter(content, keep_all=True)
    interpreter.allocate_tensors()
    expected = rounded(model.layers[0])
    if isinstance(model.layers[0], keras.layers.DepthwiseConv2D):
        expected = expected.reshape(1, 3, 3, -1)
    else:
        expected = np.moveaxis(expected, -1, 0)
    (stored,) = [
        one
        for one in interpreter.get_tensor_details()
        if one["dtype"] == np.int8 and tuple(one["shape"]) == expected.shape
        if len(one["quantization_parameters"]["scales"]) > 1
    ]
    about = stored["quantization_parameters"]
    shape = [1] * expected.ndim
    shape[about["quantized_dimension"]] = -1
    found = interpreter.get_tensor(stored["index"]) * about["scales"].reshape(shape)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("bias", ["ones", "zeros"])
def test_equal_biases_are_corrected_each_for_its_layer(quantized, bias):
    """A file keeps equal constants once, and leaves biases of 0 out."""
    kernels = [keras.initializers.RandomNormal(stddev=1.0, seed=seed) for seed in range(2)]
    layers = [
        keras.layers.Dense(8, kernel_initializer=one, bias_initializer=bias) for one in kernels
    ]
    model = keras.Sequential([keras.Input((8,)), *layers])
    x = uniform(500, 8) / 2 + 0.5
    content, moved = quantized(model, x)
    assert np.abs(moved[0] - moved[1]).max() > 0.05
    found = outputs_of(content, model, x)
    np.testing.assert_allclose(found.mean(0), np.asarray(model(x)).mean(0), atol=0.01)


def test_inputs_of_several_kinds(quantized):
    ids = keras.Input((5,), dtype="int32", name="ids")
    numbers = keras.Input((4,), name="numbers")
    x = keras.layers.Flatten()(keras.layers.Embedding(20, 6)(ids))
    model = keras.Model([ids, numbers], keras.layers.Dense(3)(keras.ops.hstack([x, numbers])))
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 20, (64, 5)).astype("int32"), uniform(64, 4)
    content, moved = quantized(model, *inputs, batch_size=4)
    assert len(moved) == 1
    found = outputs_of(content, model, *inputs, batch_size=4)
    np.testing.assert_allclose(found, np.asarray(model(list(inputs))), atol=0.02)


def test_a_product_of_two_activations_is_left_alone(quantized):
    x = keras.Input((4, 3))
    model = keras.Model(x, keras.layers.Dot(axes=2)([x, x]))
    content, moved = quantized(model, np.random.default_rng(0).normal(size=(20, 4, 3)).astype("f4"))
    assert moved == []
    found = outputs_of(content, model, np.ones((1, 4, 3), "float32"))
    np.testing.assert_allclose(found, 3, atol=0.2)


# Ranges


def range_of(values, batch_size=1):
    activation, rng = int8._Activation(), np.random.default_rng(0)
    for start in range(0, len(values), batch_size):
        activation.see(values[start : start + batch_size].ravel(), 1000 * batch_size, rng)
    return activation.range("name")


@pytest.mark.parametrize("batch_size", [1, 20])
def test_rare_values_are_cut_off_whatever_the_batches(batch_size):
    values = uniform(200, 5000)
    values[0, 0] = 50  # one of a million
    low, high = range_of(values, batch_size)
    assert 0 < low < 1e-4
    assert 1 - 1e-4 < high < 1


def test_the_draws_are_from_the_whole_of_an_activation():
    values = uniform(200, 5000)
    values[:, 2500:] += 1
    assert range_of(values)[1] == pytest.approx(2, abs=1e-3)


def test_few_values_tell_nothing_of_what_is_rare():
    values = uniform(30, 5000)
    values[0, 0] = 50
    assert range_of(values) == (values.min(), 50)


def test_zeros_do_not_make_the_others_rare():
    """A map with a peak in each of 40 examples: relu has made all else 0."""
    values = np.zeros((40, 2000), "float32")
    values[range(40), range(40)] = np.linspace(1, 7, 40)
    assert range_of(values) == (0, 7)


def test_the_file_has_the_range_without_the_rare_values():
    model = keras.Sequential([keras.Input((40, 40, 1)), keras.layers.Rescaling(1.0, 0.5)])
    x = uniform(100, 40, 40, 1)
    x[0, 0, 0] = 50  # one of 160,000
    interpreter = load_interpreter(convert(describe(model), "int8", [x]), keep_all=True)
    interpreter.allocate_tensors()
    steps = [
        one["quantization"][0]
        for one in interpreter.get_tensor_details()
        if one["dtype"] == np.int8 and one["shape"].size == 4
    ]
    assert steps
    assert max(steps) < 1.6 / 255


def test_an_activation_that_is_not_finite_is_refused():
    x = keras.Input((3,))
    model = keras.Model(x, keras.layers.Dense(2)(keras.ops.log(x)))
    with pytest.raises(ValueError, match=r"must be finite.*Received: values that are not, in '.+'"):
        convert(describe(model), "int8", [np.array([[1, 2, 3], [1, 2, -3]], "float32")])


# The whole


@pytest.mark.parametrize(("count", "expected"), [(16, [8, 8]), (10, [8]), (3, [3])])
def test_no_example_of_calibration_counts_more_than_others(count, expected):
    """Batches of 8: the rest is left out; where there is no more, all come in turn."""
    batches = convert_module._batches(["input"], [np.arange(count)[:, None]], 8)
    found = [batch["input"] for batch in batches]
    assert [one.shape for one in found] == [(8, 1)] * len(expected)
    assert [len(np.unique(one)) for one in found] == expected


def test_what_litert_refuses_is_told(monkeypatch):
    def refuse(*_):
        raise RuntimeError("Encountered unresolved custom op")

    monkeypatch.setattr(convert_module, "quantize", refuse)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=r"Received: model .+Encountered unresolved custom op"):
        convert(describe(model), "int8", [np.ones((4, 1), "float32")])


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
    model = lp.transfer_model(backbone, lp.Regression(3), pretrained=False, trainable="all")
    bright = np.random.default_rng(1).uniform(0.2, 1, (200, 1, 1, 3)).astype("float32")
    x = bright * uniform(200, 16, 16, 3)
    calibration, others = x[:100], x[100:]

    def error(content):
        return np.sqrt(
            np.mean((outputs_of(content, model, others) - np.asarray(model(others))) ** 2)
        )

    plain = error(converters_own(model, calibration))
    batches = convert_module._batches(["input"], [calibration], 1)
    ours = error(int8.quantize(convert(describe(model)), batches))
    with_head = error(convert(describe(model), "int8", [calibration]))
    assert ours < 0.6 * plain
    assert with_head < 0.8 * ours


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


def test_a_line_per_batch_of_calibration(mlp, digits, tmp_path, capsys):
    x = digits[0][:5]
    model = lp.transfer_model(mlp(), 10)
    settings = {"quantization": "int8", "calibration_data": x, "batch_size": 2, "tolerance": 0.0}
    lp.export_tflite(model, tmp_path / "a.tflite", **settings)
    assert capsys.readouterr().out == ""
    lp.export_tflite(model, tmp_path / "b.tflite", **settings, verbose=1)
    lines = capsys.readouterr().out.splitlines()
    # Two batches to measure activations on, and again to correct the head.
    assert [line.split(" - ")[0] for line in lines] == [f"Calibration {i}/4" for i in (1, 2, 3, 4)]
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()
