"""Gradients in builtin operations of LiteRT.

The TensorFlow gradients of convolutions, pooling, activations and lookups use operations that
LiteRT does not have (`ReluGrad`, `Conv2DBackpropFilter`, ...). This module implements them with
builtin operations. For windows of k * k positions that move by a stride, two functions do the
work: `_Window.values` gathers the values at each position of the window, and `_Window.spread`, its
transpose, adds them back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_OVERRIDES: dict[str, str] = {}  # type of operation -> name of its gradient in this module

# The TensorFlow gradients of these operations use builtin operations only.
# fmt: off
_PLAIN = frozenset([
    "Abs", "AddN", "AddV2", "BatchMatMulV2", "BiasAdd", "BroadcastTo", "Cast", "ConcatV2",
    "DivNoNan", "Exp", "ExpandDims", "Identity", "IdentityN", "Log", "Log1p", "LogSoftmax",
    "MatMul", "Max", "Maximum", "Mean", "Minimum", "Mul", "Neg", "Pack", "Pad", "RealDiv",
    "Reshape", "Select", "SelectV2", "Softmax", "SoftmaxCrossEntropyWithLogits",
    "SparseSoftmaxCrossEntropyWithLogits", "Square", "SquaredDifference", "Squeeze", "Sub", "Sum",
    "Transpose",
])
# No gradient flows through these operations.
_ENDS = frozenset([
    "ArgMax", "Equal", "Fill", "Greater", "GreaterEqual", "IsNan", "Less", "LessEqual",
    "LogicalAnd", "LogicalNot", "NotEqual", "OnesLike", "Shape", "Sign", "StopGradient",
    "ZerosLike",
])
# fmt: on

Size = tuple[int, int]


class Untrainable(Exception):  # noqa: N818
    """Raised for an operation on the gradient path that has no gradient in builtin operations.

    Args:
        operation: the operation of the graph.
        reason: a short description of the operation.
    """

    def __init__(self, operation: tf.Operation, reason: str) -> None:
        super().__init__(reason)
        self.operation = operation


def builtin_gradients() -> contextlib.AbstractContextManager[None]:
    """Context manager in which new operations of the current graph get these gradients."""
    return tf.compat.v1.get_default_graph().gradient_override_map(_OVERRIDES)


def gradients(loss: tf.Tensor, weights: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns the gradients of a loss that was computed in `builtin_gradients`.

    The gradient of a weight that does not affect the loss is 0.

    Raises:
        Untrainable: an operation between the weights and the loss has no gradient in builtin
            operations.
    """
    for operation in _between(loss, weights):
        if operation.type not in _PLAIN and operation.type not in _OVERRIDES:
            raise Untrainable(operation, operation.type)
    found = tf.gradients(loss, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [tf.convert_to_tensor(gradient) for gradient in found]


def _between(loss: tf.Tensor, weights: Sequence[tf.Tensor]) -> list[tf.Operation]:
    """Returns the operations on any path from the weights to the loss."""
    above = _reached(
        [operation for weight in weights for operation in weight.consumers()],
        lambda op: (user for output in op.outputs for user in output.consumers()),
    )
    below = _reached([loss.op], lambda op: (value.op for value in op.inputs))
    return [operation for key, operation in above.items() if key in below]


def _reached(
    start: Iterable[tf.Operation], neighbours: Callable[[tf.Operation], Iterable[tf.Operation]]
) -> dict[str, tf.Operation]:
    found: dict[str, tf.Operation] = {}
    pending = list(start)
    while pending:
        operation = pending.pop()
        if operation.name not in found and operation.type not in _ENDS:
            found[operation.name] = operation
            pending += neighbours(operation)
    return found


def _gradient_of(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a gradient: `(operation, gradient of its output) -> gradients of its inputs`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _OVERRIDES[kind] = f"KerasLp{kind}"
        return tf.RegisterGradient(_OVERRIDES[kind])(function)

    return register


@_gradient_of("Relu")
def _relu(op: tf.Operation, dy: tf.Tensor) -> tf.Tensor:
    return dy * tf.sign(op.outputs[0])  # the output is >= 0; faster than a comparison


@_gradient_of("Relu6")
def _relu6(op: tf.Operation, dy: tf.Tensor) -> tf.Tensor:
    y = op.outputs[0]
    return dy * tf.sign(tf.minimum(y, 6 - y))


@_gradient_of("LeakyRelu")
def _leaky_relu(op: tf.Operation, dy: tf.Tensor) -> tf.Tensor:
    return dy * tf.where(op.inputs[0] > 0, 1.0, op.get_attr("alpha"))


@_gradient_of("Tanh")
def _tanh(op: tf.Operation, dy: tf.Tensor) -> tf.Tensor:
    return dy * (1 - op.outputs[0] ** 2)


@_gradient_of("Sigmoid")
def _sigmoid(op: tf.Operation, dy: tf.Tensor) -> tf.Tensor:
    y = op.outputs[0]
    return dy * y * (1 - y)


@_gradient_of("Softplus")
def _softplus(op: tf.Operation, dy: tf.Tensor) -> tf.Tensor:
    return dy * tf.sigmoid(op.inputs[0])


@_gradient_of("Rsqrt")
def _rsqrt(op: tf.Operation, dy: tf.Tensor) -> tf.Tensor:
    y = op.outputs[0]
    return -0.5 * dy * y * y * y


@_gradient_of("Sqrt")
def _sqrt(op: tf.Operation, dy: tf.Tensor) -> tf.Tensor:
    return 0.5 * dy / op.outputs[0]


@_gradient_of("StridedSlice")
def _new_axis(op: tf.Operation, dy: tf.Tensor) -> tuple[tf.Tensor, None, None, None]:
    x, _, _, strides = op.inputs
    whole = x.shape.num_elements() == dy.shape.num_elements()
    if not whole or np.any(tf.get_static_value(strides) != 1):
        raise Untrainable(op, "a slice of a tensor")
    return tf.reshape(dy, x.shape), None, None, None


@_gradient_of("GatherV2")
def _gather(op: tf.Operation, dy: tf.Tensor) -> tuple[tf.Tensor, None, None]:
    """Returns the gradient of the lookup table; rows that were not looked up have gradient 0."""
    table, indices, axis = op.inputs
    if tf.get_static_value(axis) != 0 or op.get_attr("batch_dims"):
        raise Untrainable(op, "a lookup along an axis other than the first")
    rows = tf.one_hot(tf.reshape(indices, [-1]), table.shape[0])
    flat = tf.matmul(rows, tf.reshape(dy, [rows.shape[0], -1]), transpose_a=True)
    return tf.reshape(flat, table.shape), None, None


@_gradient_of("Conv2D")
def _conv2d(op: tf.Operation, dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    x, kernel = op.inputs
    *size, channels, filters = kernel.shape
    if channels != x.shape[-1]:
        raise Untrainable(op, "a convolution with groups")
    window = _Window(op, size, x.shape)
    dx = tf.nn.conv2d_transpose(dy, kernel, x.shape, window.stride, window.padding)
    flat = tf.reshape(dy, [-1, filters])
    dkernel = [
        tf.matmul(tf.reshape(values, [-1, channels]), flat, transpose_a=True)
        for values in window.values(x)
    ]
    return dx, tf.reshape(tf.stack(dkernel), kernel.shape)


@_gradient_of("DepthwiseConv2dNative")
def _depthwise(op: tf.Operation, dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    x, kernel = op.inputs
    *size, channels, multiplier = kernel.shape
    if multiplier != 1:
        raise Untrainable(op, f"a depthwise convolution with depth_multiplier {multiplier}")
    window = _Window(op, size, x.shape)
    dkernel = [
        tf.reduce_sum(tf.reshape(values * dy, [-1, channels]), axis=0)  # faster than three axes
        for values in window.values(x)
    ]
    return window.spread_weighted(dy, kernel), tf.reshape(tf.stack(dkernel), kernel.shape)


@_gradient_of("MaxPool")
def _max_pool(op: tf.Operation, dy: tf.Tensor) -> tf.Tensor:
    """Ties, as in blank areas, give the gradient to the first maximum, as in TensorFlow."""
    x, y = op.inputs[0], op.outputs[0]
    window = _Window(op, op.get_attr("ksize")[1:3], x.shape)
    free, shares = dy, []
    for values in window.values(x, outside=x.dtype.min):
        here = tf.cast(tf.equal(values, y), tf.float32)
        shares.append(free * here)
        free = free * (1 - here)
    return window.spread(shares)


@_gradient_of("AvgPool")
def _avg_pool(op: tf.Operation, dy: tf.Tensor) -> tf.Tensor:
    """The mean is over the values inside the image."""
    shape = op.inputs[0].shape
    window = _Window(op, op.get_attr("ksize")[1:3], shape)
    inside = window.values(tf.ones([1, *shape[1:3], 1]))
    share = dy / tf.add_n(inside)
    return window.spread([share] * len(inside))


class _Window:
    """A window that moves over images `(batch, height, width, channels)`.

    Args:
        op: the operation that moves the window.
        size: height and width of the window.
        shape: shape of the images.
    """

    def __init__(self, op: tf.Operation, size: Sequence[int], shape: tf.TensorShape) -> None:
        self.stride = tuple(op.get_attr("strides")[1:3])
        self.padding = op.get_attr("padding").decode()
        if op.get_attr("data_format") != b"NHWC" or self.padding not in ("SAME", "VALID"):
            raise Untrainable(op, f"{op.type} with a padding or data_format that is not supported")
        if "Conv" in op.type and any(rate != 1 for rate in op.get_attr("dilations")):
            raise Untrainable(op, "a dilated convolution")
        self._size = tuple(size)
        self._given = tuple(shape[1:3])
        self._moves = tuple(op.outputs[0].shape[1:3])
        # Extent that all windows cover, from the first to the last row or column.
        self._reach = tuple(
            (moves - 1) * stride + size
            for moves, stride, size in zip(self._moves, self.stride, self._size, strict=True)
        )
        before = (
            max(reach - given, 0) // 2 if self.padding == "SAME" else 0
            for reach, given in zip(self._reach, self._given, strict=True)
        )
        self._before = tuple(before)

    def values(self, x: tf.Tensor, outside: float = 0.0) -> list[tf.Tensor]:
        """Returns the values at each position of the window, each of the shape of the output.

        Args:
            x: images.
            outside: the value outside the images.
        """
        edges = [(0, 0), *zip(self._before, self._after(), strict=True), (0, 0)]
        x = tf.pad(x, np.maximum(edges, 0), constant_values=outside)
        (rows, columns), (down, right) = self._moves, self.stride
        return [
            x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
            for i, j in np.ndindex(self._size)
        ]

    def spread(self, values: Sequence[tf.Tensor]) -> tf.Tensor:
        """Returns images: the sum of the values, each moved back to its position."""
        places = []
        for (i, j), value in zip(np.ndindex(self._size), values, strict=True):
            rows, columns = (size - 1 - at for size, at in zip(self._size, (i, j), strict=True))
            places.append(tf.pad(self._apart(value), [(0, 0), (i, rows), (j, columns), (0, 0)]))
        return self._inside(tf.add_n(places))

    def spread_weighted(self, value: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Returns `spread` of `value` times the weight of each position, as one convolution.

        Args:
            value: a tensor of the shape of the output.
            kernel: `(height, width, channels, 1)`.
        """
        around = [(size - 1, size - 1) for size in self._size]
        value = tf.pad(self._apart(value), [(0, 0), *around, (0, 0)])
        turned = tf.reverse(kernel, [0, 1])
        return self._inside(tf.nn.depthwise_conv2d(value, turned, [1, 1, 1, 1], "VALID"))

    def _inside(self, reached: tf.Tensor) -> tf.Tensor:
        """Crops or pads to the images; with VALID padding the windows may end before the edge."""
        after = np.array(self._after())
        whole = tf.pad(reached, [(0, 0), *((0, n) for n in np.maximum(-after, 0)), (0, 0)])
        (top, left), (height, width) = self._before, self._given
        return whole[:, top : top + height, left : left + width]

    def _after(self) -> Size:
        """How far the windows extend beyond the bottom and right edges; negative if they do not."""
        return tuple(
            reach - given - before
            for reach, given, before in zip(self._reach, self._given, self._before, strict=True)
        )

    def _apart(self, value: tf.Tensor) -> tf.Tensor:
        """Inserts `stride - 1` zeros between neighbors."""
        batch, rows, columns, channels = value.shape
        down, right = self.stride
        if down > 1:
            value = tf.reshape(value, [batch * rows, 1, columns * channels])
            value = tf.reshape(
                tf.pad(value, [(0, 0), (0, down - 1), (0, 0)]),
                [batch, rows * down, columns, channels],
            )[:, : (rows - 1) * down + 1]
        if right > 1:
            rows = value.shape[1]
            value = tf.reshape(value, [batch * rows * columns, 1, channels])
            value = tf.reshape(
                tf.pad(value, [(0, 0), (0, right - 1), (0, 0)]),
                [batch, rows, columns * right, channels],
            )[:, :, : (columns - 1) * right + 1]
        return value
