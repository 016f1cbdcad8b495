"""Shared data and small models."""

import os
import shutil

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_lp as lp
from keras_lp.tasks.heads import heads

Arrays = tuple[np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def digits() -> Arrays:
    """200 real handwritten digits, flat and from 0 to 1."""
    x, y = lp.load_dataset("digits", split="train", batch_size=-1)
    return x[:200].reshape(200, 64).astype("float32") / 255, y[:200].astype("int32")


@pytest.fixture(scope="session")
def tfds_dir() -> Path:
    path = os.environ.get("TFDS_DATA_DIR")
    if not path:
        pytest.skip("TFDS_DATA_DIR is not set: no prepared TFDS data sets here")
    return Path(path)


@pytest.fixture(scope="session")
def litert():
    """Skips where LiteRT.js is neither in the cache nor available from npm."""
    from keras_lp.web.litert_js import litert_js

    try:
        return litert_js()
    except (ImportError, ConnectionError) as error:
        pytest.skip(f"needs LiteRT.js: {error}")


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; one per process, as Playwright allows."""
    sync_api = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def mlp() -> Callable[..., keras.Model]:
    """Makes headless networks: 64 inputs, one dense block a size."""

    def make(sizes: tuple[int, ...] = (16,), inputs: int = 64) -> keras.Model:
        layers = [keras.layers.Dense(n, "relu", name=f"block{i}") for i, n in enumerate(sizes)]
        return keras.Sequential([keras.Input((inputs,)), *layers], name="mlp")

    return make


@pytest.fixture
def convnet() -> Callable[[], keras.Model]:
    """Makes headless networks with BatchNormalization and Dropout, 8x8 pictures in."""

    def make() -> keras.Model:
        inputs = x = keras.Input((8, 8, 1))
        for i in (1, 2):
            x = keras.layers.Conv2D(8, 3, name=f"block{i}_conv")(x)
            x = keras.layers.BatchNormalization(name=f"block{i}_bn")(x)
            x = keras.layers.ReLU(name=f"block{i}_relu")(x)
            x = keras.layers.Dropout(0.2, name=f"block{i}_drop")(x)
        return keras.Model(inputs, x, name="convnet")

    return make


def with_random_heads(model: keras.Model) -> keras.Model:
    """Gives the heads of a frozen backbone, which start at 0, outputs that differ."""
    rng = np.random.default_rng(0)
    for head in heads(model).values():
        head.kernel.assign(rng.normal(0, 0.3, head.kernel.shape))
    return model


class Batches(keras.utils.PyDataset):
    """Batches of some arrays."""

    def __init__(self, *arrays: np.ndarray, size: int = 50) -> None:
        super().__init__()
        self._arrays = arrays
        self._size = size

    def __len__(self) -> int:
        return len(self._arrays[0]) // self._size

    def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
        rows = slice(self._size * i, self._size * (i + 1))
        return tuple(array[rows] for array in self._arrays)


def snapshot(model: keras.Model) -> list[np.ndarray]:
    """Copies of all weights, statistics too."""
    return [weight.numpy().copy() for weight in model.weights]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    """Bit for bit."""
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)
