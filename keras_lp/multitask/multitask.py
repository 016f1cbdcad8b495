"""Multitask learning: one shared backbone, one head per task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lp.backbones.features import CACHE_MEMORY, CacheFeatures
from keras_lp.backbones.freezing import Trainable
from keras_lp.backbones.images import AugmentationLike
from keras_lp.backbones.pooling import Pooling
from keras_lp.backbones.resolve import BackboneLike, Weights
from keras_lp.balancing.balanced_step import shared_variables
from keras_lp.balancing.ways import BalancingLike, as_balancing, fixed_weights
from keras_lp.model.assemble import build_and_compile
from keras_lp.model.model import Model
from keras_lp.model.options import Options
from keras_lp.tasks.classification import as_task
from keras_lp.tasks.task import TaskLike


def multitask_model(
    backbone: BackboneLike,
    tasks: Mapping[str, TaskLike],
    *,
    input_shape: Sequence[int | None] | None = None,
    image_size: int | Sequence[int] | None = None,
    weights: Weights = "imagenet",
    backbone_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool | None = None,
    trainable: Trainable = "all",
    pooling: Pooling | None = "auto",
    augmentation: AugmentationLike | None = None,
    hidden_units: Sequence[int] = (),
    dropout: float = 0.0,
    cache_features: CacheFeatures = "auto",
    cache_memory: int = CACHE_MEMORY,
    balancing: BalancingLike = "equal",
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule | None = None,
    optimizer: str | keras.optimizers.Optimizer = "adam",
) -> Model:
    """Returns a compiled model with a shared backbone and one head per task.

    Labels are a dict by task. A missing label is -1 (`Classification`, entries of `MultiLabel`)
    or NaN (`Regression`), or the task's key is absent. It does not count in the loss, in the
    metrics or in their denominators.

    The objective is the sum of the tasks' losses, in which each label of a `MultiLabel` counts as
    its own task: its `<task>_loss`, a mean over labels, counts times the number of labels, also if
    some are missing. The mean of 28 rare labels is so small that next to another task they would
    hardly be learned. Other tasks count once: the crossentropy of `Classification`, and the mean
    squared error of `Regression`, which is 1 for the best constant prediction. A task's `weight`
    multiplies its term. `loss` and `val_loss` are this sum for every balancing method, because a
    sum with changing weights is not comparable; only `balancing="sum"` adds the means. With SGD,
    the step is proportional to the size of the loss; with Adam it is not.

    If few examples have a label of a task, a batch drawn from all examples has hardly any. A
    stream with equal numbers of labelled examples and of all examples contains enough:
    `lp.mix({"labelled": ..., "all": ...}, temperature=float("inf"))`.

    If layers of a backbone object train (the default), it is copied; a frozen one is shared.

    Which settings to use: with 40 examples, a pretrained backbone, `trainable="head"` and
    `lp.fit_head`. With 1,000, train all layers if one task has far more labels than another. With
    50,000 labels of every task, check with `lp.compare_single_tasks` whether sharing still helps.

    Args:
        backbone: as in `lp.transfer_model`; a name may also have `weights=None`, which trains it
            from scratch.
        tasks: dict of tasks by name. Outputs, losses (`<task>_loss`) and metrics
            (`<task>_accuracy`) have these names.
        input_shape: shape of your inputs without the batch axis. Defaults to the input shape of
            the backbone.
        image_size: as in `lp.transfer_model`. Defaults to None.
        weights: for a name, `"imagenet"`, None or a weights file. Defaults to `"imagenet"`.
        backbone_kwargs: for a name, arguments of its constructor.
        pretrained: pass False if your own model is not pretrained; its BatchNormalization then
            trains. Defaults to True for a model.
        trainable: `"all"`; `"head"`; a number n for the top n blocks and the heads; or a
            list of layer names. Defaults to `"all"`.
        pooling: as in `lp.transfer_model`. Defaults to `"auto"`.
        augmentation: as in `lp.transfer_model`. Defaults to None.
        hidden_units: sizes of dense layers (relu) in each head. Defaults to none.
        dropout: rate of a dropout before each head's last layer. Defaults to 0.
        cache_features: as in `lp.transfer_model`, with `trainable="head"`. Defaults to `"auto"`.
        cache_memory: as in `lp.transfer_model`. Defaults to 2 GiB.
        balancing: how the tasks are weighted. `"equal"` adds their losses as described above.
            `"sum"` adds the means, also for `MultiLabel`. A dict with a weight for each task
            multiplies the losses of `"equal"`. The other methods balance the losses of `"equal"`:
            `"uncertainty"` and `"dwa"` weight the losses; `"gradnorm"`, `"pcgrad"`, `"cagrad"`,
            `"mgda"` and `"imtl_g"` weight their gradients of the backbone, which takes one backward
            pass per task. Or a `keras_lp.balancing` object with its own settings, such as
            `lp.balancing.CAGrad(c=0.4)`, or your own `lp.Balancing`. `fit` then also reports each
            task's weight (`<task>_weight`) and, with gradients, their mean cosine
            (`gradient_cosine`). Defaults to `"equal"`; no other method is consistently better
            (Kurin et al., 2022).
        learning_rate: as in `lp.transfer_model`. Defaults to None: 1e-3, or less or more for
            frozen backbones.
        optimizer: name of a Keras optimizer, or an optimizer with its own rate. Defaults
            to `"adam"`.

    Returns:
        A compiled `keras.Model` whose output is a dict by task of `(batch, units)` tensors.

    Raises:
        ValueError: if there is no task, a name cannot be used, the balancing is unknown, or the
            backbone is frozen but not pretrained.
        TypeError: if `tasks` is not a dict, or the backbone or a task has another type.
        ConnectionError: if ImageNet weights or a preset cannot be downloaded.
        ImportError: if `"hub:"` is used without KerasHub.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.multitask_model(backbone, {"digit": 10, "weight": lp.Regression()})
    >>> x = np.zeros((4, 8))
    >>> y = {"digit": np.array([1, -1, 3, -1]), "weight": np.array([0.5, 2.0, np.nan, 1.0])}
    >>> history = model.fit(x, y, verbose=0)
    >>> sorted(history.history)
    ['digit_accuracy', 'digit_loss', 'loss', 'weight_loss', 'weight_mae']

    References: Caruana, 1997, Multitask Learning (Machine Learning 28); equal weights, Kurin
    et al., 2022 (arXiv:2201.04122).
    """
    if not isinstance(tasks, Mapping):
        raise TypeError(
            f"`tasks` must be a dict of tasks by name. Received: tasks={tasks!r}. For one task "
            "use lp.transfer_model."
        )
    if not tasks:
        raise ValueError("`tasks` must have at least one task. Received: tasks={}.")
    for name in tasks:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                "Task names must be identifiers (letters, digits, underscores), because outputs "
                f"and metrics have these names. Received: {name!r}."
            )
    known = {name: as_task(task) for name, task in tasks.items()}
    layer = as_balancing(balancing, known)
    shares = fixed_weights(balancing, known)
    known = {
        name: dataclasses.replace(task, weight=task.weight * shares[name])
        for name, task in known.items()
    }
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
    model = build_and_compile(backbone, known, options, single=False, balancing=layer)
    if layer is not None and layer.uses_gradients and len(known) > 1:
        shared_variables(model)
    return model
