"""From a folder of images to a phone: `python -m keras_lp train FOLDER --export phone.tflite`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_lp as lp
from keras_lp.tasks.heads import tasks
from keras_lp.utils.text_table import text_table

_RATE = 2e-4  # twice the highest rate of fine-tuning
_SHUFFLED = 2048  # images at most in the memory of the shuffling
_EXAMPLE = """example:
  python -m keras_lp train pets/ --backbone MobileNetV2 --export pets.tflite
  python -m keras_lp predict model.keras cat.jpg

A folder has one folder of images per class, such as pets/cat and pets/dog.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 if the input is wrong."""
    given = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`shuffle=True` was passed, but will be ignored")
            given.command(given)
    except (ValueError, TypeError, OSError, ImportError, tf.errors.OpError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(given: argparse.Namespace) -> None:
    """Trains a model on a folder: a solved head, and fine-tuning if it helps."""
    if given.output.suffix != ".keras":
        raise ValueError(f"--output must end in .keras. Received: {given.output}.")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    splits = {
        split: lp.load_folder(given.folder, split=split, image_size=given.image_size, batch_size=32)
        for split in ("train", "validation", "test")
    }
    names = splits["train"].class_names
    if isinstance(names, dict) or names is None:
        raise ValueError(
            "The command trains one task with classes. Received: the labels "
            f"{names}. Use lp.multitask_model in a program."
        )
    counts = {split: _labels(data) for split, data in splits.items()}
    _print_counts(names, counts)
    keras.utils.set_random_seed(given.seed)
    model = lp.transfer_model(
        given.backbone,
        names,
        input_shape=(given.image_size, given.image_size, 3),
        weights=given.weights or "imagenet",
        backbone_kwargs=dict(given.set or []),
    )
    held_out = splits["validation"]
    history = lp.fit_head(model, splits["train"], validation_data=held_out)
    solved = history.history["val_loss"][-1]
    if given.epochs:
        weights = model.get_weights()
        size = min(len(counts["train"]), _SHUFFLED)
        train = splits["train"].unbatch().shuffle(size, given.seed)
        steps = tf.data.experimental.assert_cardinality(len(splits["train"]))
        history = lp.fit_two_phase(
            model,
            train.batch(32).apply(steps),
            validation_data=held_out,
            head_epochs=0,
            epochs=given.epochs,
            learning_rate=_RATE,
        )
        tuned = min(history.history["val_loss"])
        if tuned >= solved:
            model.set_weights(weights)
        kept = "kept" if tuned < solved else "not kept"
        print(f"Fine-tuning: validation loss {tuned:.4f}, solved head {solved:.4f}: {kept}.")
    _print_scores(model, splits["test"], counts["test"], "test")
    model.save(given.output)
    print(f"Saved {given.output}.")
    if given.export:
        _export(model, given.export, splits["test"], given.quantization, splits["train"])


def evaluate(given: argparse.Namespace) -> None:
    """Prints the accuracy of a model on a split of a folder."""
    model = _load(given.model)
    data = lp.load_folder(
        given.folder, split=given.split, image_size=_size(model), channels=_channels(model)
    )
    known = lp.class_names(model)["predictions"]
    if data.class_names != known:
        raise ValueError(
            f"The folder must have the classes of the model, {known}. Received: {data.class_names}."
        )
    _print_scores(model, data, _labels(data), given.split)


def predict(given: argparse.Namespace) -> None:
    """Prints the class of image files and its probability."""
    model = _load(given.model)
    size = _size(model)
    mode = "grayscale" if _channels(model) == 1 else "rgb"
    loaded = (keras.utils.load_img(file, color_mode=mode) for file in given.files)
    images = [keras.utils.img_to_array(image) for image in loaded]
    x = np.stack([np.asarray(keras.ops.image.resize(i, size, antialias=True)) for i in images])
    answers = lp.decode_predictions(model, model.predict(np.round(x), verbose=0))
    rows = [["file", "class", "probability"]]
    for file, answer in zip(given.files, answers, strict=True):
        name, probability = answer[0]
        rows.append([str(file), name, f"{probability:.3f}"])
    print(text_table(rows, left=2))


def export(given: argparse.Namespace) -> None:
    """Writes a model as a `.tflite` file."""
    model = _load(given.model)
    test = calibration = None
    if given.folder:
        test, calibration = (
            lp.load_folder(
                given.folder, split=split, image_size=_size(model), channels=_channels(model)
            )
            for split in ("test", "train")
        )
    _export(model, given.path, test, given.quantization, calibration)


def report(given: argparse.Namespace) -> None:
    """Prints the classes, the inputs and the layers of a model."""
    model = _load(given.model)
    for task, names in lp.class_names(model).items():
        print(f"{task}: {', '.join(names)}")
    print(f"input: {model.input_shape}")
    lp.trainable_report(model)


def _export(model: Any, path: Path, test: Any, quantization: str | None, calibration: Any) -> None:
    arguments: dict[str, Any] = {"quantization": quantization}
    if test is not None:
        arguments["verification_data"] = _arrays(test)
    if quantization == "int8":
        if calibration is None:
            raise ValueError("--quantization int8 needs images: pass --folder. Received: none.")
        arguments["calibration_data"] = _arrays(calibration)[0]
    print(lp.export_tflite(model, path, **arguments))


def _load(path: Path) -> Any:
    """Returns a model that `train` could have made."""
    if not path.exists():
        raise FileNotFoundError(f"The model file must exist. Received: {path}.")
    model = keras.models.load_model(path)
    known = list(tasks(model).values())
    one = len(known) == 1 and isinstance(known[0], lp.Classification)
    if not one or len(model.inputs) != 1 or len(model.input_shape) != 4:
        raise ValueError(
            "The command takes a model of lp.transfer_model that classifies images. Received: "
            f"{path}, with the tasks {list(tasks(model))}. Use it in a program."
        )
    return model


def _size(model: Any) -> tuple[int, int]:
    height, width = model.input_shape[1:3]
    return height, width


def _channels(model: Any) -> Any:
    return model.input_shape[3]


def _arrays(data: Any) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*data.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _labels(data: Any) -> np.ndarray:
    return np.concatenate([labels for _, labels in data.as_numpy_iterator()])


def _print_counts(names: list[str], counts: dict[str, np.ndarray]) -> None:
    rows = [["class", *counts]]
    for number, name in enumerate(names):
        rows.append([name, *(str(int((labels == number).sum())) for labels in counts.values())])
    print(text_table(rows, left=1))


def _print_scores(model: Any, data: Any, labels: np.ndarray, split: str) -> None:
    found = model.predict(data, verbose=0).argmax(-1)
    names = lp.class_names(model)["predictions"]
    rows = [["class", "images", "recall", "precision"]]
    for number, name in enumerate(names):
        own, said = labels == number, found == number
        hits = (own & said).sum()
        shares = (f"{hits / n.sum():.3f}" if n.any() else "" for n in (own, said))
        rows.append([name, str(int(own.sum())), *shares])
    right = int((found == labels).sum())
    print(f"Accuracy on the {split} split: {right}/{len(labels)} = {right / len(labels):.3f}")
    print(text_table(rows, left=1))


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m keras_lp",
        description="Trains image classifiers on folders and writes them for phones.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(command: Any) -> argparse.ArgumentParser:
        one = commands.add_parser(
            command.__name__,
            help=command.__doc__,
            description=command.__doc__,
            epilog=_EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(command=command)
        return one

    one = add(train)
    one.add_argument("folder", type=Path, help="folder with a folder of images per class, or CSV")
    one.add_argument("--backbone", default="MobileNetV2", help="name (default MobileNetV2) or file")
    one.add_argument("--weights", help="weights file (default: ImageNet weights, downloaded once)")
    one.add_argument(
        "--set", type=_setting, action="append", metavar="NAME=VALUE",
        help="argument of the backbone, such as alpha=0.25",
    )  # fmt: skip
    one.add_argument("--image-size", type=int, default=160, help="pixels (default 160)")
    one.add_argument("--epochs", type=int, default=3, help="of fine-tuning (default 3; 0: none)")
    one.add_argument("--seed", type=int, default=0, help="of the training (default 0)")
    one.add_argument("--output", type=Path, default=Path("model.keras"), help="model file")
    one.add_argument("--export", type=Path, help="also write this .tflite file")
    _add_quantization(one)

    one = add(evaluate)
    one.add_argument("model", type=Path, help=".keras file")
    one.add_argument("folder", type=Path, help="as in train")
    one.add_argument("--split", default="test", help="train, validation or test (default)")

    one = add(predict)
    one.add_argument("model", type=Path, help=".keras file")
    one.add_argument("files", type=Path, nargs="+", help="image files")

    one = add(export)
    one.add_argument("model", type=Path, help=".keras file")
    one.add_argument("path", type=Path, help=".tflite file to write")
    one.add_argument("--folder", type=Path, help="verifies the file with the test split")
    _add_quantization(one)

    one = add(report)
    one.add_argument("model", type=Path, help=".keras file")
    return parser


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantization",
        choices=["float16", "dynamic", "int8"],
        help="of the .tflite file (default: float32)",
    )


if __name__ == "__main__":
    sys.exit(main())
