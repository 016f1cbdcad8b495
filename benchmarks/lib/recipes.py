"""Recipes in plain Keras for the cases of the comparison; each returns what gives logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_lp.backbones.blocks import below_head, blocks_of
from keras_lp.backbones.features import feature_model
from lib import ways as w
from lib.cases import OTHER_LABELS, Case

DECAY, RATE = 0.7, 1e-3
FASTAI_RATE, FASTAI_GROUPS = 2e-3, 3
Logits = Callable[[np.ndarray], np.ndarray]


def network(case: Case) -> keras.Model:
    """Returns the pretrained network in plain Keras, from inputs to features."""
    return feature_model(case.build(case.names))


def with_heads(below: keras.Model, units: dict[str, int]) -> keras.Model:
    """Puts new heads on a network, whose BatchNormalization keeps its statistics."""
    inputs = keras.Input(below.input_shape[1:], dtype=below.inputs[0].dtype)
    features = below(inputs, training=False)
    outputs = {name: keras.layers.Dense(n, name=name)(features) for name, n in units.items()}
    return keras.Model(inputs, outputs if len(outputs) > 1 else outputs["head"])


def compiled(model: keras.Model, optimizer: Any) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def logits(model: keras.Model) -> Logits:
    return lambda x: model.predict(x, batch_size=256, verbose=0)


def frozen(case: Case) -> keras.Model:
    below = network(case)
    below.trainable = False
    return with_heads(below, {"head": len(case.names)})


def keras_guide(case: Case) -> Logits:
    """The guide's recipe: `base.trainable = False`, a new Dense layer, `fit`."""
    return logits(w.train(compiled(frozen(case), keras.optimizers.Adam(RATE)), case))


def block_rates(model: keras.Model, rates: Callable[[int], list[Any]]) -> Any:
    """Returns an optimizer with an Adam for each block; the last rate is that of the head."""
    blocks = blocks_of(below_head(model))
    made = [keras.optimizers.Adam(rate) for rate in rates(len(blocks))]
    block_of = {v.path: i for i, block in enumerate(blocks) for la in block for v in la.variables}
    return keras.optimizers.MultiOptimizer(lambda v: made[block_of.get(v.path, len(blocks))])


def multi_optimizer(case: Case) -> Logits:
    """Layer decay by `keras.optimizers.MultiOptimizer`, after half of the steps for the head."""
    model = w.train(compiled(frozen(case), keras.optimizers.Adam(RATE)), case, 0.5)
    model.trainable = True

    def rates(blocks: int) -> list[float]:
        return [RATE * DECAY ** (blocks - i) for i in range(blocks + 1)]

    return logits(w.train(compiled(model, block_rates(model, rates)), case, 0.5))


def one_cycle(rate: float, steps: int, rising: float, start: float) -> Any:
    """Returns fastai's cycle: from `rate / start` up for a share of the steps, then down."""
    warm_up = round(rising * steps)
    return keras.optimizers.schedules.CosineDecay(
        rate / start, max(1, steps - warm_up), warmup_target=rate, warmup_steps=warm_up
    )


def fastai(case: Case) -> Logits:
    """fastai's `fine_tune` in plain Keras, without its cycle of momentum and weight decay.

    The head trains for an epoch, then all, with half of the rate; three groups of layers have a
    hundredth, a tenth and all of it.
    """
    share = len(w.repeated(case.train)[1]) / case.seen  # an epoch
    steps = case.seen // w.BATCH
    head_steps = round(share * steps)
    first = keras.optimizers.Adam(one_cycle(FASTAI_RATE, head_steps, 0.99, 25))
    model = w.train(compiled(frozen(case), first), case, share)
    model.trainable = True

    def rates(blocks: int) -> list[Any]:
        groups = np.linspace(0, FASTAI_GROUPS - 1e-9, blocks + 1).astype(int)
        highest = [FASTAI_RATE / 2 * 10.0 ** (group - FASTAI_GROUPS + 1) for group in groups]
        return [one_cycle(rate, steps - head_steps, 0.3, 5) for rate in highest]

    return logits(w.train(compiled(model, block_rates(model, rates)), case, 1 - share))


def two_outputs(case: Case) -> Logits:
    """Two Dense layers on the network; sample weights of 0 where a label is missing."""
    below = network(case)
    below.trainable = True
    units = {w.TASK: len(case.names), w.SECOND: int(case.second.max()) + 1}
    model = with_heads(below, units)
    loss = keras.losses.SparseCategoricalCrossentropy
    model.compile(keras.optimizers.Adam(RATE / 2), {name: loss(from_logits=True) for name in units})
    x, y = w.repeated(case.train)
    others = max(OTHER_LABELS, len(case.train[1]))
    known = np.arange(len(y) + others) < len(y)
    labels = {
        w.TASK: np.concatenate([y, np.zeros(others, y.dtype)]),
        w.SECOND: np.concatenate([np.zeros(len(y), "int64"), case.second[:others]]),
    }
    weights = {w.TASK: known.astype("float32"), w.SECOND: (~known).astype("float32")}
    model.fit(
        np.concatenate([x, case.pool[0][:others]]), labels, sample_weight=weights,
        batch_size=w.BATCH, epochs=max(1, round(case.seen / len(known))), verbose=0,
    )  # fmt: skip
    return lambda x: model.predict(x, batch_size=256, verbose=0)[w.TASK]
