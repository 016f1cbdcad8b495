"""`export_web`: a page that runs, and trains, a model in any browser."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_lp.backbones.freezing import Trainable
from keras_lp.tflite.contents import read_contents, write_whole
from keras_lp.tflite.export.export import export_tflite
from keras_lp.tflite.export.report import ExportReport
from keras_lp.tflite.interface import describe
from keras_lp.tflite.metadata.annotate import TFLiteMetadata
from keras_lp.tflite.training.training import TrainableReport, export_trainable_tflite
from keras_lp.utils.arguments import check_positive
from keras_lp.utils.text_table import ShownAsText
from keras_lp.web.litert_js import litert_js
from keras_lp.web.page import STATIC, describe_page, index, site_file

_CONFIG = "model.json"
_FILE = "model.tflite"


@dataclasses.dataclass(frozen=True, repr=False)
class WebReport(ShownAsText):
    """Describes the page that `export_web` wrote. Can be printed.

    Attributes:
        folder: the folder of the page.
        size: size of all its files in bytes.
        export: the report of `lp.export_tflite`, or with `trainable` of
            `lp.export_trainable_tflite`.
    """

    folder: str
    size: int
    export: ExportReport | TrainableReport

    def __str__(self) -> str:
        return (
            f"{self.export}\n"
            f"{self.folder}: a page of {self.size / 2**20:.1f} MiB, with LiteRT.js. Put the folder "
            "on any web server; on this computer:\n"
            f"  python -m http.server 8000 --bind 127.0.0.1 --directory {self.folder}"
        )


def export_web(
    model: keras.Model,
    folder: str | os.PathLike[str],
    *,
    title: str | None = None,
    description: str = "",
    card: str | None = None,
    feature_names: Sequence[str] | None = None,
    metadata: TFLiteMetadata | None = None,
    trainable: Trainable | None = None,
    epochs: int = 10,
    **options: Any,
) -> WebReport:
    """Writes a web page that runs a model in the browser, on phones too; it can also train it.

    The folder is a static site: any web server can serve it, and a link is the whole app. It has
    the `.tflite` file of the model, LiteRT.js, and a page that fits the model: a drawing area for
    images of one channel up to 32 pixels, a camera or a picture file for other images, a text field
    for models with an `lp.TextEncoder`, numbers otherwise. Pictures are scaled to the size of the
    input. The page shows classes with probabilities, labels above their threshold or values, and
    how long the computation took.

    With `trainable`, users label examples of their own and train on them. The trained weights stay
    in the storage of the browser until the user presses "Forget everything". Examples stay in the
    memory of the page. A policy in the page forbids the browser to contact any other site.

    LiteRT.js is downloaded once with npm, checked, and kept in the cache of the user.

    Args:
        model: a built Keras model; compiled, if it is trainable. Inputs are float32, int32 or
            uint8.
        folder: folder to write. Files of an earlier page are replaced.
        title: title of the page. Defaults to None: the name of the model.
        description: a sentence below the title. Defaults to an empty string.
        card: text of the model card, such as `lp.report(...).card`. Defaults to None: the report of
            the export.
        feature_names: names for the numbers of an input with as many numbers. Defaults to None:
            they are counted.
        metadata: as in `lp.export_tflite`; `mean` and `std` say how pixels from 0 to 255 are
            scaled. Defaults to None: not at all.
        trainable: the part that trains in the browser: `"head"`, an integer, a list of layer names
            or `"all"`, as in `lp.export_trainable_tflite`. Defaults to None: the page does not
            train.
        epochs: number of passes over the examples when the user presses "Train". Defaults to 10.
        **options: arguments of `lp.export_tflite`, such as `quantization`; with `trainable`, of
            `lp.export_trainable_tflite`, such as `learning_rate`.

    Returns:
        A `WebReport`, which can be printed.

    Raises:
        ValueError: the page cannot give an input of the model, an argument does not fit, the folder
            has another `index.html`, or the export fails.
        TypeError: `model` is not a Keras model, or an option is unknown.
        ImportError: npm or `ai-edge-litert` is not installed.
        ConnectionError: npm cannot download LiteRT.js.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"])
    >>> made = lp.export_web(model, "sums_page", title="Sums", trainable="head")
    >>> made.export.signatures[:3]
    ('infer', 'train', 'evaluate')
    """
    return write_site(
        model,
        folder,
        title=title,
        description=description,
        card=card,
        feature_names=feature_names,
        metadata=metadata,
        trainable=trainable,
        epochs=epochs,
        server=False,
        **options,
    )


def write_site(
    model: keras.Model,
    folder: str | os.PathLike[str],
    *,
    title: str | None,
    description: str,
    card: str | None,
    feature_names: Sequence[str] | None,
    metadata: TFLiteMetadata | None,
    trainable: Trainable | None,
    epochs: int,
    server: bool,
    **options: Any,
) -> WebReport:
    """Writes a page; with `server`, one that takes part in the rounds of the server of the page."""
    check_positive("epochs", epochs, integer=True)
    if "soft_labels" in options or (trainable is None and options.get("batch_size", 1) != 1):
        raise ValueError(
            "A page runs one example at a time, and users choose one class. Received: "
            f"{sorted(options.keys() & {'soft_labels', 'batch_size'})}. Leave them out."
        )
    if metadata is not None and not isinstance(metadata, TFLiteMetadata):
        raise TypeError(f"`metadata` must be lp.TFLiteMetadata. Received: metadata={metadata!r}.")
    folder = Path(folder).expanduser()
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (_CONFIG not in found and found - {_FILE}):  # a file alone: a kill
        raise ValueError(
            "`folder` must be new or have an earlier page of this function. Received: "
            f"{str(folder)!r}, which is something else. Choose another folder."
        )
    described = describe(model, "export_web")
    shape = described.model.outputs[0].shape
    if trainable is not None and len(shape) > 2:
        raise ValueError(
            "A page trains models with one label, or one row of labels, per example. Received: "
            f"a model with output of shape {shape}. Leave `trainable` out."
        )
    metadata = metadata or TFLiteMetadata()
    config = describe_page(described, metadata, feature_names, trainable is not None)
    runtime = litert_js()
    path = folder / _FILE
    report: ExportReport | TrainableReport
    if trainable is None:
        report = export_tflite(model, path, metadata=metadata, **options)
        config["signature"] = next(iter(report.contents.signatures))
        config["training"] = None
    else:
        report = export_trainable_tflite(model, path, trainable=trainable, **options)
        config["signature"] = "infer"
        config["training"] = {"epochs": int(epochs), **_labels(path)}
    title = title or model.name.replace("_", " ")
    text = card or f"{model.count_params():,} parameters\n{dataclasses.replace(report, path=_FILE)}"
    config |= {"file": _FILE, "server": server}
    write_whole(folder / _CONFIG, json.dumps(config).encode())  # first: it marks the folder
    shutil.copytree(runtime, folder / "litert", dirs_exist_ok=True)
    files = {name: site_file(name) for name in STATIC}
    files["index.html"] = index(title, description, text)
    for name, content in files.items():
        write_whole(folder / name, content.encode())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return WebReport(str(folder), size, report)


def _labels(path: Path) -> dict[str, Any]:
    """Returns what the page must know about the labels of a trainable file."""
    content = path.read_bytes()
    inputs, _ = read_contents(content).signatures["train"]
    labels = next(tensor for tensor in inputs if tensor.name == "y")
    return {"model": hashlib.sha256(content).hexdigest(), "classes": labels.dtype == "int32"}
