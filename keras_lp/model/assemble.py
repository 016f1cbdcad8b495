"""Builds and compiles a model from a backbone, pooling and one head per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lp.backbones.blocks import blocks_of
from keras_lp.backbones.features import CACHE_MEMORY, Features, obstacle
from keras_lp.backbones.freezing import Trainable, choose, freeze
from keras_lp.backbones.images import augment
from keras_lp.backbones.pooling import pool
from keras_lp.backbones.resolve import BackboneLike, resolve_backbone
from keras_lp.backbones.sharing import note_training
from keras_lp.balancing.ways import Balancing
from keras_lp.model.model import Model, input_structure
from keras_lp.model.scaling import is_on_features
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import Head, heads, tasks
from keras_lp.tasks.task import Task, check_hidden_units
from keras_lp.utils.arguments import check_choice, check_positive

HEAD = "predictions"  # the name of the head of a model with one task


def build_and_compile(
    backbone: BackboneLike,
    new_tasks: Mapping[str, Task],
    *,
    single: bool,
    input_shape: Sequence[int | None] | None,
    image_size: int | Sequence[int] | None,
    weights: Any,
    backbone_kwargs: Mapping[str, Any] | None,
    pretrained: bool | None,
    trainable: Trainable,
    pooling: str | None,
    augmentation: str | keras.Layer | None,
    hidden_units: Sequence[int],
    dropout: float,
    cache_features: str | bool,
    cache_memory: int,
    balancing: Balancing | None = None,
    learning_rate: Any,
    optimizer: Any,
) -> Model:
    """Implements `transfer_model` and `multitask_model`."""
    _check_head(hidden_units, dropout)
    by_width = learning_rate is None and optimizer in ("adam", "sgd")
    if not by_width:  # raises an error before anything is built
        optimizer = make_optimizer(optimizer, 1e-3 if learning_rate is None else learning_rate)
    base, pretrained = resolve_backbone(
        backbone,
        input_shape=input_shape,
        image_size=image_size,
        weights=weights,
        backbone_kwargs=backbone_kwargs,
        pretrained=pretrained,
    )
    if not pretrained and trainable != "all":
        raise ValueError(
            "A backbone that is not pretrained must train; frozen, it is a random network. "
            f"Received: trainable={trainable!r} with "
            f"{'weights=None' if isinstance(backbone, str) else 'pretrained=False'}. Give it "
            'weights, or pass trainable="all" to train from scratch.'
        )
    chosen = choose([base], blocks_of([base]), trainable)
    model = build_model(
        base,
        new_tasks,
        input_shape=None if image_size else input_shape,
        pooling=pooling,
        augmentation=augmentation,
        hidden_units=hidden_units,
        dropout=dropout,
        cache_features=cache_features,
        cache_memory=cache_memory,
        balancing=balancing,
        single=single,
        frozen=not chosen,
    )
    freeze([base], chosen, keep_statistics=pretrained)
    reason = obstacle(model)
    if cache_features is True and reason is not None:
        raise ValueError(
            "cache_features=True needs features that are the same in every epoch. Received: a "
            f"model in which {reason}. Leave out `augmentation`, freeze the whole backbone "
            '(trainable="head"), or leave cache_features="auto".'
        )
    if by_width:
        optimizer = make_optimizer(optimizer, _default_rate(optimizer, model, frozen=not chosen))
    return compile_tasks(model, optimizer)


def _default_rate(optimizer: str, model: Model, frozen: bool) -> float:
    """Returns the default learning rate of Adam or SGD for a new model.

    A step of Adam moves each weight by about the rate, so it moves an output of a linear head by
    the rate times the number of features. The largest stable rate of SGD also depends on this
    number. The limits were chosen on validation examples.
    """
    width = model.get_layer("features").output.shape[-1]
    linear = frozen and width is not None and all(map(is_on_features, heads(model).values()))
    if optimizer == "adam":
        return min(max(0.5 / width, 3e-4), 1e-2) if linear else 1e-3
    return min(max(20 / width, 0.02), 0.3) if linear else 1e-2


def build_model(
    backbone: keras.Model,
    new_tasks: Mapping[str, Task],
    *,
    input_shape: Sequence[int | None] | None = None,
    pooling: str | None = "auto",
    augmentation: str | keras.Layer | None = None,
    hidden_units: Sequence[int] = (),
    dropout: float = 0.0,
    cache_features: str | bool = "auto",
    cache_memory: int = CACHE_MEMORY,
    balancing: Balancing | None = None,
    single: bool = True,
    frozen: bool = False,
) -> Model:
    """Returns an uncompiled model: the backbone, pooled, with one head per task.

    Args:
        backbone: a headless model with one output of rank 2, 3 or 4.
        new_tasks: the tasks by name; each head, its output and its metrics have the task's name.
        input_shape: shape of an example, if sizes of the backbone's input are undefined.
        pooling: as in `pooling.pool`.
        augmentation: preset or layer that augments the inputs during training.
        hidden_units: sizes of the dense layers (relu) of each head.
        dropout: rate of the dropout before each head's last layer.
        cache_features: whether `fit` computes frozen features once.
        cache_memory: bytes of memory for these features.
        balancing: the layer that balances the tasks, if any.
        single: whether the output is a tensor; else it is a dict by task.
        frozen: whether the backbone will be frozen. Heads of one layer then start at 0, which
            makes all classes equally probable, and scale their inputs. Defaults to False.
    """
    inputs = _inputs(backbone, input_shape)
    taken = {
        backbone.name,
        "pooling",
        "features",
        "augmentation",
        "balancing",
        *(t.name for t in keras.tree.flatten(inputs)),
    }
    if taken & set(new_tasks):
        raise ValueError(
            "The name of a task must differ from the model's other layers. Received: "
            f"{sorted(taken & set(new_tasks))}. Give the task another name."
        )
    seen = inputs
    if augmentation is not None:
        if keras.tree.is_nested(inputs):
            raise ValueError(
                "`augmentation` needs a backbone with one input. Received: the model "
                f"{backbone.name!r} with {len(backbone.inputs)} inputs."
            )
        seen = augment(inputs, augmentation)
    try:
        features = backbone(seen)
    except ValueError as error:
        raise ValueError(
            f"The backbone must be able to take `input_shape`. Received: input_shape={input_shape} "
            f"for the model {backbone.name!r}. Keras says: {error}"
        ) from error
    (features,) = keras.tree.flatten(features)
    mask = inputs.get("padding_mask") if isinstance(inputs, Mapping) else None
    features = pool(features, pooling, mask)
    features = Features(cache_features, cache_memory, name="features")(features)
    if balancing is not None:
        features = balancing(features)
    outputs = {}
    for name, task in new_tasks.items():
        x = features
        own = hidden_units if task.hidden_units is None else task.hidden_units
        for i, units in enumerate(own):
            x = keras.layers.Dense(units, activation="relu", name=f"{name}_hidden_{i}")(x)
        if dropout:
            x = keras.layers.Dropout(dropout, name=f"{name}_dropout")(x)
        linear = frozen and not own
        outputs[name] = Head(
            task,
            scales_inputs=linear and features.shape[-1] is not None,
            kernel_initializer="zeros" if linear else "glorot_uniform",
            bias_initializer=_bias(task, linear),
            name=name,
        )(x)
    return Model(inputs, next(iter(outputs.values())) if single else outputs)


def _bias(task: Task, zero_kernel: bool) -> str:
    """Returns the initializer of the bias.

    The softmax is invariant to a number that is added to all classes. With a bias of 0, the logits
    of a kernel that starts at 0 sum to 0, which `keras.wrappers.SKLearnClassifier` cannot decode.
    """
    return "ones" if zero_kernel and isinstance(task, Classification) else "zeros"


def compile_tasks(model: Model, optimizer: Any) -> Model:
    """Compiles a model with the losses and metrics of its tasks, and returns it."""
    known = tasks(model)
    losses = {name: task.make_loss() for name, task in known.items()}
    metrics = {name: task.make_metrics() for name, task in known.items()}
    weights = {name: float(task.weight) for name, task in known.items()}
    if not isinstance(model.output, Mapping):
        losses, metrics, weights = (
            next(iter(part.values())) for part in (losses, metrics, weights)
        )
    plain = all(task.weight == 1 for task in known.values())
    model.compile(
        optimizer=optimizer,
        loss=losses,
        loss_weights=None if plain else weights,
        weighted_metrics=metrics,
    )
    note_training(model)
    # Built now, so that a model that is saved before training loads without a warning.
    model.optimizer.build(model.trainable_variables)
    return model


def make_optimizer(optimizer: Any, learning_rate: Any) -> keras.optimizers.Optimizer:
    """Returns a Keras optimizer for a name, or the given optimizer unchanged.

    Args:
        optimizer: the name of a Keras optimizer, or an optimizer with its own rate.
        learning_rate: the rate, for a name.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if `optimizer` is neither a name nor an optimizer.
    """
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise TypeError(
            "`optimizer` must be the name of a Keras optimizer or an instance of one. Received: "
            f"optimizer={optimizer!r}."
        )
    if not isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        check_positive("learning_rate", learning_rate)
        learning_rate = float(learning_rate)
    known = {
        name.lower(): value
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
        and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
    }
    check_choice("optimizer", optimizer.lower(), sorted(known))
    return known[optimizer.lower()](learning_rate=learning_rate)


def _check_head(hidden_units: Any, dropout: Any) -> None:
    """Raises an error unless heads can be built from these arguments of a builder."""
    check_hidden_units(hidden_units)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(
            f"`dropout` must be a number from 0 to below 1. Received: dropout={dropout!r}."
        )


def _inputs(backbone: keras.Model, input_shape: Sequence[int | None] | None) -> Any:
    """Returns new inputs for a backbone: a tensor, or a structure of several."""
    fixed = None if input_shape is None else (None, *input_shape)

    def new(tensor: Any) -> Any:
        return keras.Input(batch_shape=fixed or tensor.shape, dtype=tensor.dtype, name=tensor.name)

    return keras.tree.map_structure(new, input_structure(backbone))
