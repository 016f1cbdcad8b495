"""Learning rates of a model's layers, as ratios to the optimizer's rate."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lp.backbones.blocks import below_head, blocks_of, head_layers
from keras_lp.backbones.freezing import leaf_layers
from keras_lp.finetuning.layerwise import with_multipliers
from keras_lp.model.optimizers import reference_rate
from keras_lp.utils.arguments import check_positive
from keras_lp.utils.names import near


def layerwise(
    optimizer: keras.optimizers.Optimizer,
    model: keras.Model,
    *,
    layer_decay: float | None = None,
    layer_rates: Mapping[str, float] | None = None,
) -> keras.optimizers.Optimizer:
    """Returns an optimizer with the same settings and a learning rate for each layer of a model.

    The rates are stored as ratios to the optimizer's rate, so schedules and callbacks change all
    of them together. The clip norm is computed over all layers. Weight decay is scaled by a
    layer's rate, and is off for biases and normalisation. Compile the model with the returned
    optimizer; create a new one after `trainable` flags change.

    Args:
        optimizer: an SGD, Adam, AdamW, Nadam, RMSprop, Adagrad or Lion of Keras. Its state is not
            copied.
        model: a built Keras model whose `trainable` flags are set.
        layer_decay: block i from the top learns at `layer_decay**i` times the optimizer's rate,
            which is that of the head (i = 0). Above 0 and at most 1.
        layer_rates: rates by layer name or glob; the first match counts, such as
            `{"head": 1e-3, "block_1*": 1e-5, "*": 1e-4}`. `"head"` means the layers above the
            backbone. If the optimizer's rate is a schedule, they are the rates at its peak:
            its `warmup_target` if it has one, else its first value.

    Returns:
        An unbuilt optimizer for the model's trainable variables.

    Raises:
        ValueError: if the optimizer is of another kind, both or none of `layer_decay` and
            `layer_rates` are given, a rate is out of range, a layer matches no pattern, or a
            pattern matches no layer.

    Example:

    >>> import keras, keras_lp as lp
    >>> layers = [keras.layers.Dense(8, name="low"), keras.layers.Dense(2, name="high")]
    >>> model = keras.Sequential([keras.Input((4,)), *layers])
    >>> optimizer = lp.layerwise(keras.optimizers.SGD(0.1), model, layer_decay=0.5)
    >>> model.compile(optimizer, "mse")
    >>> lp.trainable_report(model)
    block  parameters  trainable  learning rate
    low            40         40           0.05
    high           18         18            0.1
    trainable parameters: 58 of 58, 100.00 %

    References: Howard and Ruder, 2018 (arXiv:1801.06146); Clark et al., 2020 (arXiv:2003.10555).
    """
    if (layer_decay is None) == (layer_rates is None):
        raise ValueError(
            "layerwise takes either `layer_decay` or `layer_rates`. Received: "
            f"layer_decay={layer_decay!r}, layer_rates={layer_rates!r}. Pass exactly one of them."
        )
    if layer_decay is not None:
        multipliers = decayed(model, layer_decay)
    else:
        reference = reference_rate(optimizer)
        multipliers = [rate / reference for rate in _matched(model, layer_rates)]
    return with_multipliers(optimizer, multipliers)


def decayed(model: keras.Model, layer_decay: float) -> list[float]:
    """Returns `layer_decay**i` for each trainable variable, where i is its block from the top."""
    check_decay(layer_decay)
    return [layer_decay**depth for depth in depths(model)]


def depths(model: keras.Model) -> list[int]:
    """Returns the block of each trainable variable, counted from the top.

    The head is 0; if the model has no head, the top block is.
    """
    below = below_head(model)
    blocks = blocks_of(below)
    top = 1 if head_layers(model) else 0
    found = {
        id(variable): depth
        for depth, block in enumerate(reversed(blocks), start=top)
        for layer in block
        for variable in layer.variables
    }
    for layer in below:  # a model's own weights, outside its layers, are at the bottom
        for variable in layer.variables:
            found.setdefault(id(variable), top + max(0, len(blocks) - 1))
    return [found.get(id(variable), 0) for variable in model.trainable_variables]


def check_decay(layer_decay: Any) -> None:
    """Raises `ValueError` unless `layer_decay` is above 0 and at most 1."""
    check_positive("layer_decay", layer_decay)
    if layer_decay > 1:
        raise ValueError(
            f"`layer_decay` must be above 0 and at most 1. Received: layer_decay={layer_decay!r}."
        )


def decay_between(model: keras.Model, low: float, high: float) -> float:
    """Returns the decay that gives the head the rate `high` and the lowest block `low`."""
    blocks = blocks_of(below_head(model))
    steps = len(blocks) if head_layers(model) else len(blocks) - 1
    return (low / high) ** (1 / max(steps, 1))


def _matched(model: keras.Model, layer_rates: Any) -> list[float]:
    """Returns the rate of each trainable variable from rates by name or glob."""
    if not isinstance(layer_rates, Mapping) or not layer_rates:
        raise ValueError(
            "`layer_rates` must be a dict of rates by layer name or glob. Received: "
            f"layer_rates={layer_rates!r}."
        )
    for pattern, rate in layer_rates.items():
        check_positive(f"layer_rates[{pattern!r}]", rate)
    below = {id(layer) for part in below_head(model) for layer in leaf_layers(part)}
    rates: dict[int, float] = {}
    used: set[str] = set()
    unmatched = []
    names = []
    for layer in leaf_layers(model):
        if not layer.weights:
            continue
        names.append(layer.name)
        fits = [
            pattern
            for pattern in layer_rates
            if fnmatch.fnmatchcase(layer.name, pattern)
            or (pattern == "head" and id(layer) not in below)
        ]
        used.update(fits)
        if fits:
            rates.update({id(v): layer_rates[fits[0]] for v in layer.variables})
        elif layer.trainable_weights:
            unmatched.append(layer.name)
    idle = [pattern for pattern in layer_rates if pattern not in used]
    if idle:
        raise ValueError(
            "Each pattern of `layer_rates` must match a layer. Received: "
            f"{idle}, which match nothing.{near(idle[0], names)} The layers are "
            f"{_listed(names)}; the head is 'head'."
        )
    missing = [v.path for v in model.trainable_variables if id(v) not in rates]
    if unmatched or missing:
        raise ValueError(
            "Each trainable layer must match a pattern of `layer_rates`. Received: "
            f"{list(layer_rates)}, and nothing matches {_listed(unmatched or missing)}. Add a "
            "last pattern for the others: '*'."
        )
    return [rates[id(v)] for v in model.trainable_variables]


def _listed(names: Sequence[str]) -> str:
    return f"{list(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
