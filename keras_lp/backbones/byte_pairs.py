"""Byte pair encoding: the training of its pieces by sentencepiece, and KerasHub's tokenizer."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_INSTALL = "Install them: pip install 'keras_lp[hub]'"
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3  # types of pieces
_SETTINGS = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": -1,
    "eos_id": -1,
}


def train_pieces(texts: Iterator[str], size: int) -> list[str]:
    """Returns the pieces that byte pair encoding finds in texts, in the order of their merges.

    Args:
        texts: texts in their final form.
        size: largest number of pieces, with padding and unknown tokens.

    Raises:
        ValueError: if there is no text, or `size` is smaller than the number of different
            characters.
    """
    sentencepiece = _sentencepiece()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=2**20,  # bytes; longer texts are left out
            minloglevel=2,
            **_SETTINGS,
        )
    except RuntimeError as error:
        raise ValueError(
            "Byte pairs need texts, and a `size` above the number of different characters. "
            f"Received: size={size}. sentencepiece says: {error}"
        ) from error
    found = _model_proto().FromString(model.getvalue())
    return [piece.piece for piece in found.pieces if piece.type == _NORMAL]


def byte_pair_tokenizer(pieces: Sequence[str], length: int) -> Callable[[Any], Any]:
    """Returns KerasHub's `SentencePieceTokenizer` for these pieces.

    Args:
        pieces: output of `train_pieces`; the first has id 2.
        length: number of ids of a text.
    """
    _sentencepiece()
    try:
        from keras_hub.tokenizers import SentencePieceTokenizer
    except ImportError as error:
        raise ImportError(f"Byte pairs need keras-hub. {_INSTALL}") from error
    proto = _model_proto()()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    for name in ("pad_id", "unk_id", "bos_id", "eos_id"):
        setattr(proto.trainer_spec, name, _SETTINGS[name])
    proto.normalizer_spec.name = _SETTINGS["normalization_rule_name"]
    proto.pieces.add(piece="<pad>", score=0, type=_CONTROL)
    proto.pieces.add(piece="<unk>", score=0, type=_UNKNOWN)
    for i, piece in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-float(i), type=_NORMAL)
    return SentencePieceTokenizer(proto.SerializeToString(), sequence_length=length)


def _sentencepiece() -> Any:
    try:
        import sentencepiece
        import tensorflow_text  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Byte pairs need sentencepiece and tensorflow-text. {_INSTALL}"
        ) from error
    return sentencepiece


def _model_proto() -> Any:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    return ModelProto
