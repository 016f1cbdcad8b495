"""What `python -m benchmarks` measures of each way."""

from __future__ import annotations

import os
import tempfile
import time
from typing import NamedTuple

import keras
import numpy as np
from scipy import special
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

import keras_lp as lp
from keras_lp.backbones.features import feature_model
from keras_lp.model.calibration import calibration_error
from keras_lp.tasks.heads import heads
from lib.cases import Case
from lib.cost import forward_flops, latency, peak_memory, processor_seconds
from lib.journal import Run
from lib.problems import Arrays
from lib.ways import (
    EQUAL,
    HEAD,
    LOCAL_BATCH,
    LORA,
    SCRATCH,
    SKEWED,
    TASK,
    WAYS,
    Federation,
    repeated,
)

AUDITED = 4  # clients whose updates are attacked
PERSONAL_EPOCHS = 2
TOLERANCE = 1e-3  # of a file: BatchNormalization that saw few batches enlarges rounding errors


def logits_of(model: keras.Model, x: np.ndarray) -> np.ndarray:
    outputs = model.predict(x, batch_size=256, verbose=0)
    return (outputs[TASK] if isinstance(outputs, dict) else outputs).astype("float64")


def accuracy(model: keras.Model, data: Arrays) -> float:
    return float(np.mean(logits_of(model, data[0]).argmax(1) == data[1]))


class SourceHead(NamedTuple):
    """A head for the classes that the network was trained on, and its accuracy."""

    kernel: np.ndarray
    bias: np.ndarray
    accuracy: float


def source_head(case: Case) -> SourceHead | None:
    """Solves a head for the source classes on the pretrained network, if the source is at hand."""
    if case.source is None:
        return None
    known = case.source[0]
    solved = case.build(int(known[1].max()) + 1)
    lp.fit_head(solved, known, verbose=0)
    (layer,) = heads(solved).values()
    return SourceHead(*layer.raw_weights(), accuracy(solved, case.source[1]))


def source_accuracy(model: keras.Model, case: Case, head: SourceHead) -> float:
    """Returns the accuracy of the head of the pretrained network on that of another model."""
    x, y = case.source[1]
    built = lp.transfer_model(model, 2, **({"pooling": "flatten"} if x.ndim == 4 else {}))
    features = feature_model(built).predict(x, batch_size=256, verbose=0)
    return float(np.mean((features @ head.kernel + head.bias).argmax(1) == y))


def measure(way: str, case: Case, source: SourceHead | None) -> Run:
    """Trains and returns what is measured.

    Args:
        way: a key of `WAYS`.
        case: the case.
        source: the head for the source classes; None if these are not at hand.
    """
    keras.backend.clear_session()
    keras.utils.set_random_seed(case.seed)
    with peak_memory() as memory:
        start = processor_seconds(), time.perf_counter()
        model, federation = WAYS[way].learn(case)
        seconds = processor_seconds() - start[0], time.perf_counter() - start[1]
    x, y = case.test
    logits_of(model, x)  # traces
    begin = time.process_time()
    logits = logits_of(model, x)
    predicting = 1000 * (time.process_time() - begin) / len(x)
    predicted = logits.argmax(1)
    p = special.softmax(logits, axis=1)
    loss = special.logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    run = {
        "accuracy": float(np.mean(predicted == y)),
        "balanced": float(balanced_accuracy_score(y, predicted)),
        "auc": float(roc_auc_score(y, p if p.shape[1] > 2 else p[:, 1], multi_class="ovr")),
        "tested": len(y),
        "loss": float(loss.mean()),
        "calibration": calibration_error(logits, (predicted == y) * 1.0, np.ones(len(y))),
        "gap": accuracy(model, case.train) - float(np.mean(predicted == y)),
        "trained": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "cpu": seconds[0],
        "seconds": seconds[1],
        "memory": memory.get("MiB"),
        "flops": training_flops(model, way, case),
        "predicting": predicting,
        "bytes": 0,
        "data": int(sum(part.nbytes for part in case.train)),
    }
    if federation is not None:
        run |= of_federation(federation, way, case)
    if WAYS[way].backbone and way != SCRATCH and source is not None:
        if way == LORA:
            lp.merge_adapters(model)
        run["forgotten"] = source.accuracy - source_accuracy(model, case, source)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.tflite")
        run["file"] = lp.export_tflite(
            model, file, verification_data=x[:64], tolerance=TOLERANCE
        ).size
        run["latency"] = latency(file, x)
    return run


def training_flops(model: keras.Model, way: str, case: Case) -> float:
    """Returns an estimate of the floating-point operations of the training.

    A backward pass counts as two forward passes. The features of a frozen network are computed
    once. What solves a head is not counted.
    """
    per_example = forward_flops(model)
    share = WAYS[way].backbone
    own = 2 * sum(int(np.prod(layer.kernel.shape)) for layer in heads(model).values())
    if way == HEAD:
        return float(len(case.train[1]) * per_example)
    once = 0 if share == 1 else len(repeated(case.train)[1]) * per_example
    return float(once + 3 * case.seen * (share * per_example + (1 - share) * own))


def of_federation(federation: Federation, way: str, case: Case) -> Run:
    """Returns the bytes, the accuracy by round, and what personal models and an attacker get."""
    learning, clients, logs, by_round = federation
    features = feature_model(learning.model).predict(case.test[0], batch_size=256, verbose=0)
    features = features.astype("float64")
    run: Run = {
        "bytes": sum(logs["bytes_up"] + logs["bytes_down"]),
        "rounds": len(by_round),
        "by_round": [
            float(np.mean((features @ kernel + bias).argmax(1) == case.test[1]))
            for kernel, bias in by_round
        ],
        "epsilon": logs.get("epsilon", [None])[-1],
    }
    if way == SKEWED:
        own = {client: own_test(data[1], case.test) for client, data in clients.items()}
        found = lp.personalize(
            learning, clients, own, epochs=PERSONAL_EPOCHS, batch_size=LOCAL_BATCH, verbose=0
        )
        run["on_clients"] = float(np.mean(list(found.before.values())))
        run["personal"] = float(np.mean(list(found.after.values())))
    if way == EQUAL and case.train[0].ndim == 4:  # pixels, not numbers of words
        run["read"] = attacked(case)
    return run


def own_test(labels: np.ndarray, test: Arrays, most: int = 100) -> Arrays:
    """Returns test examples of the classes that a client has."""
    rows = np.flatnonzero(np.isin(test[1], labels))[:most]
    return test[0][rows], test[1][rows]


def attacked(case: Case) -> Run:
    """Returns what an attacker reads of first updates without and with noise (multiplier 1).

    `labels`: the share of labels; `features`: the similarity of features to the true ones, from
    clients of one example each.
    """
    model = case.build(case.names, optimizer="sgd")
    x, y = (part[:AUDITED] for part in case.train)
    privacy = lp.DifferentialPrivacy(noise_multiplier=1.0, delta=1e-2, clip=1.0)
    options = {"attack": "analytic", "max_iterations": 1, "seed": case.seed, "verbose": 0}
    audit = lp.audit_update_leakage(
        model, x.astype("float32"), y, defense=[None, privacy], **options
    )
    names = ("none", "noise")
    return {
        name: {"labels": float(one.labels), "features": float(np.mean(one.features))}
        for name, one in zip(names, audit.results.values(), strict=True)
    }
