"""`TextEncoder`: ids compared with an independent implementation, and where the vocabulary goes."""

import re
import sys
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_lp as lp
from keras_lp.tflite.contents import read_contents
from keras_lp.utils.keras_internals import sublayers

TEXTS = ["A goal!  The goal.", "don't vote,\tvote ÄRGER", "äpfel\nund Äpfel"]


def reference():
    """The function that docs/android.md shows."""
    page = (Path(__file__).parents[2] / "docs" / "android.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def encode" in b]
    scope = {}
    exec(block, scope)
    return scope["encode"]


@pytest.mark.parametrize("level", ["word", "character"])
def test_ids_by_hand(level):
    encoder = lp.TextEncoder.fit(TEXTS, level=level, length=20)
    if level == "word":
        assert set(encoder.vocabulary) == {
            *["a", "goal", "the", "dont", "vote", "ärger", "äpfel", "und"]
        }
        counts = Counter(
            ["a", "goal", "the", "goal", "dont", "vote", "vote", "ärger", "äpfel", "und", "äpfel"]
        )
    else:
        counts = Counter("a goal! the goal." + "don't vote, vote ärger" + "äpfel und äpfel")
    assert set(encoder.vocabulary) == set(counts)
    frequencies = [counts[token] for token in encoder.vocabulary]
    assert frequencies == sorted(frequencies, reverse=True)
    ids = encoder(["The  GOAL of Äpfel"])
    assert (ids.dtype, ids.shape) == (np.int32, (1, 20))
    parts = ["the", "goal", "of", "äpfel"] if level == "word" else list("the goal of äpfel")
    expected = [encoder.tokens.index(p) if p in encoder.tokens else 1 for p in parts]
    assert ids[0].tolist() == expected + [0] * (20 - len(expected))


def test_byte_pairs_by_hand():
    """The words of Sennrich et al., 2016, section 3.2, and ten repetitions of each count."""
    words = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    encoder = lp.TextEncoder.fit(words, size=16, level="byte_pair", length=6)
    merges, letters = encoder.vocabulary[:-11], encoder.vocabulary[-11:]
    assert set(letters) == set("▁lowernstdi")
    # "es" and "st" occur 9 times each, then "est" 9 times
    assert merges[0] in ("es", "st")
    assert merges[1] == "est"
    assert len(merges) == 3
    ids = encoder(["Lowest", "newest\tlow", "x y"])
    pieces = [[encoder.tokens[i] for i in row if i] for row in ids]
    assert pieces[0][-1] == "est"
    assert "".join(pieces[0]) == "▁lowest"
    assert "▁newest▁low".startswith("".join(pieces[1]))
    assert pieces[2] == ["▁", "[UNK]", "▁", "[UNK]"]


@pytest.mark.parametrize("level", ["word", "character", "byte_pair"])
def test_the_reference_of_the_documentation_gives_the_same_ids(level, tfds_dir):
    import tensorflow_datasets as tfds

    texts = [row["text"].decode() for row in tfds.as_numpy(tfds.load(
        "trec", split="train", data_dir=tfds_dir))]  # fmt: skip
    for code in ("de", "tr", "vi"):
        rows = tfds.load(f"tatoeba/tatoeba_{code}", split="train", data_dir=tfds_dir)
        texts += [row["source_sentence"].decode() for row in tfds.as_numpy(rows)]
    encoder = lp.TextEncoder.fit(texts[::2], size=3000, level=level, length=30)
    assert len(encoder.tokens) <= 3000
    texts = texts[:: 10 if level == "byte_pair" else 1]  # the reference is slow for byte pairs
    encode = reference()
    found = encoder(texts)
    expected = [encode(text, encoder.tokens, level, 30) for text in texts]
    same = np.all(found == expected, axis=1)
    # Python lowercases the Turkish capital I with a dot to two code points.
    assert all("İ" in text for text, one in zip(texts, same, strict=True) if not one)
    assert same.mean() > 0.99


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(max_codepoint=0x24F, exclude_characters="İ", codec="utf-8")))
def test_the_reference_agrees_on_any_latin_text(text):
    encode = reference()
    for level, encoder in ENCODERS.items():
        if any(ord(c) < 32 or 0x7F <= ord(c) <= 0xA0 for c in text):
            continue  # control characters
        assert encoder([text])[0].tolist() == encode(text, encoder.tokens, level, 12)


ENCODERS = {
    level: lp.TextEncoder.fit(TEXTS, size=60, level=level, length=12)
    for level in ("word", "character", "byte_pair")
}


def test_data_sets_of_texts(tfds_dir):
    train = lp.load_dataset("trec", split="train", data_dir=tfds_dir)
    batched = lp.TextEncoder.fit(train, size=500, length=16)
    single = lp.load_dataset("trec", split="train", data_dir=tfds_dir, batch_size=None)
    x, _ = lp.load_dataset("trec", split="train", data_dir=tfds_dir, batch_size=-1)
    assert batched.vocabulary == lp.TextEncoder.fit(single, size=500).vocabulary
    assert batched.vocabulary == lp.TextEncoder.fit(x, size=500).vocabulary
    ids, _ = next(iter(train.map(lambda text, labels: (batched(text), labels))))
    assert (ids.shape, ids.dtype) == ((32, 16), tf.int32)
    np.testing.assert_array_equal(ids, batched(x[:32]))


@pytest.mark.parametrize("split", ["test", "train+test"])
def test_an_encoder_is_not_fitted_on_held_out_texts(split, tfds_dir):
    dataset = lp.load_dataset("trec", split=split, data_dir=tfds_dir)
    with pytest.raises(ValueError, match=r"fitted on training texts.*Received: a data set with"):
        lp.TextEncoder.fit(dataset)


@pytest.mark.parametrize("level", ["word", "byte_pair"])
def test_the_vocabulary_is_in_the_model_and_in_the_file_for_the_phone(level, tmp_path):
    encoder = lp.TextEncoder.fit(TEXTS, size=40, level=level, length=6)
    layers = [encoder.embedding(4), keras.layers.GlobalAveragePooling1D()]
    network = keras.Sequential([keras.Input((6,), dtype="int32"), *layers])
    model = lp.transfer_model(network, ["a", "b"], pretrained=False, trainable="all")
    ids = encoder(TEXTS)
    model.fit(ids, np.array([0, 1, 0]), verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    again = lp.TextEncoder.of(loaded)
    assert again.get_config() == encoder.get_config()
    np.testing.assert_array_equal(again(TEXTS), ids)
    np.testing.assert_array_equal(loaded.predict(ids, verbose=0), model.predict(ids, verbose=0))
    lp.export_tflite(loaded, tmp_path / "m.tflite", verify=False)
    contents = read_contents((tmp_path / "m.tflite").read_bytes())
    assert contents.files["vocab.txt"].split("\n") == encoder.tokens
    (about,) = contents.inputs
    assert about.metadata.description == f"Ids of {level.replace('_', ' ')}s."
    plain = lp.plain_model(loaded)
    assert not [layer for layer in sublayers(plain) if type(layer).__module__[:8] == "keras_lp"]
    np.testing.assert_allclose(plain.predict(ids, verbose=0), model.predict(ids, verbose=0))
    own = lp.TFLiteMetadata(vocabulary=["", "x"])
    lp.export_tflite(loaded, tmp_path / "own.tflite", metadata=own, verify=False)
    contents = read_contents((tmp_path / "own.tflite").read_bytes())
    assert contents.files["vocab.txt"] == "\nx"


def test_a_model_without_an_encoder_has_none(mlp):
    assert lp.TextEncoder.of(mlp()) is None


def test_byte_pairs_say_which_packages_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"pip install 'keras_lp\[hub\]'"):
        lp.TextEncoder.fit(TEXTS, level="byte_pair")


def test_wrong_texts_and_vocabularies():
    with pytest.raises(TypeError, match=r"must be a list of strings. Received: 'one text'"):
        lp.TextEncoder.fit("one text")
    with pytest.raises(TypeError, match="Received: 3 among 2 texts"):
        lp.TextEncoder.fit(["a", 3])
    with pytest.raises(TypeError, match=r"Texts must be strings. Received: a data set"):
        lp.TextEncoder.fit(tf.data.Dataset.from_tensor_slices([1, 2]))
    with pytest.raises(ValueError, match="needs texts with tokens"):
        lp.TextEncoder.fit(["...", "!"])
    with pytest.raises(ValueError, match=r"Byte pairs need texts.*Received: size=5"):
        lp.TextEncoder.fit(TEXTS, size=5, level="byte_pair")
    with pytest.raises(ValueError, match="'b' twice"):
        lp.TextEncoder(["a", "b", "b"])
    with pytest.raises(ValueError, match=r"in lower case.*'\[UNK\]'"):
        lp.TextEncoder(["a", "[UNK]"])
    with pytest.raises(ValueError, match="'Goal'"):
        lp.TextEncoder(["Goal"])
    with pytest.raises(ValueError, match="`level` must be one of"):
        lp.TextEncoder.fit(["a"], level="words")
    with pytest.raises(ValueError, match="`length` must be an integer of 1 or more"):
        lp.TextEncoder(["a"], length=0)
