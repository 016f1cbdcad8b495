"""Backbones: a name, a file or a model becomes one headless model with its preprocessing inside.

Named backbones take raw images, 0 to 255: what the application's own `preprocess_input` does is
a layer of the model, so training, the saved file and the phone agree.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_lp import checks
from keras_lp.freezing import leaf_layers
from keras_lp.model import backbone_of

BackboneLike = str | os.PathLike | keras.Model

_SOURCES = (
    "a name from keras.applications, a headless keras.Model, a .keras file or a model that "
    "keras_lp built"
)


def resolve_backbone(
    backbone: BackboneLike,
    *,
    input_shape: Sequence[int | None] | None = None,
    weights: Any = "imagenet",
    backbone_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool | None = None,
) -> tuple[keras.Model, bool]:
    """Returns a headless model and whether it is pretrained.

    Args:
        backbone: a name from `keras.applications`, a headless model, a `.keras` file or a model
            that keras_lp built.
        input_shape: the shape of what the user feeds, without the batch.
        weights: for a name: `"imagenet"`, None or a weights file.
        backbone_kwargs: for a name: arguments of its constructor.
        pretrained: whether the weights are worth keeping. Defaults to what `weights` says for a
            name, and to True for a model.

    Raises:
        ValueError: an unknown name, a shape that the backbone cannot take, a model with a head.
        TypeError: anything else than a backbone.
        ConnectionError: ImageNet weights that cannot be downloaded.
    """
    if isinstance(backbone, os.PathLike) or (
        isinstance(backbone, str) and backbone.endswith(".keras")
    ):
        backbone = _load(os.fspath(backbone))
    if isinstance(backbone, str):
        model = _application(backbone, input_shape, weights, dict(backbone_kwargs or {}))
        return model, weights is not None if pretrained is None else pretrained
    if not isinstance(backbone, keras.Model):
        raise TypeError(
            f"A backbone must be {_SOURCES}. Received: backbone={backbone!r} of type "
            f"{type(backbone).__name__}."
        )
    if weights != "imagenet" or backbone_kwargs:
        raise ValueError(
            "`weights` and `backbone_kwargs` go with the name of a backbone. Received: "
            f"weights={weights!r}, backbone_kwargs={backbone_kwargs!r} with a model, which has "
            "its weights already. Load them with `model.load_weights(file)`, or say "
            "`pretrained=False` where they are not pretrained."
        )
    model = backbone_of(backbone) or backbone
    _check_headless(model)
    model = _functional(model, input_shape)
    return model, True if pretrained is None else pretrained


def blocks_of(layers: Sequence[keras.Layer]) -> list[list[keras.Layer]]:
    """Groups the leaf layers that have weights into blocks, from the bottom to the top.

    A block is a group of layers whose names share a prefix (`block1_conv`, `block1_bn`), else
    one layer.

    Args:
        layers: the layers below the head, in order. Models stand for their layers.
    """
    blocks: dict[str, list[keras.Layer]] = {}
    for leaf in (leaf for layer in layers for leaf in leaf_layers(layer)):
        if leaf.weights:
            blocks.setdefault(_block_name(leaf.name), []).append(leaf)
    return list(blocks.values())


# Names of one block, the first that matches: the families of keras.applications, then any
# "<word><number>_<more>" or "<word>_<more>". Keras's own names ("dense_1") match none of them.
_BLOCK_NAMES = [
    re.compile(r"(.*block_?\d+[a-z]?)(?:_|$)"),  # ResNet, VGG, MobileNetV2, EfficientNet, ...
    re.compile(r"(expanded_conv(?:_\d+)?)(?:_|$)"),  # MobileNetV3
    re.compile(r"(?:conv_)(?:dw|pw)_(\d+)"),  # MobileNet: depthwise and pointwise are one block
    re.compile(r"([A-Za-z]+(?:_?\d+)?[a-z]?)_[A-Za-z]"),
]


def _block_name(name: str) -> str:
    for pattern in _BLOCK_NAMES:
        match = pattern.match(name)
        if match:
            return match.group(1)
    return name


def _application(
    name: str, input_shape: Sequence[int | None] | None, weights: Any, kwargs: dict[str, Any]
) -> keras.Model:
    build = getattr(keras.applications, name, None)
    if not callable(build):
        known = [n for n in dir(keras.applications) if n[0].isupper()]
        raise ValueError(
            f"A backbone must be {_SOURCES}. Received: backbone={name!r}, which is not in "
            f"keras.applications.{checks.near(name, known)}"
        )
    if not (weights is None or weights == "imagenet" or os.path.exists(weights)):
        raise ValueError(
            '`weights` must be "imagenet", None or an existing weights file. Received: '
            f"weights={weights!r}."
        )
    shape = tuple(input_shape) if input_shape is not None else (None, None, 3)
    if len(shape) != 3:
        raise ValueError(
            f"{name} takes images, so `input_shape` is (height, width, channels). Received: "
            f"input_shape={input_shape!r}."
        )
    images = keras.Input(shape, name="image")
    try:
        preprocessed = _preprocess(build, images) if shape[-1] == 3 else images
        with warnings.catch_warnings():
            # The weights of 224 pixels serve every size here, and Keras says so each time.
            warnings.filterwarnings("ignore", message="`input_shape` is undefined or non-square")
            return build(
                include_top=False,
                weights=weights,
                input_tensor=preprocessed,
                input_shape=shape,
                **kwargs,
            )
    except (ValueError, TypeError) as error:
        raise type(error)(
            f"keras.applications.{name} must be able to take what it is given. Received: "
            f"input_shape={shape}, weights={str(weights)!r}, backbone_kwargs={kwargs}. Keras says: "
            f"{error}"
        ) from error
    except Exception as error:
        offline = isinstance(error, OSError) or "URL fetch failure" in str(error)
        if weights != "imagenet" or not offline:
            raise
        raise ConnectionError(
            f'weights="imagenet" of {name} must be downloaded once, and that failed. Received: '
            f"{error}. Connect to the network, or pass the path of a weights file you have: "
            "weights='mobilenet_v2_no_top.h5'."
        ) from error


def _preprocess(build: Callable[..., keras.Model], images: Any) -> Any:
    """Adds the application's own `preprocess_input` as layers.

    All of them are affine in the channels, so black and the three full colours tell which.
    """
    preprocess_input = sys.modules[build.__module__].preprocess_input
    colours = 255.0 * np.vstack([np.zeros((1, 3)), np.eye(3)]).astype("float32")
    mapped = np.asarray(preprocess_input(colours.reshape(4, 1, 1, 3).copy())).reshape(4, 3)
    offset, matrix = mapped[0], (mapped[1:] - mapped[0]) / 255.0
    if np.count_nonzero(matrix - np.diag(np.diag(matrix))):  # RGB to BGR
        images, matrix = images[..., ::-1], matrix[::-1]
    scale = np.diag(matrix)
    if np.allclose(scale, 1.0) and np.allclose(offset, 0.0):
        return images
    return keras.layers.Rescaling(scale.tolist(), offset.tolist(), name="preprocessing")(images)


def _load(path: str) -> keras.Model:
    if not os.path.exists(path):
        raise ValueError(f"A backbone file must exist. Received: backbone={path!r}.")
    return keras.models.load_model(path)


def _check_headless(model: keras.Model) -> None:
    last = model.layers[-1] if model.layers else None
    activation = getattr(last, "activation", None)
    if activation in (keras.activations.softmax, keras.activations.sigmoid) or isinstance(
        last, keras.layers.Softmax
    ):
        raise ValueError(
            f"A backbone must be headless. Received: model {model.name!r}, which ends in the "
            f"classifier {last.name!r}. Pass the part below it, "
            "`keras.Model(model.input, model.layers[-2].output)`, or for keras.applications "
            "build it with `include_top=False`."
        )


def _functional(model: keras.Model, input_shape: Sequence[int | None] | None) -> keras.Model:
    """Checks the input shape; gives a subclassed model, which has no graph, a graph around it."""
    shape = None if input_shape is None else tuple(input_shape)
    if getattr(model, "inputs", None):
        own = tuple(model.inputs[0].shape[1:])
        fits = shape is None or (
            len(model.inputs) == 1
            and len(shape) == len(own)
            and all(b is None or a == b for a, b in zip(shape, own, strict=True))
        )
        if not fits:
            raise ValueError(
                f"`input_shape` must be what the backbone takes. Received: input_shape={shape} "
                f"for the model {model.name!r} that takes {own}. Leave `input_shape` out."
            )
        if len(model.outputs) != 1:
            raise ValueError(
                f"A backbone must have one output, its features. Received: model {model.name!r} "
                f"with {len(model.outputs)} outputs."
            )
        return model
    if shape is None:
        raise ValueError(
            "A backbone that is a subclassed model needs `input_shape`. Received: model "
            f"{model.name!r} of type {type(model).__name__} without it."
        )
    inputs = keras.Input(shape, name="input")
    return keras.Model(inputs, model(inputs), name=f"{model.name}_graph")
