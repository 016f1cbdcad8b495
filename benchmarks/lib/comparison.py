"""The ways to learn that `python -m benchmarks` compares, and what is measured of each.

All start from the same network, see the same examples for the same number of epochs, and have the
settings of `examples/quickstart.py`, which were chosen on training examples of digits.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from scipy import special

import keras_lp as lp
from keras_lp.model.calibration import calibration_error
from lib.journal import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import quickstart

EPOCHS, BATCH, CLIENTS = quickstart.EPOCHS, quickstart.BATCH, quickstart.CLIENTS
HELD = 500  # source examples that tell what was forgotten
POOLING: dict[str, Any] = {"pooling": "flatten"}

SCRATCH, HEAD, TRANSFER = "from scratch", "solved head", "transfer by gradient"
ONE_RATE, DECAY, LORA = "fine-tuning, one rate", "fine-tuning, layer decay", "LoRA"
ONE_TASK, MULTITASK = "one task, half the labels", "multitask, half the labels"
EQUAL, SKEWED, PRIVATE = "federated, equal parts", "federated, two labels", "federated, private"


@dataclasses.dataclass
class Case:
    """A data set divided by a seed: the pretrained network, and few examples of new classes."""

    data: quickstart.Problem
    source_test: quickstart.Arrays
    pretrained: Path
    train: quickstart.Arrays
    seed: int


Learned = tuple[keras.Model, dict[str, Any]]


def head(case: Case) -> Learned:
    model = lp.transfer_model(case.pretrained, case.data.names, **POOLING)
    lp.fit_head(model, case.train, verbose=0)
    return model, {}


def fine_tuned(case: Case, **arguments: Any) -> Learned:
    model = lp.transfer_model(case.pretrained, case.data.names, **POOLING)
    model.fit(*case.train, batch_size=BATCH, epochs=EPOCHS // 2, verbose=0)
    model = lp.finetune_model(model, learning_rate=1e-3, **arguments)
    model.fit(*case.train, batch_size=BATCH, epochs=EPOCHS // 2, verbose=0)
    return model, {}


def federated(case: Case, shards: int | None = None, **arguments: Any) -> Learned:
    model = lp.transfer_model(case.pretrained, case.data.names, optimizer="sgd", **POOLING)
    clients = lp.partition(case.train, clients=CLIENTS, shards=shards, seed=case.seed)
    learning = lp.FederatedAveraging(
        model, local_epochs=2, batch_size=5, seed=case.seed, **arguments
    )
    logs = learning.fit(clients, rounds=EPOCHS // 2, verbose=0).history
    return model, {
        "bytes": sum(logs["bytes_up"] + logs["bytes_down"]),
        "epsilon": logs.get("epsilon", [None])[-1],
    }


WAYS: dict[str, Callable[[Case], Learned]] = {
    SCRATCH: lambda case: quickstart.from_scratch(case.data),
    HEAD: head,
    TRANSFER: lambda case: quickstart.transfer(case.data, case.pretrained),
    ONE_RATE: lambda case: fine_tuned(case, layer_decay=1.0),
    DECAY: lambda case: fine_tuned(case, layer_decay=0.7),
    LORA: lambda case: fine_tuned(case, lora=lp.LoRA(rank=4)),
    ONE_TASK: lambda case: quickstart.one_task(case.data, case.pretrained),
    MULTITASK: lambda case: quickstart.multitask(case.data, case.pretrained),
    EQUAL: federated,
    SKEWED: lambda case: federated(case, shards=2),
    PRIVATE: lambda case: federated(
        case, privacy=lp.DifferentialPrivacy(epsilon=8, delta=1e-2, clip=1.0)
    ),
}
BACKBONE_CHANGES = (ONE_RATE, DECAY, LORA, ONE_TASK, MULTITASK)


def problem(name: str, seed: int, data_dir: str | None, most: int) -> tuple[Any, Any]:
    """Returns the problem with up to `most` labelled examples, and test examples of the source."""
    x, y = lp.load_dataset(name, split="train", batch_size=-1, data_dir=data_dir)
    x_test, y_test = lp.load_dataset(name, split="test", batch_size=-1, data_dir=data_dir)
    half = (int(y.max()) + 1) // 2
    target = np.random.default_rng(seed).permutation(np.flatnonzero(y >= half))[:most]
    found = quickstart.Problem(
        source=(x[y < half], y[y < half]),
        train=(x[target], y[target] - half),
        test=(x_test[y_test >= half], y_test[y_test >= half] - half),
        names=[str(label) for label in range(half, int(y.max()) + 1)],
    )
    return found, (x_test[y_test < half][:HELD], y_test[y_test < half][:HELD])


def source_accuracy(model: Any, case: Case) -> float:
    """Returns the accuracy of a solved head for the source classes on the network of a model."""
    x, y = (part[:HELD] for part in case.data.source)
    solved = lp.transfer_model(model, int(y.max()) + 1, **POOLING)
    lp.fit_head(solved, (x, y), verbose=0)
    return quickstart.accuracy(solved, case.source_test)


def measure(way: str, case: Case, before: float) -> Run:
    """Trains and returns what is measured.

    Args:
        way: a key of `WAYS`.
        case: the case.
        before: `source_accuracy` of the pretrained network.
    """
    keras.utils.set_random_seed(case.seed)
    start = time.process_time(), time.perf_counter()
    model, extra = WAYS[way](case)
    seconds = time.process_time() - start[0], time.perf_counter() - start[1]
    x, y = case.data.test
    model.predict(x[:256], batch_size=256, verbose=0)  # traces
    begin = time.process_time()
    outputs = model.predict(x, batch_size=256, verbose=0)
    predicting = 1000 * (time.process_time() - begin) / len(x)
    logits = (outputs["digit"] if isinstance(outputs, dict) else outputs).astype("float64")
    right = logits.argmax(1) == y
    loss = special.logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    run = {
        "accuracy": float(right.mean()),
        "tested": len(y),
        "loss": float(loss.mean()),
        "calibration": calibration_error(logits, right * 1.0, np.ones(len(y))),
        "gap": quickstart.accuracy(model, case.train) - float(right.mean()),
        "trained": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "cpu": seconds[0],
        "seconds": seconds[1],
        "predicting": predicting,
        "bytes": 0,
        "data": int(case.train[0].nbytes),
        **extra,
    }
    if way in BACKBONE_CHANGES:
        if way == LORA:
            lp.merge_adapters(model)
        run["forgotten"] = before - source_accuracy(model, case)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.tflite")
        run["file"] = lp.export_tflite(model, file).size
    return run
