"""Freezing: the only place that sets `trainable`.

BatchNormalization layers of a pretrained part never update their statistics, whether frozen or
fine-tuned. In Keras only `trainable=False` on the layer itself ensures this (`fit` overrides the
`training` argument of a nested model), so these layers always stay frozen. All other frozen
layers run in inference mode too: a frozen Dropout is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import keras

from keras_lp.utils.keras_internals import (
    Functional,
    direct_sublayers,
    graph_of,
    own_trainable_variables,
    run_through_graph,
    standardize_inputs,
    sublayers,
    takes_training,
)
from keras_lp.utils.names import near

Part = Literal["head", "all"]
# A part, the number of top blocks, or layer names. `Sequence[str]` would accept a misspelt part.
Trainable = Part | int | list[str] | tuple[str, ...]


def leaf_layers(layer: keras.Layer) -> Iterator[keras.Layer]:
    """Yields the layers of a model in order, with nested models replaced by their layers.

    A layer that is a stack of numbered blocks, such as a transformer encoder, counts as a model.
    """
    if isinstance(layer, keras.Model):
        for inner in layer.layers:
            yield from leaf_layers(inner)
    elif _is_stack(layer):
        yield from direct_sublayers(layer)
    else:
        yield layer


def _is_stack(layer: keras.Layer) -> bool:
    """Whether a layer contains two or more numbered composite layers of the same class."""
    numbered = [
        type(inner)
        for inner in direct_sublayers(layer)
        if direct_sublayers(inner) and inner.name[-1:].isdigit()
    ]
    own = sum(len(inner.weights) for inner in direct_sublayers(layer)) == len(layer.weights)
    return own and any(numbered.count(kind) > 1 for kind in numbered)


def set_trainable(layer: keras.Layer, value: bool) -> None:
    """Sets the flag of a layer and of everything inside it.

    It sets each flag separately: `layer.trainable = value` does not reach the inner layers if
    the layer itself already has this value.
    """
    for inner in sublayers(layer):
        restore_flag(inner, value)


def restore_flag(layer: keras.Layer, value: bool) -> None:
    """Sets the flag of one layer and its own variables, whatever their previous values.

    In a layer with adapters (LoRA), only the adapters train.
    """
    layer.trainable = not value
    layer.trainable = value
    if getattr(layer, "lora_enabled", False):
        for variable in own_trainable_variables(layer):
            variable.trainable = value and variable.name.startswith("lora_")


def freeze(below: Sequence[keras.Layer], chosen: set[int], *, keep_statistics: bool) -> None:
    """Sets `trainable` below the head. The caller must compile afterwards.

    Args:
        below: the layers below the head (models count as layers).
        chosen: ids of the layers that train, from `choose`.
        keep_statistics: whether BatchNormalization layers stay frozen in inference mode.
    """
    for layer in below:
        set_trainable(layer, bool(chosen))  # inner layers train only if the model is trainable
    for layer in below:
        whole = all(id(leaf) in chosen for leaf in leaf_layers(layer))
        for inner in sublayers(layer):
            if isinstance(inner, keras.Model):  # the model's own weights, outside its layers
                for variable in own_trainable_variables(inner):
                    variable.trainable = whole
    for leaf in (leaf for layer in below for leaf in leaf_layers(layer)):
        set_trainable(leaf, id(leaf) in chosen)
        if keep_statistics:
            for inner in sublayers(leaf):
                if isinstance(inner, keras.layers.BatchNormalization):
                    set_trainable(inner, False)


def trains_backbone(trainable: Any) -> bool:
    """Whether a value of `trainable` lets any layer below the head train."""
    return trainable not in ("head", 0, [], ())


def choose(
    below: Sequence[keras.Layer], blocks: Sequence[Sequence[keras.Layer]], trainable: Any
) -> set[int]:
    """Returns the ids of the leaf layers that train.

    Args:
        below: the layers below the head (models count as layers).
        blocks: groups of their leaf layers, from the bottom to the top.
        trainable: `"head"` chooses none of them, `"all"` chooses all, a number n chooses the top
            n blocks, and a list of names chooses these layers.

    Raises:
        ValueError: if there are fewer blocks, or no layer has a name.
        TypeError: if `trainable` is anything else.
    """
    leaves = [leaf for layer in below for leaf in leaf_layers(layer)]
    if isinstance(trainable, str) and trainable in get_args(Part):
        return {id(leaf) for leaf in leaves} if trainable == "all" else set()
    if isinstance(trainable, int) and not isinstance(trainable, bool):
        if not 0 <= trainable <= len(blocks):
            raise ValueError(
                "`trainable` as a number counts blocks from the top, from 0 to the number of "
                f"blocks below the head. Received: trainable={trainable}, and there are "
                f"{len(blocks)} blocks."
            )
        if not trainable:
            return set()
        # Includes layers without weights, such as a Dropout, between the layers of these blocks.
        chosen = {id(layer) for block in blocks[len(blocks) - trainable :] for layer in block}
        below_top = {id(layer) for block in blocks[: len(blocks) - trainable] for layer in block}
        lowest = min(i for i, leaf in enumerate(leaves) if id(leaf) in chosen)
        return {id(leaf) for leaf in leaves[lowest:]} - below_top
    if isinstance(trainable, Sequence) and not isinstance(trainable, str):
        names = {leaf.name for leaf in leaves}
        for name in trainable:
            if name not in names:
                raise ValueError(
                    "`trainable` must name layers below the head, including those inside nested "
                    f"models. Received: {name!r}, and no such layer has that name."
                    f"{near(str(name), names)}"
                )
        return {id(leaf) for leaf in leaves if leaf.name in trainable}
    raise TypeError(
        '`trainable` must be "head", "all", a number of blocks from the top or a list of layer '
        f"names. Received: trainable={trainable!r}."
    )


def is_frozen(layer: keras.Layer) -> bool:
    """Whether a layer has no trainable layer or weight inside it."""
    return not any(inner.trainable for inner in sublayers(layer))


def run_layer(operation: Any, training: bool | None) -> Callable[..., Any]:
    """Returns a function that runs an operation of a graph, frozen layers in inference mode.

    Keras passes `training=True` to all of them, so Dropout in a frozen model would be active.
    The frozen part of a partly frozen nested Functional or Sequential model runs in inference
    mode. A model with its own `call` runs in inference mode only if it is fully frozen.
    """
    if not isinstance(operation, keras.Layer):
        return operation
    training = bool(training) and not is_frozen(operation)
    graph = operation
    if type(operation).call is keras.Sequential.call:
        graph = graph_of(operation)

    def run(*args: Any, **kwargs: Any) -> Any:
        # This graph can be inspected; a model with its own `call` runs as a whole.
        plain = isinstance(graph, Functional) and type(graph).call is Functional.call
        if training and plain and kwargs.get("mask") is None:
            return run_graph(graph, args[0], training)
        if takes_training(operation):
            kwargs["training"] = training
        return operation(*args, **kwargs)

    return run


def run_graph(model: Functional, inputs: Any, training: bool | None) -> Any:
    """Runs a Functional model with its frozen layers in inference mode."""
    outputs = run_through_graph(
        model, standardize_inputs(model, inputs), lambda operation: run_layer(operation, training)
    )
    single = isinstance(outputs, (list, tuple)) and len(outputs) == 1
    return outputs[0] if single else outputs
