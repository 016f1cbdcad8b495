"""Turns a name, a file or a model into one headless model that includes its preprocessing.

Named backbones take raw images, 0 to 255. The application's own `preprocess_input` is a layer of
the model, so training, the saved file and the phone agree.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_lp.backbones import hub
from keras_lp.backbones.freezing import leaf_layers
from keras_lp.backbones.images import check_image_size, fit_images
from keras_lp.backbones.sharing import own_copy, warn_if_copied, warn_if_trained
from keras_lp.tasks.heads import backbone_of
from keras_lp.utils.files import check_archive
from keras_lp.utils.names import near

BackboneLike = str | os.PathLike[str] | keras.Model
Weights = str | os.PathLike[str] | None  # "imagenet", a file, or untrained

_SOURCES = (
    'a name from keras.applications, "hub:" and a KerasHub preset, a headless keras.Model, a '
    ".keras file or a model that keras_lp built"
)


def resolve_backbone(
    backbone: BackboneLike,
    *,
    input_shape: Sequence[int | None] | None = None,
    image_size: int | Sequence[int] | None = None,
    weights: Weights = "imagenet",
    backbone_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool | None = None,
    trains: bool = False,
) -> tuple[keras.Model, bool]:
    """Returns a headless model and whether it is pretrained.

    Args:
        backbone: a name from `keras.applications`, `"hub:"` and a KerasHub preset, a headless
            model, a `.keras` file or a model that keras_lp built.
        input_shape: shape of the user's inputs, without the batch axis.
        image_size: size of the network's input, (height, width) or one number for both.
        weights: for a name: `"imagenet"`, None or a weights file.
        backbone_kwargs: for a name: arguments of its constructor.
        pretrained: whether the weights are pretrained. Defaults to whether `weights` is given for
            a name, and to True for a model.
        trains: whether the backbone will train; a model is then copied. Defaults to False.

    Raises:
        ValueError: if a name is unknown, the backbone cannot take the shape, or a model has a
            head.
        TypeError: if `backbone` is anything else.
        ConnectionError: if ImageNet weights cannot be downloaded.
    """
    if isinstance(backbone, os.PathLike) or (
        isinstance(backbone, str) and backbone.endswith(".keras")
    ):
        backbone, trains = _load(os.fspath(backbone)), False  # nobody else has this object
    image_size = check_image_size(image_size)
    if isinstance(backbone, str):
        _check_weights(weights)
        build = _hub if backbone.startswith(hub.PREFIX) else _application
        model = build(backbone, input_shape, image_size, weights, dict(backbone_kwargs or {}))
        return model, weights is not None if pretrained is None else pretrained
    if not isinstance(backbone, keras.Model):
        raise TypeError(
            f"A backbone must be {_SOURCES}. Received: backbone={backbone!r} of type "
            f"{type(backbone).__name__}."
        )
    if weights != "imagenet" or backbone_kwargs:
        raise ValueError(
            "`weights` and `backbone_kwargs` are for backbones by name. Received: "
            f"weights={weights!r}, backbone_kwargs={backbone_kwargs!r} with a model, which "
            "already has weights. Load them with `model.load_weights(file)`, or pass "
            "`pretrained=False` if they are not pretrained."
        )
    if backbone_of(backbone) is None:
        warn_if_trained(backbone)
        if not trains:
            warn_if_copied(backbone)
    model = backbone_of(backbone) or backbone
    _check_headless(model)
    model = own_copy(model) if trains else model
    model = _functional(model, input_shape, image_size)
    return model, True if pretrained is None else pretrained


def _check_weights(weights: Any) -> None:
    is_path = isinstance(weights, (str, os.PathLike))
    if not (weights is None or weights == "imagenet" or (is_path and os.path.exists(weights))):
        raise ValueError(
            '`weights` must be "imagenet", None or an existing weights file. Received: '
            f"weights={weights!r}.{near(str(weights), ['imagenet'])}"
        )


def _application(
    name: str,
    input_shape: Sequence[int | None] | None,
    image_size: tuple[int, int] | None,
    weights: Any,
    kwargs: dict[str, Any],
) -> keras.Model:
    build = getattr(keras.applications, name, None)
    if not callable(build):
        known = [n for n in dir(keras.applications) if n[0].isupper()]
        raise ValueError(
            f"A backbone must be {_SOURCES}. Received: backbone={name!r}, which is not in "
            f"keras.applications.{near(name, known)}"
            + (" A model file must end in .keras." if "." in name else "")
        )
    shape = (None, None, 3) if input_shape is None else tuple(input_shape)
    if len(shape) != 3 or (weights is not None and shape[-1] not in (1, 3)):
        raise ValueError(
            f"{name} takes images, so `input_shape` is (height, width, channels), with 3 "
            "channels, or one grey channel, if the weights are pretrained. Received: "
            f"input_shape={input_shape!r}."
        )
    images = keras.Input(shape, name="image")
    channels: Any = shape[-1] if weights is None else 3
    fitted = fit_images(images, channels, image_size)
    weights = os.fspath(weights) if isinstance(weights, os.PathLike) else weights
    try:
        preprocessed = _preprocess(build, fitted)
        with warnings.catch_warnings():
            # The weights for 224 pixels are used for every size; Keras warns each time.
            warnings.filterwarnings("ignore", message="`input_shape` is undefined or non-square")
            return build(
                include_top=False,
                weights=weights,
                input_tensor=preprocessed,
                input_shape=tuple(preprocessed.shape[1:]),
                **kwargs,
            )
    except (ValueError, TypeError) as error:
        raise type(error)(
            f"keras.applications.{name} must be able to take its arguments. Received: "
            f"input_shape={shape}, image_size={image_size}, weights={str(weights)!r}, "
            f"backbone_kwargs={kwargs}. Keras says: {error}"
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

    All of them are affine in the channels, so black and the three full colours determine them.
    """
    preprocess_input = sys.modules[build.__module__].preprocess_input
    colours = 255.0 * np.vstack([np.zeros((1, 3)), np.eye(3)]).astype("float32")
    mapped = np.asarray(preprocess_input(colours.reshape(4, 1, 1, 3).copy())).reshape(4, 3)
    offset, matrix = mapped[0], (mapped[1:] - mapped[0]) / 255.0
    colour = images.shape[-1] == 3
    if np.count_nonzero(matrix - np.diag(np.diag(matrix))):  # RGB to BGR
        images, matrix = images[..., ::-1] if colour else images, matrix[::-1]
    scale = np.diag(matrix)
    if not colour:  # an untrained network with other channels: the mean over the three
        scale, offset = scale.mean(keepdims=True), offset.mean(keepdims=True)
    return _rescale(images, scale.tolist(), offset.tolist())


def _rescale(images: Any, scale: Any, offset: Any) -> Any:
    if np.allclose(scale, 1.0) and np.allclose(offset, 0.0):
        return images
    return keras.layers.Rescaling(scale, offset, name="preprocessing")(images)


def _hub(
    name: str,
    input_shape: Sequence[int | None] | None,
    image_size: tuple[int, int] | None,
    weights: Any,
    kwargs: dict[str, Any],
) -> keras.Model:
    preset = name.removeprefix(hub.PREFIX)
    network = hub.load_preset(preset, weights, kwargs)
    if not _takes_images(network):
        return _functional(network, input_shape, image_size)
    own = tuple(network.inputs[0].shape[1:])
    shape = input_shape or ((None, None, own[-1]) if image_size else own)
    images = keras.Input(shape, name="image")
    scale, offset = hub.image_scaling(preset)
    fitted = fit_images(images, own[-1], image_size)
    _check_fits(network, tuple(fitted.shape[1:]), image_size)
    return keras.Model(images, _call(network, _rescale(fitted, scale, offset)), name=network.name)


def _load(path: str) -> keras.Model:
    if not os.path.exists(path):
        raise ValueError(f"A backbone file must exist. Received: backbone={path!r}.")
    check_archive(path)
    return keras.models.load_model(path)


def _check_headless(model: keras.Model) -> None:
    inner = getattr(model, "backbone", None)
    if isinstance(inner, keras.Model):  # a KerasHub task
        raise ValueError(
            f"A backbone must be headless. Received: {type(model).__name__} {model.name!r}, which "
            "has a head. Pass its `.backbone`."
        )
    last: Any = list(leaf_layers(model))[-1] if model.layers else None
    softmax = getattr(last, "activation", None) is keras.activations.softmax
    named = isinstance(last, keras.layers.Dense) and last.name in ("predictions", "logits")
    if softmax or named or isinstance(last, keras.layers.Softmax):
        raise ValueError(
            f"A backbone must be headless. Received: model {model.name!r}, which ends in the "
            f"classifier {last.name!r}. Pass the part below it, "
            "`keras.Model(model.input, model.layers[-2].output)`, or for keras.applications "
            "build it with `include_top=False`."
        )


def _takes_images(model: keras.Model) -> bool:
    return len(model.inputs) == 1 and len(model.inputs[0].shape) == 4


def _functional(
    model: keras.Model,
    input_shape: Sequence[int | None] | None,
    image_size: tuple[int, int] | None,
) -> keras.Model:
    """Returns a model with a graph from the user's inputs to one output, the features."""
    shape = None if input_shape is None else tuple(input_shape)
    if not getattr(model, "inputs", None):  # a subclassed model has no graph: wrap it in one
        if shape is None:
            raise ValueError(
                "A backbone that is a subclassed model needs `input_shape`. Received: model "
                f"{model.name!r} of type {type(model).__name__} without it."
            )
        inputs = keras.Input(shape, name="input")
        fitted = fit_images(inputs, 1, image_size) if image_size else inputs
        return keras.Model(inputs, model(fitted), name=f"{model.name}_graph")
    model = _one_output(model)
    if not _takes_images(model):
        if image_size is not None:
            raise ValueError(
                "`image_size` is for backbones that take images. Received: "
                f"image_size={image_size} for the model {model.name!r} that takes "
                f"{[tuple(t.shape[1:]) for t in model.inputs]}."
            )
        _check_fits(model, shape)
        return model
    channels = model.inputs[0].shape[-1]
    grey = shape is not None and len(shape) == 3 and shape[-1] == 1 and channels == 3
    if image_size is None and not grey:
        _check_fits(model, shape)
        return model
    images = keras.Input(shape or (None, None, channels), name="image")
    fitted = fit_images(images, channels, image_size)
    _check_fits(model, tuple(fitted.shape[1:]), image_size)
    return keras.Model(images, _call(model, fitted), name=f"{model.name}_images")


def _one_output(model: keras.Model) -> keras.Model:
    if len(model.outputs) == 1:
        return model
    names = model.output if isinstance(model.output, Mapping) else {}
    if "sequence_output" in names and "pooled_output" in names:  # BERT and similar models
        return keras.Model(model.input, names["sequence_output"], name=model.name)
    raise ValueError(
        f"A backbone must have one output, its features. Received: model {model.name!r} "
        f"with {len(model.outputs)} outputs. Pass `keras.Model(model.input, features)`."
    )


def _check_fits(
    model: keras.Model,
    shape: tuple[int | None, ...] | None,
    image_size: tuple[int, int] | None = None,
) -> None:
    own = tuple(model.inputs[0].shape[1:])
    fits = shape is None or (
        len(model.inputs) == 1
        and len(shape) == len(own)
        and all(b is None or a == b for a, b in zip(shape, own, strict=True))
    )
    if not fits:
        remedy = "Leave `input_shape` out" + (
            ", or resize images with `image_size`." if _takes_images(model) else "."
        )
        if image_size is not None:
            remedy = f"It needs image_size={own[:2]}."
        raise ValueError(
            "`input_shape`, after resizing, must be the input shape of the backbone. Received: "
            f"input_shape={shape}, image_size={image_size} for the model {model.name!r} that "
            f"takes {own}. {remedy}"
        )


def _call(model: keras.Model, inputs: Any) -> Any:
    (features,) = keras.tree.flatten(model(inputs))
    return features
