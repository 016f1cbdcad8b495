"""A keyboard that learns to predict the next character, from phones whose text stays on them.

    TFDS_DATA_DIR=... python examples/keyboard.py --quick
    python examples/keyboard.py --text shakespeare.txt

Each speaker of tiny_shakespeare with 5,000 characters or more is a phone. A small causal
convolutional network is trained by federated averaging, centrally on all text (what nobody may
collect), and on each phone alone. Each phone holds out the last tenth of its own text; accuracy
is measured there. The characters are a fixed alphabet, so nothing about the text is pooled.
`--quick` trains a smaller network over fewer rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from prepared import ended_without_data, load

import keras_lp as lp

ALPHABET = "\n !$&',-.3:;?" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmnopqrstuvwxyz"
LENGTH = 40  # characters an example
OUT = Path("runs/keyboard")

Phone = tuple[np.ndarray, np.ndarray]


def read_text(path: Path | None, data_dir: str | None) -> str:
    if path is not None:
        return path.read_text()
    splits = load("tiny_shakespeare", split=["train", "validation", "test"], data_dir=data_dir)
    return "".join(next(iter(part.as_numpy_iterator()))["text"].decode() for part in splits)


def speakers(text: str, least: int) -> dict[str, str]:
    """The text of each speaker who has enough of it."""
    found: dict[str, list[str]] = {}
    for speech in text.split("\n\n"):
        speaker, colon, words = speech.partition(":\n")
        if colon:
            found.setdefault(speaker, []).append(words)
    joined = {speaker: "\n".join(parts) for speaker, parts in found.items()}
    return {speaker: words for speaker, words in sorted(joined.items()) if len(words) >= least}


def examples(text: str) -> Phone:
    """Pieces of the text, and for each character the next one."""
    numbers = np.array([ALPHABET.find(character) + 1 for character in text], "int32")
    count = (len(numbers) - 1) // LENGTH
    inputs = numbers[: count * LENGTH].reshape(count, LENGTH)
    return inputs, numbers[1 : count * LENGTH + 1].reshape(count, LENGTH)


def network(units: int, rate: float) -> keras.Model:
    """Causal convolutions that see 31 characters back; unknown characters are 0."""
    keras.utils.set_random_seed(0)
    classes = len(ALPHABET) + 1
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(classes, units)(inputs)
    for dilation in (1, 2, 4, 8):
        new = keras.layers.Conv1D(units, 3, padding="causal", dilation_rate=dilation)(x)
        x = x + keras.layers.ReLU()(new)
    model = keras.Model(inputs, keras.layers.Dense(classes)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate, clipnorm=5.0), loss, metrics=["accuracy"])
    return model


def together(phones: dict[str, Phone]) -> Phone:
    return tuple(np.concatenate(parts) for parts in zip(*phones.values(), strict=True))


def alone(phones: dict[str, Phone], held_out: dict[str, Phone], args: argparse.Namespace) -> float:
    """The mean accuracy of models that each saw one phone, with the best of their epochs.

    The best epoch is chosen on the held-out text, which flatters these models.
    """
    model = network(args.units, args.rate)
    start, found = model.get_weights(), []
    for name in list(phones)[:: max(1, len(phones) // args.local_models)]:
        model.set_weights(start)
        history = model.fit(
            *phones[name], batch_size=10, epochs=args.local_epochs_alone, verbose=0,
            validation_data=held_out[name],
        )  # fmt: skip
        found.append(max(history.history["val_accuracy"]))
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="the text as a file; default: TFDS")
    parser.add_argument("--data-dir", help="where TFDS keeps its data sets")
    parser.add_argument("--quick", action="store_true", help="a smaller network, fewer rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--least", type=int, default=5000, help="characters of a phone")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.units = 64 if args.quick else 128
    args.rounds = args.rounds or (8 if args.quick else 300)
    args.local_models, args.local_epochs_alone = (2, 3) if args.quick else (16, 30)
    args.out.mkdir(parents=True, exist_ok=True)

    texts = speakers(read_text(args.text, args.data_dir), args.least)
    cut = {name: int(0.9 * len(words)) for name, words in texts.items()}
    phones = {name: examples(words[: cut[name]]) for name, words in texts.items()}
    held_out = {name: examples(words[cut[name] :]) for name, words in texts.items()}
    lp.describe_clients(phones)
    validation = together(held_out)
    characters = validation[1].ravel()
    guess = np.mean(characters == np.bincount(together(phones)[1].ravel()).argmax())

    start = time.perf_counter()
    model = network(args.units, args.rate)
    federated = lp.FederatedAveraging(
        model, clients_per_round=min(10, len(phones)), local_epochs=2, batch_size=10
    )
    history = federated.fit(
        phones, args.rounds, validation_data=validation, validation_freq=max(1, args.rounds // 10),
        checkpoint_dir=args.out / "state",
    )  # fmt: skip
    federated_seconds = time.perf_counter() - start
    on_phones = federated.evaluate(held_out)

    start = time.perf_counter()
    central = network(args.units, args.rate)
    # As many passes over all text as the phones made over theirs.
    epochs = max(1, round(args.rounds * 2 * min(10, len(phones)) / len(phones)))
    central_history = central.fit(
        *together(phones), batch_size=10, epochs=epochs, validation_data=validation, verbose=2
    )
    central_seconds = time.perf_counter() - start
    only_local = alone(phones, held_out, args)

    by_round = history.history["val_accuracy"]
    print(f"\nAccuracy of the next character on held-out text of {len(phones)} phones:")
    print(f"  the commonest character       {guess:.1%}")
    print(f"  each phone alone              {only_local:.1%} (mean of {args.local_models} phones)")
    print(
        f"  federated, {args.rounds} rounds         {by_round[-1]:.1%} ({federated_seconds:.0f} s; "
        f"over phones {on_phones['mean_accuracy']:.1%}, worst tenth "
        f"{on_phones['worst_decile_accuracy']:.1%})"
    )
    best = max(central_history.history["val_accuracy"])
    print(f"  all text in one place         {best:.1%} ({epochs} epochs, {central_seconds:.0f} s)")
    print(f"  federated by rounds           {' '.join(f'{a:.1%}' for a in by_round)}")
    model.save(args.out / "keyboard.keras")
    figures = {
        "guess": float(guess), "alone": only_local, "federated": by_round, "central":
        central_history.history["val_accuracy"], "on_phones": on_phones,
    }  # fmt: skip
    (args.out / "keyboard.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    with ended_without_data():
        main()
