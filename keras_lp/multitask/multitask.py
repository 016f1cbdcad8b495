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
    or NaN (`Regression`), or the task's key is absent; it takes no part in the loss, the metrics
    or what they are divided by.

    What is minimised is the sum of the tasks' losses, in which each label of a `MultiLabel` counts
    as a task of its own: its `<task>_loss`, a mean over labels, counts times their number, also
    where some are missing. The mean of 28 rare labels is so small that next to another task they
    would hardly be learned. The other tasks count once: the crossentropy of `Classification`, and
    the mean square of `Regression`, which is 1 for the best constant prediction. A task's `weight`
    multiplies that. `loss` and `val_loss` are this sum whatever the balancing, as one whose
    weights move says nothing; only `balancing="sum"` adds up the means. With SGD the step goes
    with the size of the loss, with Adam it does not.

    Where few examples have a task's label, a batch of all of them has hardly any. A stream of the
    labelled examples and of all, as many of each, gives it enough:
    `lp.mix({"labelled": ..., "all": ...}, temperature=float("inf"))`.

    The backbone is shared with the model, not copied.

    With 40 examples use a pretrained backbone, `trainable="head"` and `lp.fit_head`; with 1,000
    train all of it where one task has far more labels than another; with 50,000 labels of every
    task `lp.compare_single_tasks` says whether sharing still gains anything.

    Args:
        backbone: as in `lp.transfer_model`; a name may also have `weights=None`, which trains it
            from scratch.
        tasks: dict of tasks by name. Outputs, losses (`<task>_loss`) and metrics
            (`<task>_accuracy`) carry the names.
        input_shape: shape of what you feed, without the batch. Defaults to what the backbone
            takes.
        image_size: as in `lp.transfer_model`. Defaults to None.
        weights: for a name, `"imagenet"`, None or a weights file. Defaults to `"imagenet"`.
        backbone_kwargs: for a name, arguments of its constructor.
        pretrained: False says that a model of your own is not pretrained: its
            BatchNormalization then trains. Defaults to True for a model.
        trainable: `"all"`; `"head"`; a number n for the top n blocks besides the heads; or a
            list of layer names. Defaults to `"all"`.
        pooling: as in `lp.transfer_model`. Defaults to `"auto"`.
        augmentation: as in `lp.transfer_model`. Defaults to None.
        hidden_units: sizes of dense layers (relu) in each head. Defaults to none.
        dropout: rate of a dropout before each head's last layer. Defaults to 0.
        cache_features: as in `lp.transfer_model`, with `trainable="head"`. Defaults to `"auto"`.
        cache_memory: as in `lp.transfer_model`. Defaults to 2 GiB.
        balancing: how the tasks share the backbone: `"equal"` adds up their losses as above;
            `"sum"` adds up the means, also of `MultiLabel`; a dict has a weight for each task,
            which multiplies its loss in `"equal"`. The others balance the losses of `"equal"`:
            `"uncertainty"` and `"dwa"` weigh them; `"gradnorm"`, `"pcgrad"`, `"cagrad"`, `"mgda"`
            and `"imtl_g"` weigh their gradients of the backbone, which takes a backward pass a
            task. Or a `keras_lp.balancing` object with settings of its own, such as
            `lp.balancing.CAGrad(c=0.4)`, or an `lp.Balancing` of yours. `fit` then also shows each
            task's weight (`<task>_weight`) and, with gradients, their mean cosine
            (`gradient_cosine`). Defaults to `"equal"`, which nothing is consistently better than
            (Kurin et al., 2022).
        learning_rate: as in `lp.transfer_model`. Defaults to None: 1e-3, or less or more for
            frozen backbones.
        optimizer: name of a Keras optimizer, or an optimizer with a rate of its own. Defaults
            to `"adam"`.

    Returns:
        A compiled `keras.Model` whose output is a dict by task of `(batch, units)` tensors.

    Raises:
        ValueError: no task, a name that cannot be used, an unknown balancing; a backbone that is
            not pretrained but frozen.
        TypeError: tasks that are not a dict.
        ConnectionError: ImageNet weights that cannot be downloaded.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.multitask_model(backbone, {"digit": 10, "weight": lp.Regression()})
    >>> x = np.zeros((4, 8))
    >>> y = {"digit": np.array([1, -1, 3, -1]), "weight": np.array([0.5, 2.0, np.nan, 1.0])}
    >>> history = model.fit(x, y, verbose=0)
    >>> sorted(history.history)
    ['digit_accuracy', 'digit_loss', 'loss', 'weight_loss', 'weight_mae']

    Reference: Caruana, 1997, Multitask Learning (Machine Learning 28); equal weights after Kurin
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
                "Names of tasks must be identifiers (letters, digits, underscores), as outputs "
                f"and metrics carry them. Received: {name!r}."
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
