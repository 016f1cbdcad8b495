"""Six ways to learn with a pretrained network, with the same number of steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_lp as lp
from lib.networks import SIZE, short_averages
from lib.study import Approach

BATCH = 40
STAGES = 25  # of one training: gradual unfreezing adds a block at each
HEAD_STAGES = 5  # of them with the head alone, before more is fine-tuned
TOP_BLOCKS = 4  # of 14
DECAY = 0.7
OTHER_DECAY = 0.9  # of a check
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of the two that are compared; the others get three of them
LOW, HIGH = RATES[:3], RATES[1:]
HEAD_RATE = 3e-3  # while the head is alone

HEAD, TOP, ONE = "head only", f"top {TOP_BLOCKS} blocks", "all, one rate"
LAYERED, GRADUAL, SCRATCH = f"all, layer decay {DECAY}", "gradual unfreezing", "from scratch"
OTHER = f"all, layer decay {OTHER_DECAY}"
WAYS = (HEAD, TOP, ONE, LAYERED, GRADUAL, SCRATCH)


def approaches(backbone: Path | keras.Model) -> dict[str, Approach]:
    """Returns the ways by name, from the weights in a file or from the network of a model."""

    def later(trainable: str | int, layer_decay: float) -> Callable[..., keras.Model]:
        return functools.partial(head_first, backbone, trainable, layer_decay)

    ways = [
        (HEAD, HIGH, functools.partial(head_only, backbone)),
        (TOP, LOW, later(TOP_BLOCKS, 1.0)),
        (ONE, RATES, later("all", 1.0)),
        (LAYERED, RATES, later("all", DECAY)),
        (OTHER, RATES, later("all", OTHER_DECAY)),
        (GRADUAL, LOW, functools.partial(gradual, backbone)),
        (SCRATCH, HIGH, scratch),
    ]
    return {name: Approach(name, rates, fit) for name, rates, fit in ways}


def build(
    backbone: Path | keras.Model | None, x: np.ndarray, y: np.ndarray, **options: Any
) -> keras.Model:
    """Returns a model with a new head for the classes of `y`; None is an untrained network."""
    if isinstance(backbone, keras.Model):  # it takes the size that it was built for
        options |= {"image_size": backbone.input_shape[1:3]}
    else:
        options |= {"weights": backbone, "backbone_kwargs": {"alpha": 0.25}, "image_size": SIZE}
        backbone = "MobileNet"
    return lp.transfer_model(backbone, int(y.max()) + 1, input_shape=x.shape[1:], **options)


def schedule(rate: float, steps: int) -> keras.optimizers.schedules.CosineDecay:
    """Rises to the rate over the first tenth of the steps, then falls along a cosine to zero."""
    warm_up = math.ceil(steps / 10)
    return keras.optimizers.schedules.CosineDecay(
        rate / 50, steps - warm_up, warmup_target=rate, warmup_steps=warm_up
    )


def train(
    model: keras.Model, x: np.ndarray, y: np.ndarray, steps: int, stages: int, **options: Any
) -> None:
    """Trains for so many steps; an epoch of Keras is a stage, whatever the number of pictures."""
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).repeat().batch(BATCH)
    options |= {"shuffle": False, "verbose": 0}  # the data set is shuffled
    model.fit(data, epochs=stages, steps_per_epoch=steps // stages, **options)


def head_only(
    backbone: Any, x: Any, y: Any, rate: float, steps: int, **options: Any
) -> keras.Model:
    """Trains on arrays, so that the features are computed once; as many steps as the others."""
    model = build(backbone, x, y)
    lp.finetune_model(model, trainable="head", learning_rate=schedule(rate, steps))
    epochs = max(1, steps * BATCH // len(x))
    again = np.resize(np.arange(len(x)), steps * BATCH // epochs)
    model.fit(x[again], y[again], batch_size=BATCH, epochs=epochs, verbose=0, **options)
    return model


def head_first(
    backbone: Path | keras.Model,
    trainable: str | int,
    layer_decay: float,
    x: np.ndarray,
    y: np.ndarray,
    rate: float,
    steps: int,
    **options: Any,
) -> keras.Model:
    """Trains the head for a fifth of the steps, the same for all; then what is fine-tuned."""
    model = build(backbone, x, y)
    lp.finetune_model(model, trainable="head", learning_rate=HEAD_RATE)
    first = steps * HEAD_STAGES // STAGES
    train(model, x, y, first, HEAD_STAGES, **options)
    rates = schedule(rate, steps - first)
    lp.finetune_model(model, trainable=trainable, layer_decay=layer_decay, learning_rate=rates)
    train(model, x, y, steps - first, STAGES - HEAD_STAGES, **options)
    return model


def gradual(backbone: Any, x: Any, y: Any, rate: float, steps: int, **options: Any) -> keras.Model:
    """Trains the head from the first stage, one block more at each: 14 by the 15th of 25."""
    model = build(backbone, x, y)
    lp.finetune_model(model, layer_decay=1.0, learning_rate=schedule(rate, steps))
    train(model, x, y, steps, STAGES, callbacks=[lp.GradualUnfreezing()], **options)
    return model


def scratch(x: Any, y: Any, rate: float, steps: int, **options: Any) -> keras.Model:
    """Trains the same network from random weights, its BatchNormalization too."""
    optimizer = keras.optimizers.AdamW(schedule(rate, steps), weight_decay=1e-4)
    model = build(None, x, y, trainable="all", optimizer=optimizer)
    train(short_averages(model), x, y, steps, STAGES, **options)
    return model
