"""Small language models of KerasHub, from configs and without a file."""

import string

import numpy as np
import pytest

keras_hub = pytest.importorskip("keras_hub")

LANGUAGE = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "max_sequence_length": 12,
    "dropout": 0.5,
}
SENTENCES = ["the good film", "the bad play", "good good the", "bad film"]
LABELS = np.array([1, 0, 1, 0])


def bert_classifier():
    """A classifier of two classes whose tokens are words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted(set(" ".join(SENTENCES).split()))
    return keras_hub.models.BertTextClassifier(
        keras_hub.models.BertBackbone(**{**LANGUAGE, "dropout": 0.0}),
        num_classes=2,
        dropout=0.0,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            keras_hub.models.BertTokenizer(vocabulary=special + words), sequence_length=8
        ),
    )


def gpt2_language_model():
    """A language model whose tokens are letters, the blank ("Ġ") and "th"."""
    tokens = [*string.ascii_lowercase, "Ġ", "th", "<|endoftext|>"]
    tokenizer = keras_hub.models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)}, merges=["t h"]
    )
    return keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone(**{**LANGUAGE, "dropout": 0.0}),
        keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=12),
    )
