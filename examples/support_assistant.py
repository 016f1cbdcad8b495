"""A language model learns how users talk, with LoRA: 400 examples, a small file.

    TFDS_DATA_DIR=... python examples/support_assistant.py --quick

A small GPT-2 learns the English of the plays in tiny_shakespeare, in some minutes. Then adapters
learn the questions that people ask an assistant (clinc_oos). Two layers do not make a model that
answers; what is to be seen is how far a few hundred examples and a file of 205 KiB move it. With
a network, start from a real one: replace `small_gpt2(...)` and its training by

    model = keras_hub.models.GPT2CausalLM.from_preset("gpt2_base_en")

`--quick` trains on a tenth of the plays, for one epoch, and on the questions for two.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
from prepared import ended_without_data, load
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import keras_lp as lp

CHARACTERS = 150  # of a piece of the plays
TOKENS = 64  # of a training example, at most
PIECES = 1000  # of words, the vocabulary
HELD_OUT = 200  # pieces of the plays
END = "<|endoftext|>"
PROMPTS = ["how do i", "what is", "My lord,"]
OUT = Path("runs/support_assistant")


def plays(data_dir: str | None) -> list[str]:
    """The text in pieces."""
    dataset = load("tiny_shakespeare", split="train", data_dir=data_dir)
    text = next(iter(dataset.as_numpy_iterator()))["text"].decode()
    return [text[i : i + CHARACTERS] for i in range(0, len(text) - CHARACTERS, CHARACTERS)]


def questions(split: str, count: int, data_dir: str | None) -> list[str]:
    """Questions in a random order, always the same."""
    dataset = load("clinc_oos", split=split, data_dir=data_dir)
    texts = [row["text"].decode() for row in dataset.as_numpy_iterator()]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:count]]


def tokenizer_of(texts: list[str]) -> keras_hub.models.GPT2Tokenizer:
    """Byte pair encoding, learned from the texts; any other text can be written with it too."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES - 1, initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator(texts, trainer)
    model = json.loads(learned.to_str())["model"]
    vocabulary = {**model["vocab"], END: len(model["vocab"])}
    return keras_hub.models.GPT2Tokenizer(vocabulary, [" ".join(pair) for pair in model["merges"]])


def small_gpt2(texts: list[str], layers: int = 2, width: int = 128) -> keras.Model:
    """An untrained GPT-2 with a vocabulary of its own."""
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=PIECES,
        num_layers=layers,
        num_heads=4,
        hidden_dim=width,
        intermediate_dim=4 * width,
        max_sequence_length=TOKENS,
    )
    tokenizer = tokenizer_of(texts)
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=TOKENS)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor)


def pretrain(model: keras.Model, texts: list[str], epochs: int, seed: int) -> None:
    steps = epochs * -(-len(texts) // 32)
    rate = keras.optimizers.schedules.CosineDecay(
        1e-4, 9 * steps // 10, warmup_target=3e-3, warmup_steps=steps // 10
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(rate),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True,
            reduction="mean_with_sample_weight",  # the mean over tokens, padding apart
        ),
        weighted_metrics=["accuracy"],
        sampler=keras_hub.samplers.TopKSampler(k=5, seed=seed),
    )
    model.fit(texts, batch_size=32, epochs=epochs, verbose=2)


def loss_on(model: keras.Model, texts: list[str]) -> float:
    """The mean loss a token."""
    return float(model.evaluate(texts, batch_size=32, verbose=0, return_dict=True)["loss"])


def show_samples(model: keras.Model, title: str) -> None:
    print(f"\nSamples, {title}:")
    for text in model.generate(PROMPTS):
        print("  " + text.replace("\n", " / "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="where TFDS keeps its data (else TFDS_DATA_DIR)")
    parser.add_argument("--pretraining-epochs", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer plays and epochs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pretraining_epochs, arguments.epochs = 1, 2
    warnings.filterwarnings("ignore", message="`shuffle=True` was passed")

    keras.utils.set_random_seed(arguments.seed)
    old = plays(arguments.data_dir)
    np.random.default_rng(arguments.seed).shuffle(old)
    old_held_out, old = old[:HELD_OUT], old[HELD_OUT:]
    if arguments.quick:
        old_held_out, old = old_held_out[:50], old[: len(old) // 10]
    train = questions("train", arguments.examples, arguments.data_dir)
    held_out = questions("test", 100 if arguments.quick else 500, arguments.data_dir)

    model = small_gpt2(old)
    start = time.perf_counter()
    pretrain(model, old, arguments.pretraining_epochs, arguments.seed)
    print(f"\nPretrained on {len(old):,} pieces in {time.perf_counter() - start:.0f} s")
    before, old_before = loss_on(model, held_out), loss_on(model, old_held_out)
    show_samples(model, "before")

    # The preprocessing, the loss, the metrics and the sampler of the task stay.
    model = lp.finetune_model(model, lora=lp.LoRA(rank=arguments.rank), learning_rate=1e-2)
    lp.trainable_report(model)
    start = time.perf_counter()
    model.fit(train, batch_size=32, epochs=arguments.epochs, verbose=2)
    seconds = time.perf_counter() - start

    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / "questions.npz"
    lp.save_adapters(model, file)
    after, old_after = loss_on(model, held_out), loss_on(model, old_held_out)
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    lp.merge_adapters(model)
    show_samples(model, f"after {len(train)} questions")
    print(f"\nLearned from {len(train)} questions in {seconds:.0f} s")
    print(f"held-out loss a token, {len(held_out)} questions: {before:.3f} -> {after:.3f}")
    print(f"the same, {len(old_held_out)} pieces of the plays: {old_before:.3f} -> {old_after:.3f}")
    print(f"parameters trained: {trained:,}; of the model: {model.count_params():,}")
    print(f"adapters on disk: {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    with ended_without_data():
        main()
