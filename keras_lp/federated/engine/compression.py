"""Smaller updates: what clients send is rounded, or only the largest entries are sent."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_lp.utils.arguments import check_choice


class Compression(abc.ABC):
    """A way to send the update of a client in fewer bytes.

    `restored` is the update as the server reads it, in the graph of the clients; `pack` and
    `unpack` do the same with bytes, as a fleet would.

    Attributes:
        error_feedback: whether a client adds to an update what its last one lost.
    """

    error_feedback: bool

    @abc.abstractmethod
    def restored(self, update: Sequence[tf.Tensor], seed: tf.Tensor) -> list[tf.Tensor]:
        """Returns what the server reads of an update.

        Args:
            update: the arrays of the update.
            seed: two integers, for random rounding.
        """

    @abc.abstractmethod
    def pack(self, update: Sequence[np.ndarray], seed: int = 0) -> bytes:
        """Returns the bytes that a client sends."""

    @abc.abstractmethod
    def unpack(self, content: bytes, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Returns the update that the server reads, float32 arrays of these shapes."""

    @abc.abstractmethod
    def size(self, shapes: Sequence[Sequence[int]]) -> int:
        """Returns the number of bytes of a packed update with arrays of these shapes."""


@dataclasses.dataclass(frozen=True)
class TopK(Compression):
    """Sends only the entries of an update with the largest absolute values, and their places.

    Args:
        fraction: share of the entries, above 0 and up to 1, of all arrays together; at least one
            entry is sent.
        error_feedback: whether each client keeps the other entries, in a file between rounds as
            personal layers are, and adds them to its next update. All those of a round are in
            memory. Defaults to False: they are lost.

    Raises:
        ValueError: if `fraction` is out of range.

    Example:

    >>> import numpy as np, keras_lp as lp
    >>> top = lp.TopK(0.25)
    >>> update = [np.array([0.1, -3.0, 0.2, 0.5], "float32")]
    >>> top.unpack(top.pack(update), [(4,)])[0].tolist()
    [0.0, -3.0, 0.0, 0.0]

    References: Aji and Heafield, 2017, Sparse Communication for Distributed Gradient Descent
    (arXiv:1704.05021); Stich et al., 2018, Sparsified SGD with Memory (arXiv:1809.07599), error
    feedback.
    """

    fraction: float
    error_feedback: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.fraction, (int, float)) or not 0 < self.fraction <= 1:
            raise ValueError(
                f"`fraction` must be above 0 and at most 1. Received: fraction={self.fraction!r}."
            )

    def __repr__(self) -> str:
        feedback = ", error_feedback=True" if self.error_feedback else ""
        return f"TopK(fraction={self.fraction!r}{feedback})"

    def restored(self, update: Sequence[tf.Tensor], seed: tf.Tensor) -> list[tf.Tensor]:
        """See `Compression`."""
        flat = tf.concat([tf.reshape(tf.cast(one, tf.float32), [-1]) for one in update], 0)
        _, places = tf.math.top_k(tf.abs(flat), self._kept(flat.shape[0]), sorted=False)
        kept = tf.scatter_nd(places[:, None], tf.gather(flat, places), [flat.shape[0]])
        return unflatten(kept, update)

    def pack(self, update: Sequence[np.ndarray], seed: int = 0) -> bytes:
        """See `Compression`."""
        flat = np.concatenate([np.ravel(one) for one in update]).astype("float32")
        places = np.sort(np.argsort(-np.abs(flat), kind="stable")[: self._kept(len(flat))])
        return flat[places].tobytes() + _to_bits(places, _bits(len(flat)))

    def unpack(self, content: bytes, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """See `Compression`."""
        total = sum(math.prod(shape) for shape in shapes)
        kept = self._kept(total)
        flat = np.zeros(total, "float32")
        places = _from_bits(content[4 * kept :], _bits(total), kept)
        flat[places] = np.frombuffer(content[: 4 * kept], "float32")
        return _split(flat, shapes)

    def size(self, shapes: Sequence[Sequence[int]]) -> int:
        """See `Compression`."""
        total = sum(math.prod(shape) for shape in shapes)
        kept = self._kept(total)
        return 4 * kept + -(-kept * _bits(total) // 8)

    def _kept(self, total: int) -> int:
        return max(1, round(self.fraction * total))


@dataclasses.dataclass(frozen=True)
class Quantize(Compression):
    """Rounds the entries of each array at random to equally spaced numbers.

    The lowest and the highest of these numbers are the smallest and the largest entry. An entry
    between two of them is rounded up with the probability that keeps its expectation.

    Args:
        bits: bits per entry, 8, 4 or 1. Defaults to 8.

    Raises:
        ValueError: if `bits` is another number.

    Example:

    >>> import numpy as np, keras_lp as lp
    >>> quantize = lp.Quantize(bits=1)
    >>> update = [np.array([[-1.0, 0.0], [0.5, 1.0]], "float32")]
    >>> len(quantize.pack(update)), quantize.size([(2, 2)])
    (9, 9)

    Reference: Suresh et al., 2017, Distributed Mean Estimation with Limited Communication
    (arXiv:1611.00429), stochastic k-level quantization.
    """

    bits: Literal[8, 4, 1] = 8
    # The rounding has no bias.
    error_feedback: bool = dataclasses.field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, [8, 4, 1])

    def restored(self, update: Sequence[tf.Tensor], seed: tf.Tensor) -> list[tf.Tensor]:
        """See `Compression`."""
        found = []
        for i, one in enumerate(update):
            values = tf.cast(one, tf.float32)
            low = tf.reduce_min(values)
            step = (tf.reduce_max(values) - low) / self._steps
            chance = tf.random.stateless_uniform(values.shape, tf.add(seed, [0, 1 + i]))
            numbers = tf.floor(tf.math.divide_no_nan(values - low, step) + chance)
            numbers = tf.minimum(numbers, self._steps)
            found.append(tf.cast(low + numbers * step, one.dtype))
        return found

    def pack(self, update: Sequence[np.ndarray], seed: int = 0) -> bytes:
        """See `Compression`."""
        rng, parts = np.random.default_rng(seed), []
        for one in update:
            values = np.ravel(one).astype("float32")
            low = values.min()
            step = (values.max() - low) / np.float32(self._steps)
            scaled = (values - low) / step if step > 0 else np.zeros_like(values)
            numbers = np.floor(scaled + rng.random(len(values), "float32"))
            numbers = np.minimum(numbers, self._steps).astype("int64")
            parts += [np.array([low, step], "float32").tobytes(), _to_bits(numbers, self.bits)]
        return b"".join(parts)

    def unpack(self, content: bytes, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """See `Compression`."""
        found, start = [], 0
        for shape in shapes:
            count = math.prod(shape)
            low, step = np.frombuffer(content[start : start + 8], "float32")
            end = start + 8 + -(-count * self.bits // 8)
            numbers = _from_bits(content[start + 8 : end], self.bits, count)
            found.append((low + numbers.astype("float32") * step).reshape(shape))
            start = end
        return found

    def size(self, shapes: Sequence[Sequence[int]]) -> int:
        """See `Compression`."""
        return sum(8 + -(-math.prod(shape) * self.bits // 8) for shape in shapes)

    @property
    def _steps(self) -> int:
        return 2**self.bits - 1


def unflatten(flat: tf.Tensor, like: Sequence[Any]) -> list[tf.Tensor]:
    """Returns the parts of a flat tensor in the shapes and dtypes of tensors or specs."""
    sizes = [math.prod(one.shape) for one in like]
    parts = tf.split(flat, sizes) if sizes else []
    pairs = zip(parts, like, strict=True)
    return [tf.cast(tf.reshape(part, one.shape), one.dtype) for part, one in pairs]


def _bits(count: int) -> int:
    """Returns the bits of a place among `count`."""
    return max(1, (count - 1).bit_length())


def _to_bits(numbers: np.ndarray, bits: int) -> bytes:
    columns = (numbers[:, None] >> np.arange(bits)) & 1
    return np.packbits(columns.astype(bool)).tobytes()


def _from_bits(content: bytes, bits: int, count: int) -> np.ndarray:
    flat = np.unpackbits(np.frombuffer(content, "uint8"), count=count * bits)
    return flat.reshape(count, bits).astype("int64") @ (1 << np.arange(bits))


def _split(flat: np.ndarray, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]
