"""Transfer learning: a frozen pretrained backbone under a new head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lp.assemble import HEAD, build_and_compile
from keras_lp.backbones import BackboneLike
from keras_lp.freezing import Trainable
from keras_lp.model import Model
from keras_lp.tasks import TaskLike, as_task


def transfer_model(
    backbone: BackboneLike,
    task: TaskLike,
    *,
    input_shape: Sequence[int | None] | None = None,
    weights: Any = "imagenet",
    backbone_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool | None = None,
    trainable: Trainable = "head",
    pooling: str | None = "avg",
    hidden_units: Sequence[int] = (),
    dropout: float = 0.0,
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 1e-3,
    optimizer: str | keras.optimizers.Optimizer = "adam",
) -> Model:
    """Returns a compiled model: a frozen pretrained backbone and a new head for one task.

    The backbone is shared with the model, not copied: it is frozen in place.

    Args:
        backbone: the name of a `keras.applications` function, which then takes raw images
            `(batch, height, width, 3)` from 0 to 255; a headless `keras.Model`, which takes what
            it takes; a `.keras` file; or a model that keras_lp built, whose head is dropped.
        task: `lp.Classification`, `lp.MultiLabel` or `lp.Regression`; a number of classes or a
            list of class names means `Classification`.
        input_shape: shape of what you feed, without the batch, such as `(96, 96, 3)`. Defaults
            to what the backbone takes (for a name: RGB images of any size).
        weights: for a name, `"imagenet"` or a weights file; None is an untrained network, which
            needs `trainable="all"`. Defaults to `"imagenet"`.
        backbone_kwargs: for a name, arguments of its constructor, such as `{"alpha": 0.25}`.
        pretrained: False says that a model of your own is not pretrained; its
            BatchNormalization then trains, and so must all of it. Defaults to True for a model.
        trainable: `"head"`; a number n for the top n blocks besides the head; a list of layer
            names; or `"all"`. Defaults to `"head"`.
        pooling: how features with axes of space or time become a vector: `"avg"`, `"max"`,
            `"flatten"` or None (as they are). Defaults to `"avg"`.
        hidden_units: sizes of dense layers (relu) before the last one. Defaults to none.
        dropout: rate of a dropout before the last layer, from 0 to below 1. Defaults to 0.
        learning_rate: rate, or schedule, of an optimizer given by name. Defaults to 1e-3.
        optimizer: name of a Keras optimizer, or an optimizer with a rate of its own. Defaults
            to `"adam"`.

    Returns:
        A compiled `keras.Model` whose output, named `"predictions"`, is `(batch, classes)`
        logits, or `(batch, units)` values for `Regression`.

    Raises:
        ValueError: a backbone that is not pretrained but frozen; an unknown name; a shape that
            the backbone cannot take.
        TypeError: a backbone or task of another type.
        ConnectionError: ImageNet weights that cannot be downloaded.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3)])
    >>> model = lp.transfer_model(backbone, ["cat", "dog"])
    >>> model.output_shape
    (None, 2)
    >>> len(model.trainable_variables)
    2

    Reference: Yosinski et al., 2014, How transferable are features in deep neural networks?
    (arXiv:1411.1792).
    """
    return build_and_compile(
        backbone,
        {HEAD: as_task(task)},
        single=True,
        input_shape=input_shape,
        weights=weights,
        backbone_kwargs=backbone_kwargs,
        pretrained=pretrained,
        trainable=trainable,
        pooling=pooling,
        hidden_units=hidden_units,
        dropout=dropout,
        learning_rate=learning_rate,
        optimizer=optimizer,
    )
