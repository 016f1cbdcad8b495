"""Collects the metadata of a model: labels, thresholds, vocabulary, pixel normalization."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from keras_lp.backbones.text import TextEncoder
from keras_lp.tasks.regression import Regression
from keras_lp.tflite.contents import read_contents
from keras_lp.tflite.interface import Interface, Output
from keras_lp.tflite.metadata.metadata import (
    TensorMetadata,
    label_files,
    least_scores,
    write_metadata,
)
from keras_lp.utils.arguments import check_positive


@dataclasses.dataclass(frozen=True)
class TFLiteMetadata:
    """Metadata of a `.tflite` file in addition to what the model provides.

    The model provides its class names. Images have raw pixel values from 0 to 255 by default, as
    models with a named backbone of keras_lp expect.

    Thresholds of a `MultiLabel` (`lp.choose_thresholds`) are written too. The outputs of the file
    are still probabilities, but a client that follows the metadata, such as MediaPipe, shows only
    labels above their threshold. The score calibration file does not change the scores; it stores
    the threshold of each label as the minimum score, below which a score becomes 0. The score
    threshold of the output is the lowest of the thresholds.

    Args:
        vocabulary: the tokens in the order of their ids, for the input that takes ids. Written to
            `vocab.txt`, one token per line. Defaults to None: that of the model's `lp.TextEncoder`.
        description: description of the model. Defaults to an empty string.
        mean: value that a client subtracts from each pixel, for a custom backbone that expects
            scaled images. Defaults to 0.
        std: value by which a client then divides each pixel; 255 for images from 0 to 1. Defaults
            to 1.

    Raises:
        ValueError: `std` is not above 0, or a token occurs twice or contains a line break.
        TypeError: `vocabulary` is not a list of strings.

    Example:

    >>> import keras, keras_lp as lp
    >>> ids = keras.Input((5,), dtype="int32", name="ids")
    >>> mean = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(4, 8)(ids))
    >>> model = lp.transfer_model(keras.Model(ids, mean), ["sports", "politics"])
    >>> metadata = lp.TFLiteMetadata(vocabulary=["", "[UNK]", "goal", "vote"])
    >>> report = lp.export_tflite(model, "news.tflite", metadata=metadata, verify=False)
    >>> sorted(report.contents.files)
    ['labels.txt', 'vocab.txt']
    """

    vocabulary: Sequence[str] | None = None
    description: str = ""
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_positive("std", self.std)
        if self.vocabulary is None:
            return
        listed = isinstance(self.vocabulary, Sequence) and not isinstance(self.vocabulary, str)
        if not listed or not all(isinstance(token, str) for token in self.vocabulary):
            raise TypeError(
                "`vocabulary` must be a list of strings in the order of their ids. Received: "
                f"a {type(self.vocabulary).__name__}. Read a file with "
                "`Path(file).read_text().splitlines()`."
            )
        _check_lines("vocabulary", self.vocabulary)
        if len(set(self.vocabulary)) != len(self.vocabulary):
            twice = next(t for t in self.vocabulary if self.vocabulary.count(t) > 1)
            raise ValueError(
                f"The tokens of `vocabulary` must be unique. Received: {twice!r} more than once."
            )


def annotate(content: bytes, described: Interface, options: TFLiteMetadata) -> bytes:
    """Adds the metadata of a model to its file.

    Raises:
        ValueError: the vocabulary does not fit the model.
    """
    files: dict[str, str] = {}
    about_inputs = _inputs(described, options, files)
    several = len(described.outputs) > 1
    about_outputs = {one.name: _output(one, several, files) for one in described.outputs}
    found = read_contents(content)  # the order in the subgraph differs from the signature
    return write_metadata(
        content,
        described.model.name,
        options.description,
        [about_inputs[tensor.name] for tensor in found.inputs],
        [about_outputs[tensor.name] for tensor in found.outputs],
        files,
    )


def _inputs(
    described: Interface, options: TFLiteMetadata, files: dict[str, str]
) -> dict[str, TensorMetadata]:
    about = {}
    for one in described.inputs:
        channels = one.shape[-1] if len(one.shape) == 3 else None
        if channels in (1, 3):
            about[one.name] = TensorMetadata(
                one.name, "An image.", channels, float(options.mean), float(options.std)
            )
        else:
            about[one.name] = TensorMetadata(one.name)
    encoder = TextEncoder.of(described.model)
    vocabulary = options.vocabulary
    if vocabulary is None and encoder is not None:
        vocabulary = encoder.tokens
    if vocabulary is not None:
        name = input_of_ids(described, len(vocabulary))
        files["vocab.txt"] = "\n".join(vocabulary)
        kind = (
            f"Ids of {encoder.level.replace('_', ' ')}s." if encoder is not None else "Token ids."
        )
        about[name] = dataclasses.replace(about[name], description=kind, vocabulary="vocab.txt")
    return about


def input_of_ids(described: Interface, tokens: int) -> str:
    """Returns the input with the largest Embedding; others hold segments or positions."""
    sizes = {one.name: one.ids for one in described.inputs if one.ids is not None}
    if not sizes:
        raise ValueError(
            "`vocabulary` requires an input whose ids go into an Embedding. Received: model "
            f"{described.model.name!r} with the inputs {described.input_names} and no such input. "
            "Leave `vocabulary` out."
        )
    name = max(sizes, key=sizes.__getitem__)
    if tokens > sizes[name]:
        raise ValueError(
            "`vocabulary` must have at most as many tokens as the Embedding has rows. Received: "
            f"{tokens:,} tokens for {sizes[name]:,} rows. Pass the vocabulary that the model was "
            "trained with."
        )
    return name


def _output(output: Output, several: bool, files: dict[str, str]) -> TensorMetadata:
    name = ""
    if output.class_names:
        name = f"labels_{output.name}.txt" if several else "labels.txt"
        files.update(label_files(name, output.class_names))
    calibration = ""
    if output.thresholds:
        calibration = f"thresholds_{output.name}.txt" if several else "thresholds.txt"
        files[calibration] = least_scores(output.thresholds)
    if isinstance(output.task, Regression):
        description = "Values in the units of the labels."
    else:
        description = "" if output.kind == "values" else "Probabilities."
    least = min(output.thresholds, default=None)
    return TensorMetadata(
        output.name, description, labels=name, calibration=calibration, least_score=least
    )


def _check_lines(argument: str, texts: Sequence[str]) -> None:
    broken = next((text for text in texts if len(text.splitlines()) > 1 or "\n" in text), None)
    if broken is not None:
        raise ValueError(
            f"Each entry of `{argument}` must be a single line. Received: {broken!r}, which has a "
            "line break. Remove the line break, or export with metadata=False."
        )
