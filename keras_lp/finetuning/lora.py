"""Low-rank adapters (LoRA): a frozen kernel W learns a small update, W + alpha / rank * A B.

Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685). The adapters
are those of Keras's `enable_lora`; this module adds them to the right layers of a model.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_lp.backbones.blocks import below_head, head_layers
from keras_lp.backbones.freezing import restore_flag, set_trainable
from keras_lp.model.adapters import adapted_layers, adapters_of, is_loaded, revive_adapters
from keras_lp.utils.arguments import check_positive
from keras_lp.utils.files import whole_file
from keras_lp.utils.keras_internals import (
    direct_sublayers,
    own_trainable_variables,
    sublayers,
    untrack_variable,
)
from keras_lp.utils.warn import warn


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Settings of the low-rank adapters that `lp.finetune_model` adds to a model.

    A frozen kernel W becomes W + alpha / rank * A B, and only A and B train.

    Args:
        rank: inner size of the adapters, 1 or more. Defaults to 8.
        alpha: the update is multiplied by `alpha / rank`. Defaults to None: `rank`.
        layers: names or globs of the layers to adapt, including nested layers, such as
            `["query", "value"]`. Defaults to None: every Dense, EinsumDense, Conv1D and Conv2D
            below the head. Embeddings are adapted only if they are named.

    Raises:
        ValueError: if `rank` is not an integer of 1 or more, or `alpha` is not above 0.
        TypeError: if `layers` is not a list of names.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, name="dense")])
    >>> model = lp.finetune_model(lp.transfer_model(backbone, 3), lora=lp.LoRA(rank=2))
    >>> [v.name for v in model.trainable_variables]
    ['lora_kernel_a', 'lora_kernel_b', 'kernel', 'bias']

    Reference: Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models
    (arXiv:2106.09685).
    """

    rank: int = 8
    alpha: float | None = None
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_positive("rank", self.rank, integer=True)
        if self.alpha is not None:
            check_positive("alpha", self.alpha)
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence | None):
            raise TypeError(
                "`layers` must be a list of layer names or globs. Received: "
                f"layers={self.layers!r}."
            )


def add_adapters(model: keras.Model, lora: LoRA) -> None:
    """Adds adapters to the layers below the head; only the adapters and the head train.

    The caller must compile afterwards.

    Raises:
        ValueError: if there is no layer to adapt, or a pattern matches no layer.
    """
    below = below_head(model)
    able = [layer for part in below for layer in sublayers(part) if _can_adapt(layer)]
    if lora.layers is None:
        chosen = [layer for layer in able if not isinstance(layer, keras.layers.Embedding)]
        idle = [] if chosen else ["any layer"]
    else:
        idle = [p for p in lora.layers if not any(_matches(layer, [p]) for layer in able)]
        chosen = [layer for layer in able if _matches(layer, lora.layers)]
    if idle or not chosen:
        raise ValueError(
            "LoRA needs layers that take adapters: Dense, EinsumDense, Embedding, Conv1D or "
            f"Conv2D below the head. Received: layers={lora.layers}, and "
            f"{'the model has none' if lora.layers is None else f'nothing matches {idle}'}. "
            f"Layers that take adapters: {sorted({layer.name for layer in able})[:30]}."
        )
    other = next((la for la in chosen if la.lora_enabled and la.lora_rank != lora.rank), None)
    if other is not None:
        raise ValueError(
            f"The rank of existing adapters cannot change. Received: rank={lora.rank}, and "
            f"layer {other.name!r} has adapters of rank {other.lora_rank}. Call "
            "lp.merge_adapters(model) first."
        )
    set_trainable(model, True)
    for part in below:
        _freeze_all_but(part, {id(layer) for layer in chosen})
    for layer in chosen:
        if not layer.lora_enabled:
            layer.enable_lora(lora.rank, lora_alpha=lora.alpha)
        restore_flag(layer, True)
    revive_adapters(model)


def save_adapters(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Saves only the adapters and the head of a model, exactly.

    A `.keras` file contains the whole model, with the adapters merged into its kernels. This file
    contains only the weights that fine-tuning trained, for `lp.load_adapters` on a model that was
    built in the same way.

    Args:
        model: a model with adapters, from `lp.finetune_model(..., lora=...)`.
        path: path of the NumPy `.npz` file to write.

    Raises:
        ValueError: if the model has no adapters.
        OSError: if the file cannot be written; an existing file is then unchanged.

    Example:

    >>> import os, tempfile, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16)])
    >>> model = lp.finetune_model(lp.transfer_model(backbone, 3), lora=lp.LoRA(rank=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lp.save_adapters(model, os.path.join(folder, "style.npz"))
    ...     os.listdir(folder)
    ['style.npz']

    Reference: Hu et al., 2021 (arXiv:2106.09685).
    """
    arrays: dict[str, Any] = {name: np.asarray(v) for name, v in _saved(model).items()}
    with whole_file(path) as file:
        np.savez(file, **arrays)


def load_adapters(model: keras.Model, path: str | os.PathLike[str]) -> keras.Model:
    """Loads the adapters and the head that `lp.save_adapters` saved, and returns the model.

    Args:
        model: a model with adapters of the same rank on the same layers, and with the base
            weights that they were trained on. A `.keras` file saved after training is not such a
            base: its kernels already include the adapters, so there is nothing to load. A warning
            is issued if the model may come from such a file.
        path: path of the file.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no adapters, or the file is missing, damaged or has other
            adapters.

    Example:

    >>> import os, tempfile, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16)])
    >>> model = lp.finetune_model(lp.transfer_model(backbone, 3), lora=lp.LoRA(rank=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lp.save_adapters(model, os.path.join(folder, "style.npz"))
    ...     model = lp.load_adapters(model, os.path.join(folder, "style.npz"))

    Reference: Hu et al., 2021 (arXiv:2106.09685).
    """
    variables = _saved(model)
    if not os.path.exists(path):
        raise ValueError(f"An adapter file must exist. Received: path={os.fspath(path)!r}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # damaged zip files and headers raise various errors
        raise ValueError(
            "An adapter file must be a whole .npz file that lp.save_adapters wrote. Received: "
            f"{os.fspath(path)}, which cannot be read. Save it or copy it again."
        ) from error
    shapes = {name: tuple(v.shape) for name, v in variables.items()}
    found = {name: array.shape for name, array in arrays.items()}
    if shapes != found:
        differ = [name for name in {**shapes, **found} if shapes.get(name) != found.get(name)]
        first = differ[0]
        raise ValueError(
            "Adapters must be loaded into a model with the same adapters and head. Received: "
            f"{len(differ)} arrays that differ, first {first!r}: {found.get(first)} in the file, "
            f"{shapes.get(first)} in the model. Build the model like the saved one: the same "
            "backbone, rank, layers and tasks."
        )
    if any(is_loaded(layer) for layer in adapted_layers(model)):
        warn(
            "Adapters must be loaded into the base that they were trained on. Received: model "
            f"{model.name!r}, which comes from a file. If it was saved after training, its kernels "
            "already include the adapters, which would then count twice. Load them into "
            "lp.finetune_model(base, lora=...).",
        )
    for name, variable in variables.items():
        variable.assign(arrays[name])
    return model


def fold_adapters(model: keras.Model) -> None:
    """Adds the adapters to their kernels and removes them. The caller must compile afterwards."""
    for layer in adapted_layers(model):
        # Keras merges adapters when it saves a layer, and re-quantises a quantised kernel.
        merged: dict[str, Any] = {}
        layer.save_own_variables(merged)
        for variable in adapters_of(layer):
            untrack_variable(layer, variable)
        layer.lora_enabled, layer.lora_rank = False, None
        layer.load_own_variables({name: np.asarray(value) for name, value in merged.items()})


def check_adapted(model: keras.Model) -> None:
    """Raises `ValueError` unless a model has adapters."""
    if not adapted_layers(model):
        raise ValueError(
            "The model must have adapters. Received: model "
            f"{model.name!r} without any. Add them: lp.finetune_model(model, lora=lp.LoRA(8))."
        )


def _saved(model: keras.Model) -> dict[str, Any]:
    check_adapted(model)
    named = [(layer, adapters_of(layer)) for layer in adapted_layers(model)]
    named += [(leaf, leaf.weights) for leaf in head_layers(model)]
    # By position: names are not unique, and paths change with saving.
    return {
        f"{i:04}_{layer.name}_{variable.name}": variable
        for i, (layer, variables) in enumerate(named)
        for variable in variables
    }


def _can_adapt(layer: keras.Layer) -> bool:
    able = hasattr(layer, "enable_lora") and not isinstance(layer, keras.Model)
    able = able and getattr(layer, "quantization_mode", None) != "float8"  # no LoRA in Keras
    return able and layer.built and not isinstance(layer, keras.layers.DepthwiseConv2D)


def _matches(layer: keras.Layer, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns)


def _freeze_all_but(layer: keras.Layer, chosen: set[int]) -> bool:
    """Freezes a layer and everything in it, except chosen layers; returns whether it has any.

    A layer that contains a chosen layer must be trainable, but its own weights are not.
    """
    holding = [_freeze_all_but(inner, chosen) for inner in direct_sublayers(layer)]
    if not any(holding) and id(layer) not in chosen:
        set_trainable(layer, False)
        return False
    for variable in own_trainable_variables(layer):
        variable.trainable = False
    return True
