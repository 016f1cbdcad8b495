"""What other packages do on the cases of the comparison, in turn with the way that is alike.

All train from the same network, on the same examples, in as many steps.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import keras_lp as lp
from keras_lp.backbones.blocks import below_head, blocks_of
from keras_lp.backbones.features import feature_model
from lib import comparison as c
from lib.cases import OTHER_LABELS, Case
from lib.cost import processor_seconds
from lib.flower import flower_rounds
from lib.journal import Run
from lib.problems import Arrays
from lib.rounds import tutorial

TEXTS = ("trec", "clinc_oos")
TFF_RATE = 0.01  # that of TFF's tutorial
DECAY, RATE = 0.7, 1e-3
FASTAI_RATE, FASTAI_GROUPS = 2e-3, 3
Logits = Callable[[np.ndarray], np.ndarray]


class Peer(NamedTuple):
    """What a package does.

    Attributes:
        of: the way that is alike.
        learn: builds and trains, and returns what gives logits.
        package: the package that it needs, besides those of the benchmarks.
        images: whether it is for images only.
        second: whether it needs labels of a second task.
    """

    of: str
    learn: Callable[[Case], Logits]
    package: str | None = None
    images: bool = False
    second: bool = False


def network(case: Case) -> keras.Model:
    """Returns the pretrained network in plain Keras, from inputs to features."""
    return feature_model(case.build(case.names))


def with_head(below: keras.Model, case: Case) -> keras.Model:
    outputs = keras.layers.Dense(len(case.names), name="head")(below.output)
    return keras.Model(below.input, outputs)


def compiled(model: keras.Model, optimizer: Any) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def logits(model: keras.Model) -> Logits:
    return lambda x: model.predict(x, batch_size=256, verbose=0)


def frozen(case: Case) -> keras.Model:
    below = network(case)
    below.trainable = False
    return with_head(below, case)


def keras_guide(case: Case) -> Logits:
    """The guide's recipe: `base.trainable = False`, a new Dense layer, `fit`."""
    return logits(c.train(compiled(frozen(case), keras.optimizers.Adam(RATE)), case))


def kerashub(case: Case) -> Logits:
    """KerasHub's classifier; it averages the feature maps."""
    import keras_hub

    below = network(case)
    pooling = (keras.layers.Flatten, keras.layers.GlobalAveragePooling2D)
    maps = next(layer.input for layer in below.layers if isinstance(layer, pooling))
    base = keras.Model(below.input, maps)
    base.trainable = False
    options = {"num_classes": len(case.names), "preprocessor": None, "pooling": "avg"}
    model = keras_hub.models.ImageClassifier(backbone=base, **options)
    return logits(c.train(compiled(model, keras.optimizers.Adam(RATE)), case))


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


def block_rates(model: keras.Model, rates: Callable[[int], list[Any]]) -> Any:
    """Returns an optimizer with an Adam for each block; the last rate is that of the head."""
    blocks = blocks_of(below_head(model))
    made = [keras.optimizers.Adam(rate) for rate in rates(len(blocks))]
    block_of = {v.path: i for i, block in enumerate(blocks) for la in block for v in la.variables}
    return keras.optimizers.MultiOptimizer(lambda v: made[block_of.get(v.path, len(blocks))])


def multi_optimizer(case: Case) -> Logits:
    """Layer decay by `keras.optimizers.MultiOptimizer`, after half of the steps for the head."""
    model = c.train(compiled(frozen(case), keras.optimizers.Adam(RATE)), case, 0.5)
    model.trainable = True

    def rates(blocks: int) -> list[float]:
        return [RATE * DECAY ** (blocks - i) for i in range(blocks + 1)]

    return logits(c.train(compiled(model, block_rates(model, rates)), case, 0.5))


def fastai(case: Case) -> Logits:
    """fastai's `fine_tune` in plain Keras: the head for an epoch, then all, in one cycle each.

    Three groups of layers have a hundredth, a tenth and all of half of the rate.
    """
    one_epoch = len(c.repeated(case.train)[1]) / case.seen

    def cycle(rate: float, share: float) -> Any:
        steps = max(2, round(share * case.seen / c.BATCH))
        warm_up = steps // 4
        return keras.optimizers.schedules.CosineDecay(
            rate / 25, steps - warm_up, warmup_target=rate, warmup_steps=warm_up
        )

    first = keras.optimizers.Adam(cycle(FASTAI_RATE, one_epoch))
    model = c.train(compiled(frozen(case), first), case, one_epoch)
    model.trainable = True

    def rates(blocks: int) -> list[Any]:
        groups = np.linspace(0, FASTAI_GROUPS - 1e-9, blocks + 1).astype(int)
        highest = [FASTAI_RATE / 2 * 10.0 ** (group - FASTAI_GROUPS + 1) for group in groups]
        return [cycle(rate, 1 - one_epoch) for rate in highest]

    return logits(c.train(compiled(model, block_rates(model, rates)), case, 1 - one_epoch))


def two_outputs(case: Case) -> Logits:
    """Two Dense layers on the network; sample weights of 0 where a label is missing."""
    below = network(case)
    below.trainable = True
    units = {c.TASK: len(case.names), c.SECOND: int(case.second.max()) + 1}
    heads = {name: keras.layers.Dense(n, name=name)(below.output) for name, n in units.items()}
    model = keras.Model(below.input, heads)
    loss = keras.losses.SparseCategoricalCrossentropy
    model.compile(keras.optimizers.Adam(RATE / 2), {name: loss(from_logits=True) for name in units})
    x, y = c.repeated(case.train)
    others = max(OTHER_LABELS, len(case.train[1]))
    known = np.arange(len(y) + others) < len(y)
    labels = {
        c.TASK: np.concatenate([y, np.zeros(others, y.dtype)]),
        c.SECOND: np.concatenate([np.zeros(len(y), "int64"), case.second[:others]]),
    }
    weights = {c.TASK: known.astype("float32"), c.SECOND: (~known).astype("float32")}
    model.fit(
        np.concatenate([x, case.pool[0][:others]]), labels, sample_weight=weights,
        batch_size=c.BATCH, epochs=max(1, round(case.seen / len(known))), verbose=0,
    )  # fmt: skip
    return lambda x: model.predict(x, batch_size=256, verbose=0)[c.TASK]


def clients_of(case: Case) -> dict[Any, Arrays]:
    """Returns the clients of equal parts, as those of `comparison.federated`."""
    parts = lp.partition(case.train, clients=c.CLIENTS, seed=case.seed)
    copies = max(1, c.EPOCH // len(case.train[1]))
    return {
        client: tuple(np.concatenate([part] * copies) for part in data)
        for client, data in parts.items()
    }


def rounds_of(clients: dict[Any, Arrays], case: Case) -> int:
    return max(1, round(case.seen / sum(len(y) for _, y in clients.values())))


def tff(case: Case) -> Logits:
    """`build_weighted_fed_avg` on the whole model, as in TFF's tutorial."""
    clients = clients_of(case)
    model = frozen(case)
    process, data = tutorial(model, clients, c.LOCAL_BATCH, TFF_RATE)
    state = process.initialize()
    for _ in range(rounds_of(clients, case)):
        state = process.next(state, list(data.values())).state
    weights = process.get_model_weights(state).trainable
    for variable, value in zip(model.trainable_variables, weights, strict=True):
        variable.assign(value)
    return logits(model)


def flower(case: Case) -> Logits:
    """Flower's simulation, Keras's `fit` on each client."""
    clients = clients_of(case)

    def make() -> keras.Model:
        return compiled(frozen(case), keras.optimizers.SGD(TFF_RATE))

    parts = list(clients.values())
    found = flower_rounds(parts, None, make, c.LOCAL_BATCH)(rounds_of(clients, case) - 1)
    model = make()
    model.set_weights(found.weights)
    return logits(model)


def autokeras(case: Case) -> Logits:
    """AutoKeras's classifier with one trial; it trains a network of its own."""
    import autokeras

    x, y = c.repeated(case.train)
    with tempfile.TemporaryDirectory() as folder:
        model = autokeras.ImageClassifier(max_trials=1, directory=folder, seed=case.seed)
        epochs = max(1, round(case.seen / len(y)))
        model.fit(x, y, batch_size=c.BATCH, epochs=epochs, validation_split=0.2, verbose=0)
        chosen = model.export_model()
    return lambda x: np.log(chosen.predict(x.astype("float32"), verbose=0) + 1e-12)


PEERS: dict[str, Peer] = {
    "Keras guide's recipe": Peer(c.TRANSFER, keras_guide),
    "KerasHub ImageClassifier": Peer(c.TRANSFER, kerashub, "keras_hub", images=True),
    "scikit-learn LogisticRegression": Peer(c.HEAD, scikit_learn),
    "Keras MultiOptimizer": Peer(c.DECAY, multi_optimizer),
    "recipe of fastai, in Keras": Peer(c.DECAY, fastai),
    "Keras, two outputs by hand": Peer(c.MULTITASK, two_outputs, second=True),
    "TFF, as in its tutorial": Peer(c.EQUAL, tff),
    "Flower simulation": Peer(c.EQUAL, flower, "flwr"),
    "AutoKeras, one trial": Peer(c.SCRATCH, autokeras, "autokeras", images=True),
}


def measure(name: str, case: Case) -> Run:
    """Trains the peer and the way that is alike, in an order that the seed decides."""
    peer = PEERS[name]
    if peer.package and importlib.util.find_spec(peer.package) is None:
        return {"missing": f"{peer.package} is not installed"}

    def own(case: Case) -> Logits:
        model = c.WAYS[peer.of].learn(case).model
        return lambda x: c.logits_of(model, x)

    x, y = case.test
    calls, found = {"own": own, "peer": peer.learn}, {}
    for which in sorted(calls, reverse=case.seed % 2 == 1):
        keras.backend.clear_session()
        keras.utils.set_random_seed(case.seed)
        start = processor_seconds(), time.perf_counter()
        predict = calls[which](case)
        found[which] = {
            "cpu": processor_seconds() - start[0],
            "seconds": time.perf_counter() - start[1],
            "accuracy": float(np.mean(predict(x).argmax(1) == y)),
        }
    return {**found["peer"], "own": found["own"]}
