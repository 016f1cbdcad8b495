"""Ways to train a head on a frozen network; each returns what is timed and what gives logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_lp as lp
from lib.networks import SIZE
from lib.timing import seconds

BATCH, EPOCHS = 32, 10
ALPHAS = {"MobileNet": 0.25, "MobileNetV2": 1.0}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

Way = tuple[Callable[[], Any], Callable[[np.ndarray], np.ndarray]]


def network(name: str, weights: Path) -> keras.Model:
    """Returns the frozen network of the other ways."""
    base = getattr(keras.applications, name)(
        input_shape=(SIZE, SIZE, 3), include_top=False, weights=str(weights), alpha=ALPHAS[name]
    )
    base.trainable = False
    return base


def features_of(base: keras.Model) -> keras.Model:
    """Returns the network from raw pictures to pooled features."""
    inputs = keras.Input((SIZE, SIZE, 3))
    scaled = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    features = keras.layers.GlobalAveragePooling2D()(base(scaled, training=False))
    return keras.Model(inputs, features)


def fitting(model: keras.Model, x: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    return partial(model.fit, x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0)


def compiled(model: keras.Model) -> keras.Model:
    model.compile("adam", LOSS, metrics=["accuracy"])
    return model


def recipe(name: str, weights: Path, x: np.ndarray, y: np.ndarray) -> Way:
    """The recipe of Keras's guide to transfer learning."""
    below = features_of(network(name, weights))
    model = compiled(keras.Model(below.input, keras.layers.Dense(10)(below.output)))
    return fitting(model, x, y), lambda z: model.predict(z, verbose=0)


def kerashub(name: str, weights: Path, x: np.ndarray, y: np.ndarray) -> Way:
    """KerasHub's classifier, on pictures that were rescaled beforehand."""
    import keras_hub

    def scaled(z: np.ndarray) -> np.ndarray:
        return z.astype("float32") / 127.5 - 1

    options = {"num_classes": 10, "preprocessor": None, "pooling": "avg"}
    model = keras_hub.models.ImageClassifier(backbone=network(name, weights), **options)
    return fitting(compiled(model), scaled(x), y), lambda z: model.predict(scaled(z), verbose=0)


def by_hand(name: str, weights: Path, x: np.ndarray, y: np.ndarray) -> Way:
    """Features by `predict`, then `fit` of a Dense layer on them."""
    below = features_of(network(name, weights))
    layers = [keras.Input(below.output_shape[1:]), keras.layers.Dense(10)]
    head = compiled(keras.Sequential(layers))

    def fit() -> None:
        fitting(head, below.predict(x, verbose=0), y)()

    return fit, lambda z: head.predict(below.predict(z, verbose=0), verbose=0)


def ours(name: str, weights: Path, x: np.ndarray, y: np.ndarray) -> Way:
    """`lp.transfer_model`."""
    options = {"weights": weights, "backbone_kwargs": {"alpha": ALPHAS[name]}}
    model = lp.transfer_model(name, 10, input_shape=(SIZE, SIZE, 3), **options)
    return fitting(model, x, y), lambda z: model.predict(z, verbose=0)


def limit(name: str, weights: Path, x: np.ndarray, y: np.ndarray) -> Way:
    """One pass of the network at the best batch size, then the head in a bare loop."""
    build = partial(network, name, weights)
    sizes = (32, 64, 128, 256)
    passes = {n: partial(features_of(build()).predict, x, batch_size=n, verbose=0) for n in sizes}
    best = min(passes, key=lambda size: seconds(passes[size]).clock)
    below, head = features_of(build()), keras.layers.Dense(10)
    head.build(below.output_shape)
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(head.trainable_variables)
    width, labels = below.output_shape[1], y.astype("int64")
    signature = (tf.TensorSpec((None, width)), tf.TensorSpec((None,), tf.int64))

    @tf.function(input_signature=signature)
    def step(batch: tf.Tensor, labels: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = LOSS(labels, head(batch))
        gradients = tape.gradient(loss, head.trainable_variables)
        optimizer.apply_gradients(zip(gradients, head.trainable_variables, strict=True))

    def fit() -> None:
        features = below.predict(x, batch_size=best, verbose=0)
        rng = np.random.default_rng(0)
        for _ in range(EPOCHS):
            order = rng.permutation(len(features))
            for i in range(0, len(features), BATCH):
                rows = order[i : i + BATCH]
                step(tf.constant(features[rows]), tf.constant(labels[rows]))

    return fit, lambda z: np.asarray(head(below.predict(z, verbose=0)))
