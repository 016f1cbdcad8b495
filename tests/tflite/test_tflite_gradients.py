"""Gradients in builtin operations, compared with TensorFlow's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lp.tflite.training.gradients import Untrainable, builtin_gradients, gradients


def both(function, *shapes, values=None):
    """The gradients of sum(function(*inputs) * constants): those of the module, TensorFlow's."""
    rng = np.random.default_rng(0)
    inputs = values or [rng.normal(size=shape).astype("float32") for shape in shapes]

    def loss(*tensors):
        y = function(*tensors)
        factors = np.random.default_rng(1).normal(size=y.shape).astype("float32")
        return tf.reduce_sum(y * factors)

    @tf.function(autograph=False)
    def ours(*tensors):
        with builtin_gradients():
            value = loss(*tensors)
        found = gradients(value, tensors)
        kinds = {op.type for op in tf.compat.v1.get_default_graph().get_operations()}
        assert not [kind for kind in kinds if kind.endswith(("Grad", "Filter", "BackpropInput"))
                    and kind not in ("BiasAddGrad", "Conv2DBackpropInput")]  # fmt: skip
        return found

    @tf.function(autograph=False)
    def theirs(*tensors):
        return tf.gradients(loss(*tensors), tensors)

    tensors = [tf.constant(value) for value in inputs]
    return ours(*tensors), [tf.convert_to_tensor(g) for g in theirs(*tensors)]


def assert_equal(pair):
    for ours, theirs in zip(*pair, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_convolutions(size, stride, padding):
    assert_equal(
        both(lambda x, w: tf.nn.conv2d(x, w, stride, padding), (2, 8, 7, 3), (size, size, 3, 4))
    )


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_depthwise_convolutions(size, stride, padding):
    def function(x, w):
        return tf.nn.depthwise_conv2d(x, w, [1, stride, stride, 1], padding)

    assert_equal(both(function, (2, 8, 7, 3), (size, size, 3, 1)))


@pytest.mark.parametrize("pool", [tf.nn.max_pool2d, tf.nn.avg_pool2d])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (3, 1), (2, 3), ((1, 3), (2, 1))])
def test_pools_whose_windows_overlap_or_leave_gaps(pool, padding, size, stride):
    assert_equal(both(lambda x: pool(x, size, stride, padding), (2, 9, 7, 3)))


def test_of_equal_maxima_the_first_gets_the_gradient():
    x = np.zeros((1, 4, 4, 2), "float32")  # a blank picture, with one bright spot
    x[0, 1, 1] = 1
    ours, theirs = both(lambda x: tf.nn.max_pool2d(x, 2, 2, "VALID"), values=[x])
    np.testing.assert_array_equal(ours[0], theirs[0])


@pytest.mark.parametrize(
    "name",
    ["relu", "relu6", "leaky_relu", "tanh", "sigmoid", "softplus", "silu", "hard_sigmoid",
     "hard_silu", "softmax", "exponential", "tanh_shrink"],
)  # fmt: skip
def test_activations(name):
    function = keras.activations.get(name)
    values = [np.linspace(-7, 7, 30, dtype="float32").reshape(3, 10)]
    assert_equal(both(function, values=values))


@pytest.mark.parametrize("function", [tf.sqrt, tf.math.rsqrt])
def test_roots(function):
    assert_equal(both(lambda x: function(x * x + 1), (3, 4)))


def test_rows_of_a_table_looked_up_more_than_once():
    indices = [[0, 2, 2], [3, 0, 2]]
    assert_equal(both(lambda table: tf.gather(table, indices), (5, 4)))


def test_new_axes():
    assert_equal(both(lambda x: x[:, None, ..., None], (2, 3, 4)))


def test_weights_that_do_nothing_have_gradient_0():
    @tf.function(autograph=False)
    def step(a, b):
        with builtin_gradients():
            loss = tf.reduce_sum(a * tf.stop_gradient(b))
        return gradients(loss, [a, b])

    a, b = step(tf.ones(2), tf.fill([2], 3.0))
    np.testing.assert_array_equal(a, [3, 3])
    np.testing.assert_array_equal(b, [0, 0])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w: tf.nn.elu(x), "Elu"),
        (lambda x, w: x[:, 1:], "a slice"),
        (lambda x, w: x[:, ::-1], "a slice"),
        (lambda x, w: tf.gather(x, [0], axis=1), "a lookup"),
        (lambda x, w: tf.nn.conv2d(x, w, 1, "SAME", dilations=2), "dilated"),
        (lambda x, w: tf.nn.conv2d(tf.concat([x, x], -1), w, 1, "SAME"), "groups"),
        (lambda x, w: tf.nn.depthwise_conv2d(x, w, [1, 1, 1, 1], "SAME"), "depth_multiplier"),
    ],
)
def test_what_has_no_gradient_is_refused(function, reason):
    with pytest.raises(Untrainable, match=reason):
        both(function, (1, 6, 6, 2), (3, 3, 2, 2))
