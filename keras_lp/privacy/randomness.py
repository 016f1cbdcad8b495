"""Random numbers that nobody can predict, for noise and sampling."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

_BITS = 53  # of a float64 below 1


class Randomness(Protocol):
    """What is used of `numpy.random.Generator`."""

    def random(self, size: int, /) -> np.ndarray:
        """Returns numbers from 0 to below 1."""

    def standard_normal(self, size: Sequence[int], /) -> np.ndarray:
        """Returns normal numbers."""


class SecureRandomness:
    """Random numbers of the operating system's cryptographic generator."""

    def random(self, size: int, /) -> np.ndarray:
        """Returns float64 numbers from 0 to below 1."""
        whole = np.frombuffer(os.urandom(8 * size), "uint64")
        return (whole >> np.uint64(64 - _BITS)) * 2.0**-_BITS

    def standard_normal(self, size: Sequence[int], /) -> np.ndarray:
        """Returns float64 normal numbers, by the method of Box and Muller."""
        count = math.prod(size)
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log1p(-self.random(half)))
        angle = 2 * np.pi * self.random(half)
        pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return pairs[:count].reshape(size)


def randomness(seed: Sequence[int] | None) -> Randomness:
    """Returns secure random numbers, or for a seed those of NumPy."""
    return SecureRandomness() if seed is None else np.random.default_rng(seed)
