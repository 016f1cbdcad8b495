"""Fine-tuning: a trained model learns on, its lower layers slower."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import keras

from keras_lp.backbones.blocks import below_head, blocks_of
from keras_lp.backbones.freezing import Trainable, choose, freeze, restore_flag, set_trainable
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

    The head learns at `learning_rate`, the top block below it at `layer_decay` times that, the
    next at `layer_decay` squared, and so on down; `lp.trainable_report` shows the blocks and their
    rates. Other ways to say it: `learning_rate=(low, high)` and `layer_rates`. The model is
    recompiled in place; its loss and metrics stay. BatchNormalization below the head stays as it
    is, statistics, scale and offset.

    A task of KerasHub (`TextClassifier`, `CausalLM`, ...) keeps its preprocessing and its sampler
    too. A `CausalLM` whose embeddings also give its logits has no head: its top block learns at
    `learning_rate`, and with `lora` the adapters train alone.

    A `.keras` file of a model that keras_lp built keeps all of this. One of a KerasHub task keeps
    the outputs, with adapters folded in, and comes back as KerasHub compiles it: call
    finetune_model again. One of another model forgets which layers inside a layer of layers are
    frozen, as Keras does, and then does not load.

    With 40 examples solve the head instead (`lp.fit_head`); with 1,000 call `lp.fit_two_phase`,
    which solves the head before all layers train; with 50,000 call this and `fit` for some epochs.

    Args:
        model: a model from any builder, or any compiled Keras model with a loss. With `task`: a
            backbone as in `lp.transfer_model`.
        task: gives a backbone a new head for this task first, as `lp.transfer_model` does. Defaults
            to None, which keeps the model's head.
        trainable: `"all"`; a number n for the top n blocks besides the head; a list of layer
            names; or `"head"`. Defaults to `"all"`.
        learning_rate: the head's rate, or a Keras schedule of it, for an optimizer given by
            name; or `(low, high)`, of the lowest block and of the head, with the blocks between
            spread geometrically. Defaults to None: 1e-4, with `lora` 1e-3.
        layer_decay: ratio of the rates of two neighbouring blocks, above 0 and at most 1; 1 is
            one rate for all. Defaults to 0.7, where neither `layer_rates` nor `(low, high)` is
            given.
        layer_rates: rates by name or glob of layers, as in `lp.layerwise`. Defaults to None.
        lora: `lp.LoRA(...)` puts low-rank adapters on the layers below the head; they and the
            head train, all at one rate unless said otherwise, and nothing else does (`trainable`
            is then left at `"all"`). Defaults to None.
        optimizer: `"adamw"`, `"adam"`, `"sgd"`, `"nadam"`, `"rmsprop"`, `"adagrad"` or
            `"lion"`, or an instance of one with a rate and a decay of its own. Defaults to
            `"adamw"`.
        weight_decay: decoupled weight decay for an optimizer given by name, scaled by each
            layer's rate; biases and normalisation do not decay. None is off. Defaults to 1e-4.

    Returns:
        The same model (with `task`: a new one), compiled.

    Raises:
        ValueError: a model that is not compiled with a loss; a rate or decay out of range; an
            optimizer without layerwise rates; a layer name that is not there; nothing to train.
        TypeError: a backbone without `task`.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.transfer_model(backbone, 3)
    >>> model = lp.finetune_model(model, learning_rate=1e-3, layer_decay=0.5)
    >>> model.optimizer.multipliers              # kernel and bias of the block, then of the head
    [0.5, 0.5, 1.0, 1.0]

    References: discriminative rates, Howard and Ruder, 2018 (arXiv:1801.06146); layer decay,
    Clark et al., 2020 (arXiv:2003.10555).
    """
    if learning_rate is None:
        learning_rate = 1e-4 if lora is None else 1e-3
    low, high = _low_high(learning_rate)
    if (layer_decay, layer_rates, low).count(None) < 2:
        raise ValueError(
            "Give the layers' rates in one way: `layer_decay`, `layer_rates` or "
            f"`learning_rate=(low, high)`. Received: layer_decay={layer_decay!r}, "
            f"layer_rates={layer_rates!r}, learning_rate={learning_rate!r}."
        )
    if layer_decay is not None:
        check_decay(layer_decay)
    _check_lora(lora, trainable)
    base_optimizer = _with_decay(optimizer, high, weight_decay)
    check_layerwise(base_optimizer)
    if task is not None:
        base, _ = resolve_backbone(model, trains=trainable not in ("head", 0))
        model = compile_tasks(build_model(base, {HEAD: as_task(task)}, Options()), "sgd")
    model = _check_compiled(model)

    below = below_head(model)
    blocks = blocks_of(below)
    chosen = choose(below, blocks, trainable)  # before anything changes: it may refuse
    flags = [(layer, layer.trainable) for layer in model._flatten_layers()]
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
    """Folds the adapters of a model into its kernels, removes them, and returns the model.

    The outputs stay the same. The model is recompiled in place, with its head trainable and
    nothing else; `finetune_model` lets it train on.

    Args:
        model: a model with adapters, from `finetune_model(..., lora=...)`.

    Raises:
        ValueError: a model without adapters.

    Example:

    ```python
    lp.export_tflite(lp.merge_adapters(model), "model.tflite")
    ```
    """
    check_adapted(model)
    fold_adapters(model)
    set_trainable(model, True)
    freeze(below_head(model), set(), keep_statistics=True)
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return _recompile(model, layerwise(optimizer, model, layer_decay=1.0))


def _recompile(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """Compiles a model with another optimizer and all else as before."""
    arguments = {**model._compile_config.config, "optimizer": optimizer}
    if "sampler" in inspect.signature(model.compile).parameters:  # of KerasHub, unknown to Keras
        arguments["sampler"] = model.sampler
    model.compile(**arguments)
    note_training(model)
    model.optimizer.build(model.trainable_variables)
    return model


def _check_trains(model: keras.Model, trainable: Any) -> None:
    if not model.trainable_variables:
        raise ValueError(
            "Something must train. Received: "
            f"trainable={trainable!r}, and {model.name!r} has no weights there; a language model "
            "whose embeddings also give its logits has no head. Say which blocks: "
            "finetune_model(model, trainable=1)."
        )


def _check_lora(lora: Any, trainable: Any) -> None:
    if lora is not None and not isinstance(lora, LoRA):
        raise TypeError(f"`lora` must be an lp.LoRA(...) or None. Received: lora={lora!r}.")
    if lora is not None and trainable != "all":
        raise ValueError(
            "With `lora` the adapters and the head train. Received: "
            f"trainable={trainable!r}. Leave it out; `lp.LoRA(layers=[...])` chooses layers."
        )


def _low_high(learning_rate: Any) -> tuple[float | None, Any]:
    """Returns the lowest rate, if `learning_rate` gives one, and the head's."""
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
            f"is at most high. Received: learning_rate={learning_rate!r}."
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
    decoupled_only = isinstance(made, keras.optimizers.AdamW)  # it refuses None
    decay = 0.0 if weight_decay is None and decoupled_only else weight_decay
    return type(made).from_config({**made.get_config(), "weight_decay": decay})


def _check_compiled(model: Any) -> keras.Model:
    """Returns the model; raises unless it can be compiled again."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            "finetune_model without `task` takes a compiled Keras model. Received: "
            f"model={model!r}. Say what to predict: finetune_model(backbone, task)."
        )
    if not model.compiled or getattr(model, "loss", None) is None:
        raise ValueError(
            "finetune_model takes a model that is compiled with a loss, which it keeps. "
            f"Received: model {model.name!r}, which is not. Call model.compile(loss=...), or give "
            "a headless model a new head: finetune_model(model, task)."
        )
    if not model.built:
        raise ValueError(
            "finetune_model takes a model with weights. Received: model "
            f"{model.name!r}, which is not built. Call it on a batch first."
        )
    return model
