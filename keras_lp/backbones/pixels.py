"""Detects a common mistake: images scaled to 0..1 for a network that expects 0..255."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.utils.keras_internals import sublayers
from keras_lp.utils.warn import warn

_SEEN = 64  # images


def warn_of_scaled_images(model: keras.Model, x: Any, what: str = "x") -> None:
    """Warns, once per model, if images look scaled although the model scales them itself.

    Args:
        model: the model.
        x: inputs: arrays or tensors, or a data set of batches, with or without labels.
        what: the name of the argument.
    """
    if model.__dict__.get("_images_checked") or not _takes_0_to_255(model):
        return
    if isinstance(x, tf.data.Dataset):
        x = next(iter(x.take(1)), ())
        x = x[0] if isinstance(x, tuple) and x else x
    arrays = [leaf for leaf in keras.tree.flatten(x) if hasattr(leaf, "shape")]
    if not arrays or not isinstance(arrays[0], (np.ndarray, tf.Tensor)):
        return
    model.__dict__["_images_checked"] = True
    for leaf in arrays:
        if len(leaf.shape) != 4 or not keras.backend.is_float_dtype(leaf.dtype):
            continue
        some = np.asarray(leaf[:_SEEN], "float32")
        if some.size and np.abs(some).max() <= 1 and (some % 1 != 0).any():
            warn(
                f"The images of `{what}` have values from {some.min():.2g} to {some.max():.2g}, "
                "but the model scales them itself: it takes raw pixels from 0 to 255. Pass them "
                "unscaled, or multiply by 255 (from -1 to 1: add 1, multiply by 127.5).",
            )


def _takes_0_to_255(model: keras.Model) -> bool:
    """Whether the model divides its images by a large number, or subtracts one."""
    if not any(len(tensor.shape) == 4 for tensor in model.inputs):
        return False
    for layer in sublayers(model):
        if isinstance(layer, keras.layers.Rescaling):
            small, far = np.max(np.abs(layer.scale)) < 0.05, np.max(np.abs(layer.offset)) > 10
        elif isinstance(layer, keras.layers.Normalization) and layer.built:
            small, far = False, np.max(np.abs(np.asarray(layer.mean))) > 10
        else:
            continue
        if small or far:
            return True
    return False
