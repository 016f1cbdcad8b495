"""What other packages do on the cases of the comparison, in turn with the way that is alike.

All but AutoKeras train from the same network; all on the same examples, in as many steps.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib import ways as w
from lib.cases import Case
from lib.cost import processor_seconds
from lib.flower import flower_rounds
from lib.journal import Run
from lib.measures import logits_of
from lib.recipes import (
    RATE,
    Logits,
    compiled,
    fastai,
    frozen,
    keras_guide,
    logits,
    multi_optimizer,
    network,
    two_outputs,
)
from lib.rounds import tutorial

TEXTS = ("trec", "clinc_oos")
TFF_RATE = 0.02  # that of TFF's tutorial on image classification


class Peer(NamedTuple):
    """What a package does.

    Attributes:
        of: the way that is alike.
        learn: builds and trains, and returns what gives logits.
        package: the package that it needs, besides those of the benchmarks.
        images: whether it is for images only.
        second: whether it needs labels of a second task.
        counted: whether its processor time can be counted.
    """

    of: str
    learn: Callable[[Case], Logits]
    package: str | None = None
    images: bool = False
    second: bool = False
    counted: bool = True


def kerashub(case: Case) -> Logits:
    """KerasHub's classifier. It averages feature maps: here of one pixel, so of all features."""
    import keras_hub

    below = network(case)
    one_pixel = keras.layers.Reshape((1, 1, below.output_shape[-1]))(below.output)
    base = keras.Model(below.input, one_pixel)
    base.trainable = False
    options = {"num_classes": len(case.names), "preprocessor": None, "pooling": "avg"}
    model = keras_hub.models.ImageClassifier(backbone=base, **options)
    return logits(w.train(compiled(model, keras.optimizers.Adam(RATE)), case))


def scikit_learn(case: Case) -> Logits:
    """Logistic regression on standardized features, `C=1`."""
    below, (x, y) = network(case), case.train
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(below.predict(x, batch_size=256, verbose=0), y)
    known = probe.classes_

    def predict(x: np.ndarray) -> np.ndarray:
        found = np.full((len(x), len(case.names)), -np.inf)
        chances = probe.predict_log_proba(below.predict(x, batch_size=256, verbose=0))
        found[:, known] = chances
        return found

    return predict


def tff(case: Case) -> Logits:
    """`build_weighted_fed_avg` on the whole model, as in TFF's tutorial."""
    clients = w.clients_of(case)
    model = frozen(case)
    process, _ = tutorial(model, clients, w.LOCAL_BATCH, TFF_RATE)
    data = [
        tf.data.Dataset.from_tensor_slices(part).shuffle(len(part[1])).batch(w.LOCAL_BATCH)
        for part in clients.values()
    ]
    state = process.initialize()
    for _ in range(w.rounds_of(clients, case)):
        state = process.next(state, data).state
    weights = process.get_model_weights(state).trainable
    for variable, value in zip(model.trainable_variables, weights, strict=True):
        variable.assign(value)
    return logits(model)


def flower(case: Case) -> Logits:
    """Flower's simulation, Keras's `fit` on each client."""
    clients = w.clients_of(case)

    def make() -> keras.Model:
        return compiled(frozen(case), keras.optimizers.SGD(TFF_RATE))

    parts = list(clients.values())
    found = flower_rounds(parts, None, make, w.LOCAL_BATCH)(w.rounds_of(clients, case) - 1)
    model = make()
    model.set_weights(found.weights)
    return logits(model)


def autokeras(case: Case) -> Logits:
    """AutoKeras's classifier with one trial, validated on a fifth; a network of its own."""
    import autokeras

    x, y = case.train
    held = len(y) // 5
    own = w.repeated((x[held:], y[held:]))
    with tempfile.TemporaryDirectory() as folder:
        model = autokeras.ImageClassifier(max_trials=1, directory=folder, seed=case.seed)
        epochs = max(1, round(case.seen / len(own[1])))
        validation = x[:held], y[:held]
        model.fit(*own, batch_size=w.BATCH, epochs=epochs, validation_data=validation, verbose=0)
        chosen = model.export_model()
    return lambda x: np.log(chosen.predict(x.astype("float32"), verbose=0) + 1e-12)


PEERS: dict[str, Peer] = {
    "Keras guide's recipe": Peer(w.TRANSFER, keras_guide),
    "KerasHub ImageClassifier": Peer(w.TRANSFER, kerashub, "keras_hub", images=True),
    "scikit-learn LogisticRegression": Peer(w.HEAD, scikit_learn),
    "Keras MultiOptimizer": Peer(w.DECAY, multi_optimizer),
    "recipe of fastai in Keras": Peer(w.DECAY, fastai),
    "two outputs in plain Keras": Peer(w.MULTITASK, two_outputs, second=True),
    "TFF as in its tutorial": Peer(w.EQUAL, tff),
    "Flower simulation": Peer(w.EQUAL, flower, "flwr", counted=False),
    "AutoKeras with one trial": Peer(w.SCRATCH, autokeras, "autokeras", images=True),
}


def measure(name: str, case: Case) -> Run:
    """Trains the peer and the way that is alike, in an order that the seed decides.

    The result tells if the package of a peer is not installed, or does not work.
    """
    peer = PEERS[name]
    if peer.package and importlib.util.find_spec(peer.package) is None:
        return {"missing": f"{peer.package} is not installed"}

    def own(case: Case) -> Logits:
        model = w.WAYS[peer.of].learn(case).model
        return lambda x: logits_of(model, x)

    if peer.package:
        importlib.import_module(peer.package)  # the import does not count
    x, y = case.test
    calls, found = {"own": own, "peer": peer.learn}, {}
    for which in sorted(calls, reverse=case.seed % 2 == 1):
        keras.backend.clear_session()
        keras.utils.set_random_seed(case.seed)
        start = processor_seconds(), time.perf_counter()
        try:
            predict = calls[which](case)
            spent = processor_seconds() - start[0], time.perf_counter() - start[1]
            accuracy = float(np.mean(predict(x).argmax(1) == y))
        except Exception as error:
            if which == "own" or peer.package is None:
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return {"missing": f"{peer.package} fails: {reason}"}
        found[which] = {"cpu": spent[0], "seconds": spent[1], "accuracy": accuracy}
    return {**found["peer"], "own": found["own"]}
