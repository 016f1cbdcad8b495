"""Sentiment, topic and language of a text in one small model, from three data sets that never met.

    TFDS_DATA_DIR=... python examples/text_multitask.py --quick

Sentiment is learned from phrases of film reviews (glue/sst2), topic from requests to an assistant
(clinc_oos), language from sentences in 13 languages (tatoeba). No example has more than one label:
`lp.mix` makes one stream of the three, and a missing label takes no part in the loss.

Three models of the same encoder learn one task each, for comparison. The budget is the same: all
see their examples once an epoch, in batches of one size, so the three together take as many steps
as the one; and each has a vocabulary of its own, of the same size, fitted on its own training
texts. `--quick` trains for one epoch on a tenth of the texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from prepared import ended_without_data, load

import keras_lp as lp

LANGUAGES = {
    "en": "English", "de": "German", "es": "Spanish", "et": "Estonian", "fi": "Finnish",
    "fr": "French", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "nl": "Dutch",
    "pt": "Portuguese", "tr": "Turkish", "vi": "Vietnamese",
}  # fmt: skip
SENTIMENT_EXAMPLES = 10_000  # of 67,349 phrases
LANGUAGE_EXAMPLES, LANGUAGE_TEST = 800, 200  # of each language
VOCABULARY = 20_000
LENGTH = 128  # ids of a text
PADDING, UNKNOWN = 0, 1
# Chosen on a tenth of the training texts, where 3 to 10 epochs differ by half a point.
EPOCHS, BATCH_SIZE, LEARNING_RATE = 6, 128, 3e-3
OUT = Path("runs/text_multitask")

Texts = tuple[list[str], np.ndarray]  # texts, class numbers


@dataclasses.dataclass(frozen=True)
class Data:
    """One task: the names of its classes, examples to train on and to test on."""

    names: list[str]
    train: Texts
    test: Texts


@dataclasses.dataclass(frozen=True)
class Result:
    """What one model came to."""

    accuracy: dict[str, float]  # by task
    on_phone: dict[str, float]  # the same of its .tflite file, in LiteRT
    parameters: int
    seconds: float  # of `fit`
    size: int  # of the file, in bytes


def normal(text: bytes) -> str:
    return " ".join(text.decode().lower().split())


def examples_of(name: str, split: str, data_dir: str | None) -> list[dict]:
    return list(load(name, split=split, data_dir=data_dir).as_numpy_iterator())


def sentiment(data_dir: str | None) -> Data:
    """Tested on the validation split: the labels of the test split are not public."""

    def texts(split: str) -> Texts:
        rows = examples_of("glue/sst2", split, data_dir)
        return [normal(row["sentence"]) for row in rows], np.array([row["label"] for row in rows])

    train, test = texts(f"train[:{SENTIMENT_EXAMPLES}]"), texts("validation")
    return Data(["negative", "positive"], train, test)


def topic(data_dir: str | None) -> Data:
    names: dict[int, str] = {}

    def texts(split: str) -> Texts:
        rows = examples_of("clinc_oos", split, data_dir)
        names.update({int(row["domain"]): row["domain_name"].decode() for row in rows})
        return [normal(row["text"]) for row in rows], np.array([row["domain"] for row in rows])

    train, test = texts("train"), texts("test")
    return Data([names[i] for i in range(len(names))], train, test)


def language(data_dir: str | None, seed: int) -> Data:
    """Each sentence once, in however many pairs it stands; English as often as the others."""
    found: dict[str, str] = {}
    for code in list(LANGUAGES)[1:]:
        for row in examples_of(f"tatoeba/tatoeba_{code}", "train", data_dir):
            found.setdefault(normal(row["source_sentence"]), code)
            found.setdefault(normal(row["target_sentence"]), "en")
    rng = np.random.default_rng(seed)
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for number, code in enumerate(LANGUAGES):
        texts = [(text, number) for text, own in found.items() if own == code]
        chosen = [texts[i] for i in rng.permutation(len(texts))]
        test += chosen[:LANGUAGE_TEST]
        train += chosen[LANGUAGE_TEST : LANGUAGE_TEST + LANGUAGE_EXAMPLES]
    both = [([text for text, _ in part], np.array([y for _, y in part])) for part in (train, test)]
    return Data(list(LANGUAGES.values()), *both)


def disjoint(data: Data) -> Data:
    """The same without the training examples whose text is one to test on."""
    (texts, y), tested = data.train, set(data.test[0])
    kept = np.flatnonzero([text not in tested for text in texts])
    return dataclasses.replace(data, train=([texts[i] for i in kept], y[kept]))


def ngrams(text: str) -> list[str]:
    """The words of a text, their pairs and their pieces of three letters, each once."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    pieces = [f"<{word}>"[i : i + 3] for word in words for i in range(len(word))]
    return list(dict.fromkeys([*words, *pairs, *pieces]))


def fit_vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """The ids of the n-grams that most texts have."""
    counts = Counter(one for text in texts for one in ngrams(text))
    most = counts.most_common(VOCABULARY - 2)
    return {one: number for number, (one, _) in enumerate(most, start=UNKNOWN + 1)}


def encode(texts: list[str], vocabulary: dict[str, int]) -> np.ndarray:
    """`(texts, LENGTH)` ids; a text without any known n-gram is one unknown."""
    ids = np.full((len(texts), LENGTH), PADDING, "int32")
    for row, text in zip(ids, texts, strict=True):
        known = [vocabulary[one] for one in ngrams(text) if one in vocabulary][:LENGTH]
        row[: max(1, len(known))] = known or UNKNOWN
    return ids


def encoder() -> keras.Model:
    """Embeddings of the n-grams, averaged, as in fastText (Joulin et al., 2017)."""
    ids = keras.Input((LENGTH,), dtype="int32", name="ids")
    x = keras.layers.Embedding(VOCABULARY, 32, mask_zero=True, name="embedding")(ids)
    x = keras.layers.GlobalAveragePooling1D(name="average")(x)
    x = keras.layers.Dense(64, activation="relu", name="dense")(x)
    return keras.Model(ids, keras.layers.Dropout(0.3)(x), name="encoder")


def tenth(data: Data) -> Data:
    """The same with a tenth of the texts to train and to test on."""
    parts = [(texts[::10], y[::10]) for texts, y in (data.train, data.test)]
    return Data(data.names, *parts)


def train(
    data: dict[str, Data], seed: int, epochs: int
) -> tuple[keras.Model, dict[str, int], float]:
    """A model of these tasks, its vocabulary and the seconds of `fit`."""
    vocabulary = fit_vocabulary(text for task in data.values() for text in task.train[0])
    stream = lp.mix(
        {name: (encode(task.train[0], vocabulary), task.train[1]) for name, task in data.items()},
        batch_size=BATCH_SIZE,
        seed=seed,
    )
    keras.utils.set_random_seed(seed)
    model = lp.multitask_model(
        encoder(),
        {name: task.names for name, task in data.items()},
        pretrained=False,
        learning_rate=LEARNING_RATE,
    )
    start = time.perf_counter()
    model.fit(stream, epochs=epochs, verbose=0)
    seconds = time.perf_counter() - start
    steps = epochs * int(stream.cardinality())
    print(f"{', '.join(data)}: {steps:,} steps in {seconds:.0f} s", flush=True)
    return model, vocabulary, seconds


Predict = Callable[[np.ndarray], dict[str, np.ndarray]]


def accuracies(predict: Predict, data: dict[str, Data], vocabulary: dict[str, int]) -> dict:
    """The accuracy of each task on its own test examples, in percent."""
    return {
        name: 100
        * np.mean(predict(encode(task.test[0], vocabulary))[name].argmax(-1) == task.test[1])
        for name, task in data.items()
    }


def on_phone(path: str) -> Predict:
    """Runs a file in LiteRT, text by text."""
    runner = Interpreter(path).get_signature_runner()

    def predict(ids: np.ndarray) -> dict[str, np.ndarray]:
        rows = [runner(ids=row[None]) for row in ids]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    return predict


def measure(
    model: keras.Model, vocabulary: dict[str, int], seconds: float, data: dict[str, Data]
) -> Result:
    tokens = ["[PAD]", "[UNK]", *vocabulary]  # in the order of their ids
    report = lp.export_tflite(
        model, OUT / f"{'_'.join(data)}.tflite", metadata=lp.TFLiteMetadata(vocabulary=tokens)
    )
    return Result(
        accuracies(lambda ids: model.predict(ids, batch_size=512, verbose=0), data, vocabulary),
        accuracies(on_phone(report.path), data, vocabulary),
        model.count_params(),
        seconds,
        report.size,
    )


def together(results: list[Result]) -> Result:
    """What several models came to, all of which a user would have to have."""
    return Result(
        {name: value for result in results for name, value in result.accuracy.items()},
        {name: value for result in results for name, value in result.on_phone.items()},
        sum(result.parameters for result in results),
        sum(result.seconds for result in results),
        sum(result.size for result in results),
    )


def table(data: dict[str, Data], columns: dict[str, Result]) -> str:
    results = columns.values()
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    for name, task in data.items():
        rows.append([
            f"{name}, {len(task.test[1]):,} texts",
            *(f"{one.accuracy[name]:.1f} % (LiteRT {one.on_phone[name]:.1f} %)" for one in results),
        ])  # fmt: skip
    rows += [
        ["parameters", *(f"{one.parameters:,}" for one in results)],
        ["training", *(f"{one.seconds:.0f} s" for one in results)],
        [".tflite", *(f"{one.size / 2**20:.2f} MiB" for one in results)],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="where TFDS keeps its data (else TFDS_DATA_DIR)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one epoch on a tenth of the texts")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="`shuffle=True` was passed")

    data = {
        "sentiment": disjoint(sentiment(arguments.data_dir)),
        "topic": disjoint(topic(arguments.data_dir)),
        "language": disjoint(language(arguments.data_dir, arguments.seed)),
    }
    epochs = 1 if arguments.quick else EPOCHS
    if arguments.quick:
        data = {name: tenth(task) for name, task in data.items()}
    for name, task in data.items():
        print(f"{name}: {len(task.names)} classes, {len(task.train[1]):,} texts to train on")

    print(f"\nepochs: {epochs}, in batches of {BATCH_SIZE}")
    model, vocabulary, seconds = train(data, arguments.seed, epochs)
    one = measure(model, vocabulary, seconds, data)
    alone = [{name: task} for name, task in data.items()]
    three = together([measure(*train(single, arguments.seed, epochs), single) for single in alone])
    print(f"\n{table(data, {'one model': one, 'three models': three})}\n")

    # Each of these is a text of one task; what the other heads say of it is a guess.
    texts = ["The film is warm and very funny.", "Book me a table for two.", "Wo ist der Bahnhof?"]
    predictions = lp.decode_predictions(model, model.predict(encode(texts, vocabulary), verbose=0))
    for i, text in enumerate(texts):
        answers = [
            f"{task} {one[i][0][0]} ({one[i][0][1]:.0%})" for task, one in predictions.items()
        ]
        print(f"{text}: {', '.join(answers)}")


if __name__ == "__main__":
    with ended_without_data():
        main()
