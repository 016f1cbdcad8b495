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
import keras.src.utils.naming
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

    A block is a group of neighbouring layers whose names share a prefix (`block1_conv`,
    `block1_bn`), else one layer. A layer with a name that Keras gave (`dense_1`) is a block of its
    own, unless it lies within a numbered block, or below a concatenation that ends one
    (InceptionV3's `mixed0`). Normalisation that would be a block of its own belongs to the block
    below it.

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
# Names of numbered blocks, the first that matches: the families of keras.applications, then any
# "<words><number>" or "<words><number>_<more>".
_NUMBERED = [
    re.compile(r"(block(?:35|17|8)_\d+)(?:_|$)"),  # InceptionResNetV2
    re.compile(r"(.*block_?\d+[a-z]?)(?:_|$)"),  # ResNet, VGG, MobileNetV2, EfficientNet, ...
    re.compile(r"(expanded_conv(?:_\d+)?)(?:_|$)"),  # MobileNetV3
    re.compile(r"(?:conv_)(?:dw|pw)_(\d+)"),  # MobileNet: depthwise and pointwise are one block
    re.compile(r"([A-Za-z_]*?\d+[a-z]?)(?:_[A-Za-z]|$)"),
]
_WORD = re.compile(r"([A-Za-z]+)_[A-Za-z]")  # "stem_conv", "stem_bn"
_ENDS_BLOCK = re.compile(r"(?:block\d+_\d+_)?mixed\w*$")  # the Inception families' concatenations


def _block_names(leaves: Sequence[keras.Layer]) -> list[str | None]:
    """Returns the name of each leaf's block, None where it has no name for one."""
    names: list[str | None] = []
    numbered: dict[str, list[int]] = {}
    for i, leaf in enumerate(leaves):
        name, key = leaf.name, None
        if not _is_default_name(leaf):
            matches = (pattern.match(name) for pattern in _NUMBERED)
            key = next((match.group(1) for match in matches if match), None)
            if key is not None:
                numbered.setdefault(key, []).append(i)
            elif _WORD.match(name):
                key = _WORD.match(name).group(1)
        names.append(key)
    # What Keras named lies within the block around it (the shortcuts of Xception).
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
    """Joins blocks that hold nothing but normalisation to the block below, or above."""
    folded: list[list[keras.Layer]] = []
    waiting: list[keras.Layer] = []
    for block in blocks:
        if not all(isinstance(layer, _NORMALISATION) for layer in block):
            folded.append(waiting + block)
            waiting = []
        elif folded:
            folded[-1].extend(block)
        else:
            waiting += block
    return folded


def _application(
    name: str, input_shape: Sequence[int | None] | None, weights: Any, kwargs: dict[str, Any]
) -> keras.Model:
    build = getattr(keras.applications, name, None)
    if not callable(build):
        known = [n for n in dir(keras.applications) if n[0].isupper()]
        raise ValueError(
            f"A backbone must be {_SOURCES}. Received: backbone={name!r}, which is not in "
            f"keras.applications.{checks.near(name, known)}"
            + (" A model file must end in .keras." if "." in name else "")
        )
    is_path = isinstance(weights, (str, os.PathLike))
    if not (weights is None or weights == "imagenet" or (is_path and os.path.exists(weights))):
        raise ValueError(
            '`weights` must be "imagenet", None or an existing weights file. Received: '
            f"weights={weights!r}.{checks.near(str(weights), ['imagenet'])}"
        )
    shape = tuple(input_shape) if input_shape is not None else (None, None, 3)
    if weights is not None and len(shape) == 3 and shape[-1] != 3:
        raise ValueError(
            f"{name} with pretrained weights takes pictures of 3 channels. Received: "
            f"input_shape={shape}. Repeat a grey channel: np.repeat(x, 3, axis=-1)."
        )
    if len(shape) != 3:
        raise ValueError(
            f"{name} takes images, so `input_shape` is (height, width, channels). Received: "
            f"input_shape={input_shape!r}."
        )
    images = keras.Input(shape, name="image")
    try:
        preprocessed = _preprocess(build, images)
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
    colour = images.shape[-1] == 3
    if np.count_nonzero(matrix - np.diag(np.diag(matrix))):  # RGB to BGR
        images, matrix = images[..., ::-1] if colour else images, matrix[::-1]
    scale = np.diag(matrix)
    if not colour:  # an untrained net of other channels: the mean of what the three get
        scale, offset = scale.mean(keepdims=True), offset.mean(keepdims=True)
    if np.allclose(scale, 1.0) and np.allclose(offset, 0.0):
        return images
    return keras.layers.Rescaling(scale.tolist(), offset.tolist(), name="preprocessing")(images)


def _load(path: str) -> keras.Model:
    if not os.path.exists(path):
        raise ValueError(f"A backbone file must exist. Received: backbone={path!r}.")
    return keras.models.load_model(path)


def _check_headless(model: keras.Model) -> None:
    last = list(leaf_layers(model))[-1] if model.layers else None
    softmax = getattr(last, "activation", None) is keras.activations.softmax
    if softmax or isinstance(last, keras.layers.Softmax):
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
