"""Ways to train the head of a transfer model; each returns what gives the logits of inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import keras_lp as lp
from keras_lp.backbones.features import feature_model
from lib.networks import Setting
from lib.problems import Arrays

EPOCHS = 10
RATES = (1e-4, 1e-3, 3e-3, 1e-2, 1e-1)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of scikit-learn
LONGEST = 30  # epochs of a run of the sweep

Predict = Callable[[np.ndarray], np.ndarray]  # inputs to logits
Approach = Callable[[Setting, Arrays, Arrays], Predict]  # with training and validation examples


def features(model: keras.Model, x: np.ndarray) -> np.ndarray:
    return feature_model(model).predict(x, batch_size=64, verbose=0)


def logits_of(model: keras.Model) -> Predict:
    return lambda x: model.predict(x, batch_size=256, verbose=0)


def before(setting: Setting, data: Arrays, val: Arrays) -> Predict:
    model = setting.build(pooling="avg")
    head = dense(len(setting.problem.labels), 1e-3)
    head.fit(features(model, data[0]), data[1], epochs=EPOCHS, verbose=0)
    return lambda x: head.predict(features(model, x), verbose=0)


def fit(setting: Setting, data: Arrays, val: Arrays, balanced: bool = False) -> Predict:
    model, y = setting.build(), data[1]
    weights = dict(enumerate(len(y) / (2 * np.bincount(y, minlength=2)))) if balanced else None
    model.fit(*data, epochs=EPOCHS, class_weight=weights, verbose=0)
    return logits_of(model)


def fit_head(setting: Setting, data: Arrays, val: Arrays, **options: Any) -> Predict:
    model = setting.build()
    lp.fit_head(model, data, verbose=0, **options)
    return logits_of(model)


def scikit_learn(setting: Setting, data: Arrays, val: Arrays) -> Predict:
    model, (x, y) = setting.build(), data
    classes = len(setting.problem.labels)
    z = features(model, x).astype("float64")

    def solve(strength: float, rows: np.ndarray) -> Predict:
        solver = LogisticRegression(C=strength, max_iter=200)
        pipeline = make_pipeline(StandardScaler(), solver).fit(z[rows], y[rows])

        def predict(z: np.ndarray) -> np.ndarray:
            found = np.full((len(z), classes), -30.0)  # of classes without an example
            found[:, solver.classes_] = np.log(np.maximum(pipeline.predict_proba(z), 1e-13))
            return found

        return predict

    def loss(strength: float) -> float:
        folds = KFold(3, shuffle=True, random_state=0).split(z)
        return sum(
            -solve(strength, train)(z[test])[np.arange(len(test)), y[test]].sum()
            for train, test in folds
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        best = solve(min(STRENGTHS, key=loss), np.arange(len(y)))
    return lambda x: best(features(model, x))


def sweep(setting: Setting, data: Arrays, val: Arrays) -> Predict:
    model = setting.build()
    z, held_out = features(model, data[0]), features(model, val[0])
    scaler = StandardScaler().fit(z)
    z, held_out = scaler.transform(z), scaler.transform(held_out)
    best: tuple[float, list[np.ndarray]] = (-1.0, [])
    for rate in RATES:
        head = dense(len(setting.problem.labels), rate, "zeros")
        for _ in range(LONGEST):
            head.fit(z, data[1], verbose=0)
            found = score(setting, val[1], head.predict_on_batch(held_out))
            if found > best[0]:
                best = found, head.get_weights()
    head.set_weights(best[1])
    return lambda x: head.predict(scaler.transform(features(model, x)), verbose=0)


def two_phase(setting: Setting, data: Arrays, val: Arrays) -> Predict:
    model = setting.build()
    lp.fit_two_phase(model, data, epochs=5, verbose=0)
    return logits_of(model)


def keras_guide(setting: Setting, data: Arrays, val: Arrays) -> Predict:
    model = setting.build(pooling="avg", learning_rate=1e-3)
    model.fit(*data, epochs=EPOCHS, verbose=0)
    model = lp.finetune_model(
        model, learning_rate=1e-5, layer_decay=1.0, optimizer="adam", weight_decay=None
    )
    model.fit(*data, epochs=EPOCHS, verbose=0)
    return logits_of(model)


def dense(classes: int, rate: float, start: str = "glorot_uniform") -> keras.Model:
    model = keras.Sequential([keras.layers.Dense(classes, kernel_initializer=start)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    return model


def score(setting: Setting, y: np.ndarray, logits: np.ndarray) -> float:
    """Returns balanced accuracy where the classes are uneven, else accuracy."""
    found = logits.argmax(-1)
    return float(balanced_accuracy_score(y, found) if setting.uneven else np.mean(y == found))
