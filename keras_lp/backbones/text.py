"""Encodes texts as ids, and keeps the vocabulary in the model that takes them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones.byte_pairs import byte_pair_tokenizer, train_pieces
from keras_lp.utils.arguments import check_choice, check_positive
from keras_lp.utils.keras_internals import sublayers

Level = Literal["word", "character", "byte_pair"]
_PUNCTUATION = r"""[!"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~']"""
_RESERVED = ["", "[UNK]"]  # padding and unknown tokens
_HELD_OUT = ("val", "test")  # how the names of splits begin


class TextEncoder:
    """Encodes texts as ids of words, characters or byte pairs.

    Words and characters are found by `keras.layers.TextVectorization`, byte pairs by KerasHub's
    `SentencePieceTokenizer`, which needs the extra `hub`. Texts are lowercased and white space
    becomes one space; words also lose punctuation. Id 0 is padding and id 1 an unknown token. The
    others are ordered by frequency, byte pairs in the order in which they are merged: pieces of
    words, in which `▁` stands for the space before a word. `embedding` makes the
    first layer of a network: its config has the vocabulary, so `of(model)` returns the encoder of a
    loaded model, and `lp.export_tflite` writes the vocabulary to the file.

    Args:
        vocabulary: the tokens from id 2 on. `fit` finds them.
        level: `"word"`, `"character"` or `"byte_pair"`. Defaults to `"word"`.
        length: number of ids of a text; longer texts are cut, shorter ones padded with 0. Defaults
            to 64.

    Raises:
        ValueError: if a token occurs twice or is empty, the level is unknown, or `length` is not 1
            or more.

    Example:

    >>> import keras, keras_lp as lp
    >>> encoder = lp.TextEncoder.fit(["A goal!", "a vote", "the goal"], length=4)
    >>> encoder.vocabulary
    ('goal', 'a', 'vote', 'the')
    >>> encoder(["The goal, a dream"]).tolist()
    [[5, 2, 3, 1]]
    >>> pooled = keras.layers.GlobalAveragePooling1D()
    >>> network = keras.Sequential([keras.Input((4,), dtype="int32"), encoder.embedding(8), pooled])
    >>> model = lp.transfer_model(network, 2, pretrained=False, trainable="all")
    >>> lp.TextEncoder.of(model).vocabulary == encoder.vocabulary
    True

    Reference: Sennrich et al., 2016, for byte pairs (arXiv:1508.07909).
    """

    def __init__(
        self, vocabulary: Sequence[str], *, level: Level = "word", length: int = 64
    ) -> None:
        check_choice("level", level, get_args(Level))
        check_positive("length", length, integer=True)
        tokens = tuple(map(str, vocabulary))
        twice = next((token for token, n in Counter(tokens).items() if n > 1), None)
        upper = next((token for token in tokens if token != token.lower()), None)
        if not tokens or twice is not None or upper is not None or "" in tokens:
            about = f"{twice!r} twice" if upper is None else f"{upper!r}"
            raise ValueError(
                "`vocabulary` must have tokens in lower case, each once, without the empty token "
                f"and [UNK]. Received: {len(tokens)} tokens, {about}."
            )
        self.vocabulary = tokens
        self.level = level
        self.length = int(length)

    @classmethod
    def fit(
        cls, texts: Any, *, size: int = 10_000, level: Level = "word", length: int = 64
    ) -> TextEncoder:
        """Returns an encoder whose vocabulary are the most frequent tokens of training texts.

        Args:
            texts: strings, or a `tf.data.Dataset` of strings or of `(strings, labels)`, batched or
                not. Pass training texts only: a data set of `lp.load_dataset` with another split
                raises an error.
            size: number of ids, with padding and unknown tokens. Defaults to 10,000.
            level: `"word"`, `"character"` or `"byte_pair"`. Defaults to `"word"`.
            length: number of ids of a text. Defaults to 64.

        Raises:
            ValueError: if there are no tokens, the texts are a validation or test split, or `size`
                is too small for byte pairs.
            ImportError: if byte pairs need a package that is not installed.
            TypeError: if the texts are not strings.
        """
        check_choice("level", level, get_args(Level))
        check_positive("length", length, integer=True)
        check_positive("size", size, integer=True)
        split = str(getattr(texts, "split", "train"))
        held_out = [part for part in split.split("+") if part.strip().startswith(_HELD_OUT)]
        if isinstance(texts, tf.data.Dataset) and held_out:
            raise ValueError(
                "An encoder must be fitted on training texts: otherwise the model knows words of "
                f"the texts it is tested on. Received: a data set with split={split!r}."
            )
        batches = _batches(texts, level)
        if level == "byte_pair":
            rows = batches.unbatch().as_numpy_iterator()
            found = train_pieces((row.decode(errors="replace") for row in rows), size)
        else:
            layer = _vectorization(level, length, max_tokens=max(size, len(_RESERVED) + 1))
            layer.adapt(batches)
            found = layer.get_vocabulary()[len(_RESERVED) :]
        if not found:
            raise ValueError("A vocabulary needs texts with tokens. Received: none.")
        return cls(found, level=level, length=length)

    @staticmethod
    def of(model: keras.Model) -> TextEncoder | None:
        """Returns the encoder of a model with an `embedding` layer, None if it has none."""
        layers = (layer for layer in sublayers(model) if isinstance(layer, TextEmbedding))
        return next((layer.encoder for layer in layers), None)

    def __call__(self, texts: Any) -> Any:
        """Encodes texts.

        Args:
            texts: strings `(texts,)`, or a string tensor `(texts,)` or of one text, for example in
                `map` of a `tf.data.Dataset`.

        Returns:
            int32 ids, `(texts, length)`: a tensor for a tensor, else an array.

        Raises:
            TypeError: if the texts are not strings.
        """
        if tf.is_tensor(texts):
            return tf.cast(self._layer(_prepared(texts, self.level)), tf.int32)
        ids = self._layer(_prepared(tf.constant(_strings(texts)), self.level))
        return np.asarray(ids, "int32")

    def embedding(self, width: int, **kwargs: Any) -> TextEmbedding:
        """Returns a new layer that turns ids into vectors `(texts, length, width)`.

        Args:
            width: size of the vectors.
            **kwargs: arguments of `keras.layers.Embedding`, such as `mask_zero`.
        """
        return TextEmbedding(self.get_config(), width, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"vocabulary": list(self.vocabulary), "level": self.level, "length": self.length}

    @functools.cached_property
    def _layer(self) -> Callable[[Any], Any]:
        with tf.init_scope():  # its tables are not part of the graph that first uses it
            if self.level == "byte_pair":
                return byte_pair_tokenizer(self.vocabulary, self.length)
            return _vectorization(self.level, self.length, vocabulary=list(self.vocabulary))

    @property
    def tokens(self) -> list[str]:
        """All tokens in the order of their ids."""
        return [*_RESERVED, *self.vocabulary]


@keras.saving.register_keras_serializable("keras_lp")
class TextEmbedding(keras.layers.Embedding):
    """An Embedding whose config has the encoder of its ids.

    Args:
        encoder: output of `TextEncoder.get_config`.
        width: size of the vectors.
        **kwargs: arguments of `keras.layers.Embedding`.
    """

    def __init__(self, encoder: dict[str, Any], width: int, **kwargs: Any) -> None:
        super().__init__(len(_RESERVED) + len(encoder["vocabulary"]), width, **kwargs)
        self._encoder = encoder

    @property
    def encoder(self) -> TextEncoder:
        """The encoder of the ids."""
        return TextEncoder(**self._encoder)

    def get_config(self) -> dict[str, Any]:
        """Returns the config of the layer, with the vocabulary."""
        config = super().get_config()
        del config["input_dim"]
        width = config.pop("output_dim")
        return {**config, "encoder": dict(self._encoder), "width": width}


def _vectorization(level: Level, length: int, **kwargs: Any) -> keras.layers.TextVectorization:
    return keras.layers.TextVectorization(
        standardize=None,
        split="whitespace" if level == "word" else "character",
        output_sequence_length=length,
        **kwargs,
    )


def _prepared(texts: Any, level: Level) -> Any:
    texts = tf.strings.lower(texts, encoding="utf-8")
    if level == "word":
        texts = tf.strings.regex_replace(texts, _PUNCTUATION, "")
    return tf.strings.strip(tf.strings.regex_replace(texts, r"\s+", " "))


def _batches(texts: Any, level: Level) -> tf.data.Dataset:
    if not isinstance(texts, tf.data.Dataset):
        dataset = tf.data.Dataset.from_tensor_slices(_strings(texts)).batch(1024)
        return dataset.map(lambda batch: _prepared(batch, level))
    spec = texts.element_spec
    dataset = texts.map(lambda x, *_: x) if isinstance(spec, tuple) else texts
    if (
        not isinstance(dataset.element_spec, tf.TensorSpec)
        or dataset.element_spec.dtype != "string"
    ):
        raise TypeError(f"Texts must be strings. Received: a data set of {dataset.element_spec}.")
    if dataset.element_spec.shape.rank == 0:
        dataset = dataset.batch(1024)
    return dataset.map(lambda batch: _prepared(batch, level))


def _strings(texts: Any) -> list[Any]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, (Iterable, np.ndarray)):
        raise TypeError(f"Texts must be a list of strings. Received: {texts!r}.")
    listed = list(texts)
    wrong = next((text for text in listed if not isinstance(text, (str, bytes))), None)
    if wrong is not None or not listed:
        raise TypeError(
            f"Texts must be a list of strings. Received: {wrong!r} among {len(listed)} texts."
        )
    return listed
