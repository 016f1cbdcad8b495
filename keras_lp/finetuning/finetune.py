"""Fine-tuning: a trained model continues training, with lower rates for lower layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import keras

from keras_lp.backbones.blocks import below_head, blocks_of
from keras_lp.backbones.freezing import (
    Trainable,
    choose,
    freeze,
    restore_flag,
    set_trainable,
    trains_backbone,
)
from keras_lp.backbones.resolve import BackboneLike, resolve_backbone
from keras_lp.backbones.sharing import note_training
from keras_lp.finetuning.layerwise import check_layerwise
from keras_lp.finetuning.lora import LoRA, add_adapters, check_adapted, fold_adapters
from keras_lp.finetuning.rates import check_decay, decay_between, layerwise
from keras_lp.model.assemble import HEAD, build_model, compile_tasks
from keras_lp.model.optimizers import make_optimizer
from keras_lp.model.options import Options
from keras_lp.model.scaling import fold_scales
from keras_lp.tasks.classification import as_task
from keras_lp.tasks.task import TaskLike
from keras_lp.utils.arguments import check_positive
from keras_lp.utils.keras_internals import compile_arguments, sublayers


def finetune_model(
    model: BackboneLike,
    task: TaskLike | None = None,
    *,
    trainable: Trainable = "all",
    learning_rate: float
    | tuple[float, float]
    | keras.optimizers.schedules.LearningRateSchedule
    | None = None,
    layer_decay: float | None = None,
    layer_rates: Mapping[str, float] | None = None,
    lora: LoRA | None = None,
    optimizer: str | keras.optimizers.Optimizer = "adamw",
    weight_decay: float | None = 1e-4,
) -> keras.Model:
    """Recompiles a model with a learning rate per layer, and returns it.

    The head learns at `learning_rate`, the top block below it at `layer_decay` times this rate,
    the next block at `layer_decay` squared, and so on. `lp.trainable_report` shows the blocks and
    their rates. Alternatives are `learning_rate=(low, high)` and `layer_rates`. The model is
    recompiled in place; its loss and metrics are kept. BatchNormalization below the head does not
    change (statistics, scale and offset).

    A KerasHub task (`TextClassifier`, `CausalLM`, ...) also keeps its preprocessing and its
    sampler. A `CausalLM` that computes its logits from its embeddings has no head: its top block
    learns at `learning_rate`, and with `lora` only the adapters train.

    A `.keras` file of a model that keras_lp built preserves all of this. The file of a KerasHub
    task preserves the outputs, with adapters merged, and KerasHub compiles it when it loads: call
    finetune_model again. The file of any other model, as always in Keras, does not store
    which nested layers are frozen. If some are, it does not load.

    Which function to use: with 40 examples, solve the head instead (`lp.fit_head`). With 1,000,
    call `lp.fit_two_phase`, which solves the head before it trains all layers. With 50,000, call
    this function and `fit` for some epochs.

    Args:
        model: a model from any builder, or any compiled Keras model with a loss. With `task`: a
            backbone as in `lp.transfer_model`.
        task: first adds a new head for this task to a backbone, as in `lp.transfer_model`. Defaults
            to None, which keeps the model's head.
        trainable: `"all"`; a number n for the top n blocks and the head; a list of layer
            names; or `"head"`. Defaults to `"all"`.
        learning_rate: the head's rate, or its Keras schedule, for an optimizer given by name; or
            `(low, high)`, the rates of the lowest block and of the head, with geometric spacing
            between them. Defaults to None: 1e-4, or 1e-3 with `lora`.
        layer_decay: ratio of the rates of two consecutive blocks, above 0 and at most 1; 1 is
            one rate for all. Defaults to 0.7 if neither `layer_rates` nor `(low, high)` is given.
        layer_rates: rates by layer name or glob, as in `lp.layerwise`. Defaults to None.
        lora: `lp.LoRA(...)` adds low-rank adapters to the layers below the head. Only the adapters
            and the head train, all at one rate unless you pass layer rates; leave `trainable` at
            `"all"`. Defaults to None.
        optimizer: `"adamw"`, `"adam"`, `"sgd"`, `"nadam"`, `"rmsprop"`, `"adagrad"` or
            `"lion"`, or an instance of one with its own rate and decay. Defaults to `"adamw"`.
        weight_decay: decoupled weight decay for an optimizer given by name, scaled by each
            layer's rate; biases and normalisation do not decay. None turns it off. Defaults to
            1e-4.

    Returns:
        The same model (with `task`: a new one), compiled.

    Raises:
        ValueError: if the model is not compiled with a loss, a rate or decay is out of range, the
            optimizer does not support layer rates, a layer name is unknown, or nothing trains.
        TypeError: if a backbone is passed without `task`.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.transfer_model(backbone, 3)
    >>> model = lp.finetune_model(model, learning_rate=1e-3, layer_decay=0.5)
    >>> model.optimizer.multipliers              # kernel and bias of the block, then of the head
    [0.5, 0.5, 1.0, 1.0]

    References: discriminative rates, Howard and Ruder, 2018 (arXiv:1801.06146); layer decay,
    Clark et al., 2020 (arXiv:2003.10555); LoRA, Hu et al., 2021 (arXiv:2106.09685).
    """
    if learning_rate is None:
        learning_rate = 1e-4 if lora is None else 1e-3
    low, high = _low_high(learning_rate)
    if (layer_decay, layer_rates, low).count(None) < 2:
        raise ValueError(
            "Pass the layers' rates in one way: `layer_decay`, `layer_rates` or "
            f"`learning_rate=(low, high)`. Received: layer_decay={layer_decay!r}, "
            f"layer_rates={layer_rates!r}, learning_rate={learning_rate!r}."
        )
    if layer_decay is not None:
        check_decay(layer_decay)
    _check_lora(lora, trainable)
    base_optimizer = _with_decay(optimizer, high, weight_decay)
    check_layerwise(base_optimizer)
    if task is not None:
        base, _ = resolve_backbone(model, trains=trains_backbone(trainable))
        model = compile_tasks(build_model(base, {HEAD: as_task(task)}, Options()), "sgd")
    model = _check_compiled(model)

    below = below_head(model)
    blocks = blocks_of(below)
    chosen = choose(below, blocks, trainable)  # may raise an error, so before any change
    flags = [(layer, layer.trainable) for layer in sublayers(model)]
    if lora is not None:
        add_adapters(model, lora)
    else:
        set_trainable(model, True)
        freeze(below, chosen, keep_statistics=True)
    if low is not None:
        layer_decay = decay_between(model, low, high)
    elif layer_decay is None and layer_rates is None:
        layer_decay = 0.7 if lora is None else 1.0
    try:
        _check_trains(model, trainable)
        made = layerwise(base_optimizer, model, layer_decay=layer_decay, layer_rates=layer_rates)
    except ValueError:
        for layer, flag in flags:
            restore_flag(layer, flag)
        raise
    if any(layer.trainable_variables for layer in below):
        fold_scales(model)
    return _recompile(model, made)


def merge_adapters(model: keras.Model) -> keras.Model:
    """Merges the adapters of a model into its kernels, removes them, and returns the model.

    The outputs do not change. The model is recompiled in place with only its head trainable;
    call `finetune_model` to train other layers.

    Args:
        model: a model with adapters, from `finetune_model(..., lora=...)`.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no adapters.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16)])
    >>> model = lp.finetune_model(lp.transfer_model(backbone, 3), lora=lp.LoRA(rank=2))
    >>> model = lp.merge_adapters(model)
    >>> [v.name for v in model.trainable_variables]
    ['kernel', 'bias']

    Reference: Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models
    (arXiv:2106.09685).
    """
    check_adapted(model)
    fold_adapters(model)
    set_trainable(model, True)
    freeze(below_head(model), set(), keep_statistics=True)
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return _recompile(model, layerwise(optimizer, model, layer_decay=1.0))


def _recompile(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """Compiles a model with another optimizer and otherwise as before."""
    arguments = {**compile_arguments(model), "optimizer": optimizer}
    if "sampler" in inspect.signature(model.compile).parameters:  # set by KerasHub, not by Keras
        arguments["sampler"] = model.sampler
    model.compile(**arguments)
    note_training(model)
    model.optimizer.build(model.trainable_variables)
    return model


def _check_trains(model: keras.Model, trainable: Any) -> None:
    if not model.trainable_variables:
        raise ValueError(
            "At least one layer must train. Received: "
            f"trainable={trainable!r}, and {model.name!r} has no weights there; a language model "
            "that computes its logits from its embeddings has no head. Choose blocks: "
            "finetune_model(model, trainable=1)."
        )


def _check_lora(lora: Any, trainable: Any) -> None:
    if lora is not None and not isinstance(lora, LoRA):
        raise TypeError(f"`lora` must be an lp.LoRA(...) or None. Received: lora={lora!r}.")
    if lora is not None and trainable != "all":
        raise ValueError(
            "With `lora` only the adapters and the head train. Received: "
            f"trainable={trainable!r}. Leave it out; `lp.LoRA(layers=[...])` chooses layers."
        )


def _low_high(learning_rate: Any) -> tuple[float | None, Any]:
    """Returns the lowest rate, if `learning_rate` contains one, and the head's rate."""
    if not isinstance(learning_rate, (tuple, list)):
        return None, learning_rate
    if len(learning_rate) != 2:
        raise ValueError(
            "`learning_rate` must be a rate, a schedule or (low, high). Received: "
            f"learning_rate={learning_rate!r}."
        )
    low, high = learning_rate
    for rate in learning_rate:
        check_positive("learning_rate", rate)
    if low > high:
        raise ValueError(
            "`learning_rate=(low, high)` goes from the lowest block's rate to the head's, so low "
            f"must be at most high. Received: learning_rate={learning_rate!r}."
        )
    return low, high


def _with_decay(optimizer: Any, learning_rate: Any, weight_decay: Any) -> Any:
    made = make_optimizer(optimizer, learning_rate)
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return made
    number = isinstance(weight_decay, (int, float))
    if weight_decay is not None and not (number and weight_decay >= 0):
        raise ValueError(
            "`weight_decay` must be None or a number of 0 or more. Received: "
            f"weight_decay={weight_decay!r}."
        )
    decoupled_only = isinstance(made, keras.optimizers.AdamW)  # it does not accept None
    decay = 0.0 if weight_decay is None and decoupled_only else weight_decay
    return type(made).from_config({**made.get_config(), "weight_decay": decay})


def _check_compiled(model: Any) -> keras.Model:
    """Returns the model; raises unless it can be compiled again."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            "finetune_model without `task` takes a compiled Keras model. Received: "
            f"model={model!r}. Pass the task to predict: finetune_model(backbone, task)."
        )
    if not model.compiled or getattr(model, "loss", None) is None:
        raise ValueError(
            "finetune_model takes a model that is compiled with a loss, which it keeps. "
            f"Received: model {model.name!r}, which is not. Call model.compile(loss=...), or add "
            "a new head to a headless model: finetune_model(model, task)."
        )
    if not model.built:
        raise ValueError(
            "finetune_model takes a model with weights. Received: model "
            f"{model.name!r}, which is not built. Call it on a batch first."
        )
    return model
