"""A language model learns another voice with LoRA: a few hundred examples, a small file.

    TFDS_DATA_DIR=... python examples/support_assistant.py

A small GPT-2 is trained for a few minutes on the plays of tiny_shakespeare without one speaker.
Then adapters learn how that speaker talks, as a company would teach a model the voice of its
support. With a network, start from a real one: replace `small_gpt2(...)` and its training by

    model = keras_hub.models.GPT2CausalLM.from_preset("gpt2_base_en")
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
import tensorflow_datasets as tfds

import keras_lp as lp

LENGTH = 128  # bytes a training example
OUT = Path("runs/support_assistant")


def speeches(data_dir: str | None) -> dict[str, list[str]]:
    """All speeches by speaker."""
    dataset = tfds.load("tiny_shakespeare", split="train", data_dir=data_dir)
    text = next(iter(dataset.as_numpy_iterator()))["text"].decode()
    found: dict[str, list[str]] = {}
    for speech in text.split("\n\n"):
        speaker, _, words = speech.partition(":\n")
        found.setdefault(speaker, []).append(words)
    return found


def examples(texts: list[str]) -> list[str]:
    """Pieces of `LENGTH` characters of the speeches in a row."""
    text = "\n\n".join(texts)
    return [text[i : i + LENGTH] for i in range(0, len(text) - LENGTH, LENGTH)]


def small_gpt2(layers: int = 2, width: int = 128) -> keras_hub.models.GPT2CausalLM:
    """An untrained GPT-2 whose tokens are bytes; its vocabulary needs no file."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    vocabulary = {name: i for i, name in enumerate([*characters, "th", "<|endoftext|>"])}
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=["t h"])
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(vocabulary),
        num_layers=layers,
        num_heads=4,
        hidden_dim=width,
        intermediate_dim=4 * width,
        max_sequence_length=LENGTH,
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=LENGTH)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor)


def loss_on(model: keras.Model, texts: list[str]) -> float:
    """The mean loss a token."""
    return float(model.evaluate(texts, batch_size=32, verbose=0, return_dict=True)["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="where TFDS keeps its data (else TFDS_DATA_DIR)")
    parser.add_argument("--speaker", default="GLOUCESTER", help="whose voice is learned")
    parser.add_argument("--pretraining-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="`shuffle=True` was passed")

    by_speaker = speeches(arguments.data_dir)
    voice = examples(by_speaker.pop(arguments.speaker))
    train, held_out = voice[: arguments.examples], voice[arguments.examples :]
    others = examples([speech for texts in by_speaker.values() for speech in texts])
    keras.utils.set_random_seed(arguments.seed)
    np.random.default_rng(arguments.seed).shuffle(others)

    model = small_gpt2()
    model.compile(
        optimizer=keras.optimizers.AdamW(2e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
    )
    start = time.perf_counter()
    model.fit(others, batch_size=32, epochs=arguments.pretraining_epochs, verbose=2)
    print(f"\nPretrained on {len(others):,} pieces in {time.perf_counter() - start:.0f} s")
    before, before_others = loss_on(model, held_out), loss_on(model, others[:200])

    # The preprocessing, the loss and the metrics of the task stay.
    model = lp.finetune_model(model, lora=lp.LoRA(rank=arguments.rank), learning_rate=3e-3)
    lp.trainable_report(model)
    model.fit(train, batch_size=16, epochs=arguments.epochs, verbose=2)

    OUT.mkdir(parents=True, exist_ok=True)
    lp.save_adapters(model, OUT / "voice.npz")
    print(f"\nThe voice of {arguments.speaker}, {len(train)} examples of {LENGTH} characters")
    print(
        f"held-out loss ({len(held_out)} examples): {before:.3f} -> {loss_on(model, held_out):.3f}"
    )
    print(f"loss on the others: {before_others:.3f} -> {loss_on(model, others[:200]):.3f}")
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    print(f"parameters trained: {trained:,} of {model.count_params():,}")
    print(f"adapters on disk: {(OUT / 'voice.npz').stat().st_size / 1024:.0f} KiB")
    lp.merge_adapters(model)
    print(f"\nA sample:\n{model.generate('My lord, ', max_length=LENGTH)}")


if __name__ == "__main__":
    main()
