"""Builds and compiles a model from a backbone, pooling and one head per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lp.backbones.blocks import blocks_of
from keras_lp.backbones.features import Features, obstacle
from keras_lp.backbones.freezing import choose, freeze, trains_backbone
from keras_lp.backbones.images import augment
from keras_lp.backbones.pooling import pool
from keras_lp.backbones.resolve import BackboneLike, resolve_backbone
from keras_lp.backbones.sharing import note_training
from keras_lp.balancing.ways import Balancing
from keras_lp.model.model import Model, input_structure
from keras_lp.model.options import Options
from keras_lp.model.scaling import is_on_features
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import Head, heads, tasks
from keras_lp.tasks.task import Task

HEAD = "predictions"  # the name of the head of a model with one task


def build_and_compile(
    backbone: BackboneLike,
    new_tasks: Mapping[str, Task],
    options: Options,
    *,
    single: bool,
    balancing: Balancing | None = None,
) -> Model:
    """Implements `transfer_model` and `multitask_model`.

    Args:
        backbone: as in `lp.transfer_model`.
        new_tasks: as in `build_model`.
        options: the arguments that both builders share.
        single: as in `build_model`.
        balancing: as in `build_model`.
    """
    base, pretrained = resolve_backbone(
        backbone,
        input_shape=options.input_shape,
        image_size=options.image_size,
        weights=options.weights,
        backbone_kwargs=options.backbone_kwargs,
        pretrained=options.pretrained,
        trains=trains_backbone(options.trainable),
    )
    if not pretrained and options.trainable != "all":
        raise ValueError(
            "A backbone that is not pretrained must train; frozen, it is a random network. "
            f"Received: trainable={options.trainable!r} with "
            f"{'weights=None' if isinstance(backbone, str) else 'pretrained=False'}. Give it "
            'weights, or pass trainable="all" to train from scratch.'
        )
    chosen = choose([base], blocks_of([base]), options.trainable)
    model = build_model(
        base, new_tasks, options, balancing=balancing, single=single, frozen=not chosen
    )
    freeze([base], chosen, keep_statistics=pretrained)
    reason = obstacle(model)
    if options.cache_features is True and reason is not None:
        raise ValueError(
            "cache_features=True needs features that are the same in every epoch. Received: a "
            f"model in which {reason}. Leave out `augmentation`, freeze the whole backbone "
            '(trainable="head"), or leave cache_features="auto".'
        )
    rate = _default_rate(options.optimizer, model, frozen=not chosen)
    return compile_tasks(model, options.make_optimizer(rate))


def _default_rate(optimizer: Any, model: Model, frozen: bool) -> float:
    """Returns the default learning rate of an optimizer given by name for a new model.

    A step of Adam moves each weight by about the rate, so it moves an output of a linear head by
    the rate times the number of features. The largest stable rate of SGD also depends on this
    number. The limits were chosen on validation examples.
    """
    width = model.get_layer("features").output.shape[-1]
    linear = frozen and width is not None and all(map(is_on_features, heads(model).values()))
    if optimizer == "adam":
        return min(max(0.5 / width, 3e-4), 1e-2) if linear else 1e-3
    if optimizer == "sgd":
        return min(max(20 / width, 0.02), 0.3) if linear else 1e-2
    return 1e-3


def build_model(
    backbone: keras.Model,
    new_tasks: Mapping[str, Task],
    options: Options,
    *,
    balancing: Balancing | None = None,
    single: bool = True,
    frozen: bool = False,
) -> Model:
    """Returns an uncompiled model: the backbone, pooled, with one head per task.

    Args:
        backbone: a headless model with one output of rank 2, 3 or 4.
        new_tasks: the tasks by name; each head, its output and its metrics have the task's name.
        options: the arguments that both builders share; used here are those on inputs, pooling,
            augmentation, the layers of the heads and caching.
        balancing: the layer that balances the tasks, if any.
        single: whether the output is a tensor; else it is a dict by task.
        frozen: whether the backbone will be frozen. Heads of one layer then start at 0, which
            makes all classes equally probable, and scale their inputs. Defaults to False.
    """
    input_shape = None if options.image_size else options.input_shape
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
    if options.augmentation is not None:
        if keras.tree.is_nested(inputs):
            raise ValueError(
                "`augmentation` needs a backbone with one input. Received: the model "
                f"{backbone.name!r} with {len(backbone.inputs)} inputs."
            )
        seen = augment(inputs, options.augmentation)
    try:
        features = backbone(seen)
    except ValueError as error:
        raise ValueError(
            f"The backbone must be able to take `input_shape`. Received: input_shape={input_shape} "
            f"for the model {backbone.name!r}. Keras says: {error}"
        ) from error
    (features,) = keras.tree.flatten(features)
    mask = inputs.get("padding_mask") if isinstance(inputs, Mapping) else None
    features = pool(features, options.pooling, mask)
    features = Features(options.cache_features, options.cache_memory, name="features")(features)
    if balancing is not None:
        features = balancing(features)
    outputs = {}
    for name, task in new_tasks.items():
        x = features
        own = options.hidden_units if task.hidden_units is None else task.hidden_units
        for i, units in enumerate(own):
            x = keras.layers.Dense(units, activation="relu", name=f"{name}_hidden_{i}")(x)
        if options.dropout:
            x = keras.layers.Dropout(options.dropout, name=f"{name}_dropout")(x)
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
    losses: Any = {name: task.make_loss() for name, task in known.items()}
    metrics: Any = {name: task.make_metrics() for name, task in known.items()}
    weights: Any = {name: float(task.weight) for name, task in known.items()}
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


def _inputs(backbone: keras.Model, input_shape: Sequence[int | None] | None) -> Any:
    """Returns new inputs for a backbone: a tensor, or a structure of several."""
    fixed = None if input_shape is None else (None, *input_shape)

    def new(tensor: Any) -> Any:
        return keras.Input(batch_shape=fixed or tensor.shape, dtype=tensor.dtype, name=tensor.name)

    return keras.tree.map_structure(new, input_structure(backbone))
