"""Freezing: the only place that sets `trainable`.

A pretrained part never updates the statistics of its BatchNormalization layers, neither frozen
nor fine-tuned. In Keras only `trainable=False` on the layer itself ensures that (the `training`
argument given to a nested model is overridden by `fit`), so these layers stay frozen throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_lp.checks import near

# "head", "all", the number of top blocks, or names of layers.
Trainable = str | int | Sequence[str]


def leaf_layers(layer: keras.Layer) -> Iterator[keras.Layer]:
    """Yields the layers of a model in order, those of nested models in place of the models."""
    if not isinstance(layer, keras.Model):
        yield layer
        return
    for inner in layer.layers:
        yield from leaf_layers(inner)


def freeze(
    backbone: Sequence[keras.Layer],
    blocks: Sequence[Sequence[keras.Layer]],
    trainable: Trainable,
    *,
    keep_statistics: bool,
) -> None:
    """Sets `trainable` in a backbone. The caller compiles afterwards.

    Args:
        backbone: the layers below the head (models count as layers).
        blocks: groups of their leaf layers, from the bottom to the top.
        trainable: `"head"` freezes them all, `"all"` none; a number n trains the top n blocks;
            a list of names trains these layers.
        keep_statistics: whether BatchNormalization layers stay frozen in inference mode.

    Raises:
        ValueError: more blocks than there are, or a name that no layer has.
        TypeError: anything else.
    """
    leaves = [leaf for layer in backbone for leaf in leaf_layers(layer)]
    chosen = _choose(leaves, blocks, trainable)
    for layer in backbone:
        layer.trainable = bool(chosen)  # on a model: on everything in it
    for leaf in leaves:
        leaf.trainable = id(leaf) in chosen
        if keep_statistics:
            for inner in leaf._flatten_layers():
                if isinstance(inner, keras.layers.BatchNormalization):
                    inner.trainable = False


def _choose(
    leaves: Sequence[keras.Layer], blocks: Sequence[Sequence[keras.Layer]], trainable: Any
) -> set[int]:
    if isinstance(trainable, str) and trainable in ("head", "all"):
        return {id(leaf) for leaf in leaves} if trainable == "all" else set()
    if isinstance(trainable, int) and not isinstance(trainable, bool):
        if not 0 <= trainable <= len(blocks):
            raise ValueError(
                "`trainable` as a number counts blocks from the top, from 0 to the number of "
                f"blocks below the head. Received: trainable={trainable}, and there are "
                f"{len(blocks)} blocks."
            )
        top = blocks[len(blocks) - trainable :]
        return {id(layer) for block in top for layer in block}
    if isinstance(trainable, Sequence) and not isinstance(trainable, str):
        names = {leaf.name: leaf for leaf in leaves}
        for name in trainable:
            if name not in names:
                raise ValueError(
                    f"`trainable` must name layers below the head. Received: {name!r}, and no "
                    f"layer has that name.{near(str(name), names)}"
                )
        return {id(names[name]) for name in trainable}
    raise TypeError(
        '`trainable` must be "head", "all", a number of blocks from the top or a list of layer '
        f"names. Received: trainable={trainable!r}."
    )
