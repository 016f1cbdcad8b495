"""What a page knows about its model: `model.json`."""

from __future__ import annotations

import html
import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib import resources
from string import Template
from typing import Any

from keras_lp.backbones.text import TextEncoder
from keras_lp.tflite.interface import Input, Interface, Output
from keras_lp.tflite.metadata.annotate import TFLiteMetadata, input_of_ids

TYPES = ("float32", "int32", "uint8")  # that LiteRT.js exchanges
STATIC = (  # the files that all pages have
    "app.js",
    "federation.js",
    "inputs.js",
    "npz.js",
    "outputs.js",
    "runner.js",
    "store.js",
    "style.css",
    "text.js",
)
_DRAWN = 32  # pixels: larger images of one channel are pictures
_IMPORTS = {"@litertjs/core": "./litert/core.js", "@litertjs/wasm-utils": "./litert/wasm-utils.js"}


def site_file(name: str) -> str:
    """Returns a file of every page."""
    return (resources.files("keras_lp.web") / "site" / name).read_text(encoding="utf-8")


def index(title: str, description: str, card: str) -> str:
    """Returns `index.html`.

    Its policy allows only files of the site itself, so that nothing can be sent elsewhere.
    """
    imports = json.dumps({"imports": _IMPORTS})
    digest = b64encode(sha256(imports.encode()).digest()).decode()
    policy = {
        "default-src": "'none'",
        "script-src": f"'self' 'wasm-unsafe-eval' 'sha256-{digest}'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data: blob:",
        "media-src": "blob: mediastream:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return Template(site_file("index.html")).substitute(
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        imports=imports,
        title=html.escape(title),
        description=html.escape(description),
        card=html.escape(card),
    )


def describe_page(
    described: Interface,
    metadata: TFLiteMetadata,
    features: Sequence[str] | None,
    trainable: bool,
) -> dict[str, Any]:
    """Returns the inputs and outputs of a model as its page needs them, JSON values.

    Raises:
        ValueError: if the page cannot give an input, or `features` has the wrong length.
    """
    encoder = TextEncoder.of(described.model)
    texts: dict[str, dict[str, Any]] = {}
    if encoder is not None:
        name = input_of_ids(described, len(encoder.tokens))
        texts[name] = {"tokens": encoder.tokens, "level": encoder.level}
    inputs = [
        {
            **_input(one, metadata, texts.get(one.name), features, len(described.inputs)),
            "name": _name_in_training(one, described) if trainable else one.name,
        }
        for one in described.inputs
    ]
    if features is not None and not any("features" in one for one in inputs):
        raise ValueError(
            "`feature_names` must have a name for each number of an input. Received: "
            f"{len(features)} names for inputs of shapes {[one.shape for one in described.inputs]}."
        )
    outputs = [
        _output(one, tensor.shape[1:])
        for one, tensor in zip(described.outputs, described.model.outputs, strict=True)
    ]
    return {"inputs": inputs, "outputs": outputs}


def _name_in_training(one: Input, described: Interface) -> str:
    """Returns the name in a trainable file."""
    index = described.inputs.index(one)
    several = len(described.inputs) > 1
    return f"x_{described.model.inputs[index].name}" if several else "x"


def _input(
    one: Input,
    metadata: TFLiteMetadata,
    text: Mapping[str, Any] | None,
    features: Sequence[str] | None,
    count: int,
) -> dict[str, Any]:
    if one.dtype not in TYPES:
        raise ValueError(
            f"The inputs of a page must have one of the dtypes {list(TYPES)}. Received: input "
            f"{one.name!r} of dtype {one.dtype}. Build the model with another dtype."
        )
    about: dict[str, Any] = {"shape": one.shape, "dtype": one.dtype, "ids": one.ids}
    title = one.name.replace("_", " ") if count > 1 else "Your input"
    is_image = len(one.shape) == 3 and one.shape[-1] in (1, 3) and one.ids is None
    if text is not None:
        return {**about, "kind": "text", "title": title if count > 1 else "Your text", **text}
    if is_image:
        drawn = one.shape[-1] == 1 and max(one.shape[:2]) <= _DRAWN
        about |= {"mean": metadata.mean, "std": metadata.std}
        kind = "drawing" if drawn else "picture"
        return {**about, "kind": kind, "title": title if count > 1 else f"Your {kind}"}
    if features is not None and len(features) == math.prod(one.shape):
        about["features"] = list(features)
    return {**about, "kind": "numbers", "title": title if count > 1 else "Your numbers"}


def _output(one: Output, shape: Sequence[int]) -> dict[str, Any]:
    # The page shows one answer for an example; others are shown as numbers.
    kind = one.kind if len(shape) == 1 else "values"
    return {
        "name": one.name,
        "title": one.name.replace("_", " "),
        "kind": kind,
        "size": math.prod(shape),
        "labels": list(one.class_names),
        "thresholds": list(one.thresholds),
    }
