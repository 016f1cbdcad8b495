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

    If the whole backbone is frozen, the model shares a backbone object and freezes it in place. If
    some of its layers train, the model uses a copy. Fine-tuning the model later, with
    `lp.finetune_model(model)` or `lp.fit_two_phase`, trains the shared object. Frozen layers run in
    inference mode: their weights and BatchNormalization statistics do not change, and their Dropout
    is off.

    A frozen backbone gives the same features in every epoch. `fit` therefore computes them once and
    trains the head on them, in a fraction of the time (see `cache_features`). A head of one layer
    starts at 0 and trains on standardised features, so that ten epochs at the default rate usually
    come near its optimum; its final weights are for the unscaled features. `lp.fit_head` finds the
    optimum itself.

    Which function to use: with 40 or 1,000 examples, `lp.fit_head(model, data)`. From a few hundred
    examples on, `lp.fit_two_phase` is better if the new images differ from those of the backbone.
    With 50,000 examples, fine-tune all layers.

    Args:
        backbone: the name of a `keras.applications` function, or `"hub:"` and the name (or folder)
            of a KerasHub preset, such as `"hub:resnet_50_imagenet"`; image backbones by name take
            raw values `(batch, height, width, channels)` from 0 to 255. Or a headless
            `keras.Model`, with its own input; a `.keras` file; or a model that keras_lp built,
            whose head is dropped. A model object is copied if layers of it train (`trainable`),
            unless its layers cannot be copied; else it is shared. KerasHub text backbones take a
            dict of `token_ids` and `padding_mask`, both `(batch, tokens)`.
        task: `lp.Classification`, `lp.MultiLabel` or `lp.Regression`; a number of classes or a
            list of class names means `Classification`.
        input_shape: shape of your inputs without the batch axis, such as `(96, 96, 3)`; grey
            images `(28, 28, 1)` also work with colour networks. Defaults to the input shape of
            the backbone (for a name: RGB images of any size).
        image_size: the model resizes images to this (height, width), or one number for both.
            Defaults to None: no resizing.
        weights: for a name, `"imagenet"` (a preset's own weights) or a weights file; None is an
            untrained network, which needs `trainable="all"`. Defaults to `"imagenet"`.
        backbone_kwargs: for a name, arguments of its constructor, such as `{"alpha": 0.25}`.
        pretrained: pass False if your own model is not pretrained. Its BatchNormalization then
            trains, and `trainable` must be `"all"`. Defaults to True for a model.
        trainable: `"head"`; a number n for the top n blocks and the head; a list of layer
            names; or `"all"`. Defaults to `"head"`.
        pooling: how features with spatial or time axes become a vector: `"avg"`, `"max"`,
            `"flatten"` or None (no pooling: a sequence keeps one prediction per step). Text is
            pooled over the tokens whose `padding_mask` is 1. `"auto"` flattens a feature map of at
            most 4096 numbers (height x width x channels) and averages other features;
            `lp.trainable_report` names the choice. Defaults to `"auto"`.
        augmentation: random changes of the inputs during training, not in predictions and
            exports: a Keras layer that keeps the shape, or for images from 0 to 255 `"light"`
            (horizontal flips, translation, rotation, zoom) or `"strong"` (twice as much, plus
            brightness and contrast). Defaults to None.
        hidden_units: sizes of dense layers (relu) before the last one. Defaults to none.
        dropout: rate of a dropout before the last layer, at least 0 and below 1. Defaults to 0.
        cache_features: whether `fit` computes the features once. `"auto"`: for arrays and
            tensors, if the whole backbone is frozen and nothing random precedes it. True: also for
            a finite batched `tf.data.Dataset` or `PyDataset`; each pass over it must yield the
            same examples (a random `map` would be frozen at its first result). They are shuffled
            again in every epoch unless `fit(shuffle=False)`. False is plain Keras: features are
            computed in each epoch and are not standardised. Defaults to `"auto"`.
        cache_memory: bytes of memory for cached features. The rest is stored in a temporary
            folder, which is removed after `fit`. Defaults to 2 GiB.
        learning_rate: rate or schedule of an optimizer given by name. Defaults to None: 1e-3,
            or 1e-2 for SGD. On a fully frozen backbone with heads of one layer, it depends on the
            number n of features: for Adam 0.5 / n, from 3e-4 to 1e-2; for SGD 20 / n, from 0.02
            to 0.3.
        optimizer: name of a Keras optimizer, or an optimizer with its own rate. Defaults
            to `"adam"`.

    Returns:
        A compiled `keras.Model` whose output, named `"predictions"`, is `(batch, classes)`
        logits, or `(batch, units)` values for `Regression`.

    Raises:
        ValueError: if a backbone is frozen but not pretrained, a name is unknown, the backbone
            cannot take the shape, or `cache_features=True` and the features change.
        TypeError: if the backbone or the task has another type.
        ConnectionError: if ImageNet weights or a preset cannot be downloaded.
        ImportError: if `"hub:"` is used without KerasHub.

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
