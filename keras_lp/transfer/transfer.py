"""Transfer learning: a frozen pretrained backbone under a new head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lp.backbones.features import CACHE_MEMORY, CacheFeatures
from keras_lp.backbones.freezing import Trainable
from keras_lp.backbones.images import AugmentationLike
from keras_lp.backbones.pooling import Pooling
from keras_lp.backbones.resolve import BackboneLike, Weights
from keras_lp.model.assemble import HEAD, build_and_compile
from keras_lp.model.model import Model
from keras_lp.model.options import Options
from keras_lp.tasks.classification import as_task
from keras_lp.tasks.task import TaskLike


def transfer_model(
    backbone: BackboneLike,
    task: TaskLike,
    *,
    input_shape: Sequence[int | None] | None = None,
    image_size: int | Sequence[int] | None = None,
    weights: Weights = "imagenet",
    backbone_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool | None = None,
    trainable: Trainable = "head",
    pooling: Pooling | None = "auto",
    augmentation: AugmentationLike | None = None,
    hidden_units: Sequence[int] = (),
    dropout: float = 0.0,
    cache_features: CacheFeatures = "auto",
    cache_memory: int = CACHE_MEMORY,
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule | None = None,
    optimizer: str | keras.optimizers.Optimizer = "adam",
) -> Model:
    """Returns a compiled model: a frozen pretrained backbone and a new head for one task.

    The backbone is shared with the model, not copied: it is frozen in place. What is frozen runs
    in inference mode: neither the statistics of its BatchNormalization nor its weights move, and
    its Dropout is off.

    A frozen backbone gives the same features in every epoch, so `fit` computes them once, and
    trains the head on them, a fraction of the time (see `cache_features`). A head of one layer
    starts at 0 and trains on standardised features, so that ten epochs at the default rate come
    near its optimum; its weights afterwards are those for the features as they are.
    `lp.fit_head` finds the optimum itself.

    With 40 examples or 1,000 call `lp.fit_head(model, data)`; from some hundreds on
    `lp.fit_two_phase` gains more where the new pictures differ from those of the backbone; with
    50,000 examples fine-tune all layers.

    Args:
        backbone: the name of a `keras.applications` function or `"hub:"` and the name (or folder)
            of a KerasHub preset, such as `"hub:resnet_50_imagenet"`; for pictures both take raw
            values `(batch, height, width, channels)` from 0 to 255. Or a headless `keras.Model`,
            which takes what it takes; a `.keras` file; or a model that keras_lp built, whose head
            is dropped. An object is used as it is: models built on one share its weights, so pass
            a file where each is to start from the same ones, as in a search with keras-tuner. Text
            backbones of KerasHub take a dict of `token_ids` and `padding_mask`, both
            `(batch, tokens)`.
        task: `lp.Classification`, `lp.MultiLabel` or `lp.Regression`; a number of classes or a
            list of class names means `Classification`.
        input_shape: shape of what you feed, without the batch, such as `(96, 96, 3)`; grey
            pictures `(28, 28, 1)` go into a colour network too. Defaults to what the backbone
            takes (for a name: RGB images of any size).
        image_size: pictures are resized to this (height, width), or one number for both, in the
            model. Defaults to None, the size they have.
        weights: for a name, `"imagenet"` (a preset's own weights) or a weights file; None is an
            untrained network, which needs `trainable="all"`. Defaults to `"imagenet"`.
        backbone_kwargs: for a name, arguments of its constructor, such as `{"alpha": 0.25}`.
        pretrained: False says that a model of your own is not pretrained; its
            BatchNormalization then trains, and so must all of it. Defaults to True for a model.
        trainable: `"head"`; a number n for the top n blocks besides the head; a list of layer
            names; or `"all"`. Defaults to `"head"`.
        pooling: how features with axes of space or time become a vector: `"avg"`, `"max"`,
            `"flatten"` or None (as they are: a sequence keeps one prediction a step). Text is
            pooled over its real tokens, those whose `padding_mask` is 1. `"auto"` flattens a
            feature map of at most 4096 numbers (height x width x channels) and averages the rest;
            `lp.trainable_report` names what it chose. Defaults to `"auto"`.
        augmentation: random changes of the inputs in training, absent from predictions and
            exports: a Keras layer that keeps the shape, or for pictures from 0 to 255 `"light"`
            (mirrored left to right, moved, turned, zoomed) or `"strong"` (twice as much, and
            brightness and contrast). Defaults to None.
        hidden_units: sizes of dense layers (relu) before the last one. Defaults to none.
        dropout: rate of a dropout before the last layer, from 0 to below 1. Defaults to 0.
        cache_features: whether `fit` computes the features once. `"auto"`: for arrays and
            tensors, where the whole backbone is frozen and nothing random stands before it.
            True: also for a `tf.data.Dataset` or `PyDataset`, finite and batched; it is your word
            that each pass yields the same examples (a random `map` in it would be frozen at its
            first outcome); they are shuffled again every epoch unless `fit(shuffle=False)`. False
            is plain Keras: features computed in each epoch, and not standardised. Defaults to
            `"auto"`.
        cache_memory: bytes of memory for cached features. What is more goes to a temporary
            folder, removed after `fit`. Defaults to 2 GiB.
        learning_rate: rate, or schedule, of an optimizer given by name. Defaults to None: 1e-3,
            for SGD 1e-2. On a wholly frozen backbone, with heads of one layer, it goes by the
            number n of features: for Adam 0.5 / n, from 3e-4 to 1e-2, for SGD 20 / n, from 0.02
            to 0.3.
        optimizer: name of a Keras optimizer, or an optimizer with a rate of its own. Defaults
            to `"adam"`.

    Returns:
        A compiled `keras.Model` whose output, named `"predictions"`, is `(batch, classes)`
        logits, or `(batch, units)` values for `Regression`.

    Raises:
        ValueError: a backbone that is not pretrained but frozen; an unknown name; a shape that
            the backbone cannot take; `cache_features=True` with features that change.
        TypeError: a backbone or task of another type.
        ConnectionError: ImageNet weights, or a preset, that cannot be downloaded.
        ImportError: `"hub:"` without KerasHub.

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
    options = Options(
        input_shape=input_shape,
        image_size=image_size,
        weights=weights,
        backbone_kwargs=backbone_kwargs,
        pretrained=pretrained,
        trainable=trainable,
        pooling=pooling,
        augmentation=augmentation,
        hidden_units=hidden_units,
        dropout=dropout,
        cache_features=cache_features,
        cache_memory=cache_memory,
        learning_rate=learning_rate,
        optimizer=optimizer,
    )
    return build_and_compile(backbone, {HEAD: as_task(task)}, options, single=True)
