"""Blocks: the groups of consecutive layers of which an architecture consists.

`trainable=n` counts them from the top, and layer decay gives each a learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import keras
import keras.src.utils.naming

from keras_lp.backbones.freezing import leaf_layers
from keras_lp.tasks.heads import backbone_of


def blocks_of(layers: Sequence[keras.Layer]) -> list[list[keras.Layer]]:
    """Groups the leaf layers that have weights into blocks, from the bottom to the top.

    A block is a group of consecutive layers whose names share a prefix (`block1_conv`,
    `block1_bn`), or a single layer. A layer with a default name of Keras (`dense_1`) is its own
    block, unless it lies within a numbered block or below a concatenation that ends one
    (InceptionV3's `mixed0`). A normalisation layer that would be its own block belongs to the
    block below it. Consecutive embeddings are one block.

    Args:
        layers: the layers below the head, in order. Models stand for their layers.
    """
    leaves = [leaf for layer in layers for leaf in leaf_layers(layer)]
    keys = _block_names(leaves)
    blocks: list[tuple[str | None, list[keras.Layer]]] = []
    for leaf, key in zip(leaves, keys, strict=True):
        if not leaf.weights:
            continue
        same = bool(blocks) and key is not None and blocks[-1][0] == key
        if same or (blocks and isinstance(leaf, _NORMALISATION) and key is None):
            blocks[-1][1].append(leaf)
        else:
            blocks.append((key, [leaf]))
    return _fold_normalisation([block for _, block in blocks])


_NORMALISATION = (keras.layers.BatchNormalization, keras.layers.Normalization)
# Names of numbered blocks; the first match counts. First the families of keras.applications, then
# any "<words><number>" or "<words><number>_<more>".
_NUMBERED = [
    re.compile(r"(block(?:35|17|8)_\d+)(?:_|$)"),  # InceptionResNetV2
    # NASNet has the cell number at the end.
    re.compile(r"(?:adjust|normal|reduction|separable)_\w*?_((?:stem_|reduce_)?\d+)$"),
    re.compile(r"(.*block_?\d+[a-z]?)(?:_|$)"),  # ResNet, VGG, MobileNetV2, EfficientNet, ...
    re.compile(r"(expanded_conv(?:_\d+)?)(?:_|$)"),  # MobileNetV3
    re.compile(r"(?:conv_)(?:dw|pw)_(\d+)"),  # MobileNet: depthwise and pointwise are one block
    re.compile(r"([A-Za-z_]*?\d+[a-z]?)(?:_[A-Za-z]|$)"),
]
_EMBEDDINGS = re.compile(r"(?:\w+_)?embeddings?(?:_layer_?norm)?$")  # of tokens, of positions, ...
_FINAL_NORM = re.compile(r"(?:\w+_)?(?:layer_?norm|normalization|ln)$")  # of language models
_WORD = re.compile(r"([A-Za-z]+)_[A-Za-z]")  # "stem_conv", "stem_bn"
_ENDS_BLOCK = re.compile(r"(?:block\d+_\d+_)?mixed\w*$")  # the Inception families' concatenations


def _block_names(leaves: Sequence[keras.Layer]) -> list[str | None]:
    """Returns the block name of each leaf, None for a leaf whose name has none."""
    names: list[str | None] = []
    numbered: dict[str, list[int]] = {}
    for i, leaf in enumerate(leaves):
        name, key = leaf.name, None
        if _EMBEDDINGS.match(name):
            key = "embeddings"
        elif not _is_default_name(leaf):
            matches = (pattern.match(name) for pattern in _NUMBERED)
            key = next((match.group(1) for match in matches if match), None)
            if key is not None:
                numbered.setdefault(key, []).append(i)
            elif word := _WORD.match(name):
                key = word.group(1)
        names.append(key)
    # Layers with default names belong to the block around them (the shortcuts of Xception).
    for key, indices in numbered.items():
        for i in range(indices[0], indices[-1]):
            if names[i] is None or names[i] not in numbered:
                names[i] = key
    start = 0
    for i, leaf in enumerate(leaves):
        if _ENDS_BLOCK.match(leaf.name) and not leaf.weights:
            for j in range(start, i + 1):
                if _is_default_name(leaves[j]) and names[j] is None:
                    names[j] = names[i] or leaf.name
            start = i + 1
    return names


def _is_default_name(layer: keras.Layer) -> bool:
    own = keras.src.utils.naming.to_snake_case(type(layer).__name__)
    return re.fullmatch(rf"{own}(_\d+)?", layer.name) is not None


def _fold_normalisation(blocks: list[list[keras.Layer]]) -> list[list[keras.Layer]]:
    """Merges blocks that contain only normalisation into the block below, or else above."""
    folded: list[list[keras.Layer]] = []
    waiting: list[keras.Layer] = []
    for block in blocks:
        if not all(_is_normalisation(layer) for layer in block):
            folded.append(waiting + block)
            waiting = []
        elif folded:
            folded[-1].extend(block)
        else:
            waiting += block
    return folded


def _is_normalisation(layer: keras.Layer) -> bool:
    named = not _is_default_name(layer) and _FINAL_NORM.match(layer.name)
    return isinstance(layer, _NORMALISATION) or bool(named)


def below_head(model: keras.Model) -> list[keras.Layer]:
    """Returns the layers below the head, in order from the bottom.

    For a model that keras_lp built and for a KerasHub task, these are the layers of the backbone.
    For other models, the head of each output is the nearest layer with weights; if that layer is
    a model, the head is inside it.
    """
    backbone = backbone_of(model) or getattr(model, "backbone", None)
    if isinstance(backbone, keras.Model) and backbone in model.layers:
        return [backbone]
    head = _output_layers(model)
    below = []
    for layer in model.layers:
        if layer not in head:
            below.append(layer)
        elif isinstance(layer, keras.Model):
            below += below_head(layer)
    return below


def head_layers(model: keras.Model) -> list[keras.Layer]:
    """Returns the leaf layers with weights above those of `below_head`.

    A language model that computes its logits from its embeddings has none.
    """
    below = {id(leaf) for layer in below_head(model) for leaf in leaf_layers(layer)}
    return [leaf for leaf in leaf_layers(model) if leaf.weights and id(leaf) not in below]


def _output_layers(model: keras.Model) -> list[keras.Layer]:
    if not getattr(model, "outputs", None):  # a subclassed model has no graph
        return [layer for layer in model.layers if layer.weights][-1:]
    found = []
    pending = list(model.outputs)
    while pending:
        history = pending.pop()._keras_history
        if getattr(history.operation, "weights", None):
            found.append(history.operation)
        else:
            pending += history.operation._inbound_nodes[history.node_index].input_tensors
    return found
