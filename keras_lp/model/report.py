"""Reports which parts of a model train, and at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_lp.backbones.blocks import below_head, blocks_of, head_layers
from keras_lp.model.optimizers import reference_rate
from keras_lp.utils.text_table import text_table


def trainable_report(model: keras.Model, print_fn: Callable[[str], Any] = print) -> None:
    """Prints the trainable parameters: one line per block, from the input to the head, and the sum.

    Blocks are the units that `trainable=n` counts and to which layer decay assigns rates. The rate
    is that of the compiled optimizer, of a schedule its peak; it is not shown if the model is not
    compiled. If the backbone outputs a feature map, another line tells how it becomes a vector.

    Args:
        model: a built Keras model.
        print_fn: function that receives the text. Defaults to `print`.

    Raises:
        ValueError: if the model is not built.

    Example:

    >>> import keras, keras_lp as lp
    >>> layers = [keras.layers.Dense(16, name="block1"), keras.layers.Dense(8, name="block2")]
    >>> model = lp.transfer_model(keras.Sequential([keras.Input((4,)), *layers]), 3)
    >>> lp.trainable_report(model)
    block        parameters  trainable  learning rate
    block1               80     frozen              -
    block2              136     frozen              -
    predictions          27         27           0.01
    trainable parameters: 27 of 243, 11.11 %
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            "trainable_report takes a Keras model with weights. Received: "
            f"{model!r}. First call it on a batch, or give it an `Input`."
        )
    blocks = blocks_of(below_head(model))
    rates = _rates(model)
    rows = [("block", "parameters", "trainable", "learning rate")]
    rows += [_row(block, rates) for block in [*blocks, *([leaf] for leaf in head_layers(model))]]
    total, trains = _count(model.weights), _count(model.trainable_weights)
    share = 100 * trains / max(total, 1)
    lines = [text_table(rows, left=1), *_pooling(model)]
    lines.append(f"trainable parameters: {trains:,} of {total:,}, {share:.2f} %")
    print_fn("\n".join(lines))


def _pooling(model: keras.Model) -> list[str]:
    """Returns a line on the pooling of a model from a builder, if it pools."""
    layer = next((layer for layer in model.layers if layer.name == "pooling"), None)
    if layer is None:
        return []
    first, *_ = keras.tree.flatten(layer.input)
    sizes = " x ".join("?" if size is None else str(size) for size in first.shape[1:])
    if isinstance(layer, keras.layers.Flatten):
        return [f"features: {sizes}, flattened to {layer.output.shape[-1]:,}"]
    largest = "Max" in type(layer).__name__ or getattr(layer, "mode", "") == "max"
    return [f"features: {sizes}, the {'maximum' if largest else 'average'} of each channel"]


def _row(block: Sequence[keras.Layer], rates: dict[int, float]) -> tuple[str, str, str, str]:
    names = [layer.name for layer in block]
    weights = [weight for layer in block for weight in layer.weights]
    trainable = [weight for layer in block for weight in layer.trainable_weights]
    own = sorted({rates[id(weight)] for weight in trainable if id(weight) in rates})
    return (
        names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
        f"{_count(weights):,}",
        f"{_count(trainable):,}" if trainable else "frozen",
        " to ".join(f"{rate:.3g}" for rate in {own[0]: 0, own[-1]: 0}) if own else "-",
    )


def _rates(model: keras.Model) -> dict[int, float]:
    """Returns the learning rate of each trainable variable by its id."""
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if optimizer is None or isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return {}  # the last has a rate for each of its optimizers
    rate = reference_rate(optimizer)
    variables = model.trainable_variables
    multipliers = getattr(optimizer, "multipliers", None) or [1.0] * len(variables)
    return {id(v): rate * m for v, m in zip(variables, multipliers, strict=True)}


def _count(weights: Sequence[Any]) -> int:
    """Counts parameters, without the scaling of a head's inputs."""
    scales = ("input_mean", "input_scale")
    return sum(math.prod(weight.shape) for weight in weights if weight.name not in scales)
