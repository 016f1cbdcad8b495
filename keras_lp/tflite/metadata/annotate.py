"""Which metadata the file of a model gets: labels, thresholds, a vocabulary, what pixels need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import keras

from keras_lp.tasks.regression import Regression
from keras_lp.tflite.contents import read_contents
from keras_lp.tflite.interface import Output, input_names, outputs, vocabulary_sizes
from keras_lp.tflite.metadata.metadata import (
    TensorMetadata,
    label_files,
    least_scores,
    write_metadata,
)
from keras_lp.utils.arguments import check_positive


@dataclasses.dataclass(frozen=True)
class TFLiteMetadata:
    """What the metadata of a phone file say beyond what the model knows.

    The model knows the names of its classes. Pictures come as raw values from 0 to 255, which is
    how models of keras_lp with a named backbone take them.

    Thresholds of a `MultiLabel` (`lp.choose_thresholds`) are written too. The model's outputs stay
    the probabilities, but a client that follows the metadata, as MediaPipe does, shows only labels
    above their threshold: the file of the output's score calibration leaves scores as they are and
    has the thresholds as the least score of each label, below which a score is 0, and the least
    threshold is the score threshold of the output.

    Args:
        vocabulary: the tokens in the order of their ids, for the input that holds ids: written as
            `vocab.txt`, a token a line. Defaults to None.
        description: a sentence for whoever opens the file. Defaults to none.
        mean: what a client subtracts from each pixel, where your own backbone takes scaled
            pictures. Defaults to 0.
        std: what it then divides by; `std=255` for pictures from 0 to 1. Defaults to 1.

    Raises:
        ValueError: a `std` that is not above 0; a token twice or with a line break in it.
        TypeError: a vocabulary that is no list of strings.

    Example:

    ```python
    lp.export_tflite(model, "news.tflite", metadata=lp.TFLiteMetadata(vocabulary=words))
    ```
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
                f"The tokens of a vocabulary must differ. Received: {twice!r} more than once."
            )


def annotate(content: bytes, model: keras.Model, options: TFLiteMetadata) -> bytes:
    """Returns the file of a model with its metadata.

    Raises:
        ValueError: a vocabulary that does not fit the model.
    """
    files: dict[str, str] = {}
    described = outputs(model)
    about_inputs = _inputs(model, options, files)
    about_outputs = {one.name: _output(one, len(described) > 1, files) for one in described}
    found = read_contents(content)  # the order of the subgraph is not that of the signature
    return write_metadata(
        content,
        model.name,
        options.description,
        [about_inputs[tensor.name] for tensor in found.inputs],
        [about_outputs[tensor.name] for tensor in found.outputs],
        files,
    )


def _inputs(
    model: keras.Model, options: TFLiteMetadata, files: dict[str, str]
) -> dict[str, TensorMetadata]:
    described = {}
    for name, tensor in zip(input_names(model), model.inputs, strict=True):
        channels = tensor.shape[-1] if len(tensor.shape) == 4 else None
        if channels in (1, 3):
            described[name] = TensorMetadata(
                name, "A picture.", channels, float(options.mean), float(options.std)
            )
        else:
            described[name] = TensorMetadata(name)
    if options.vocabulary is not None:
        name = _input_of_ids(model, len(options.vocabulary))
        files["vocab.txt"] = "\n".join(options.vocabulary)
        described[name] = dataclasses.replace(
            described[name], description="Token ids.", vocabulary="vocab.txt"
        )
    return described


def _input_of_ids(model: keras.Model, tokens: int) -> str:
    """The input with the largest Embedding: others hold segments or positions."""
    sizes = vocabulary_sizes(model)
    if not sizes:
        raise ValueError(
            "A vocabulary belongs to an input whose ids go into an Embedding. Received: model "
            f"{model.name!r} with the inputs {input_names(model)}, of which none does. Leave "
            "`vocabulary` out."
        )
    index = max(sizes, key=sizes.__getitem__)
    if tokens > sizes[index]:
        raise ValueError(
            "A vocabulary has at most as many tokens as the Embedding has rows. Received: "
            f"{tokens:,} tokens for {sizes[index]:,} rows. Pass the vocabulary that the model was "
            "trained with."
        )
    return input_names(model)[index]


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
            f"The file holds `{argument}` a line each. Received: {broken!r}, which has a line "
            "break. Name it otherwise, or export with metadata=False."
        )
