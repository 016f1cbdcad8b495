r"""What does a search cost, and what does it gain?

    TFDS_DATA_DIR=... python benchmarks/tuning.py \
        --mobilenet mobilenet_2_5_224_tf_no_top.h5 --cifar10 cifar10_subset.npz

Cost: 20 trials of random search over learning rate, hidden units and dropout of a new head, 5
epochs each, on 1,000 images of cifar10_subset with MobileNet (alpha 0.25, ImageNet weights, 96
pixels), 500 for validation. The peer is keras-tuner over the recipe of the Keras guide to transfer
learning: the frozen network runs in every epoch. Both have the same space. Processor seconds of the
whole search, all threads together; the ratio is the median over the seeds.

Gain: test accuracy with the default settings and with those that `lp.tune` finds, both trained for
up to 10 epochs on the same examples; both keep the epoch that is best on the validation examples.

- transfer: the same 1,000 images, 20 trials of random search.
- fine-tuning: 500 digits of cmaterdb/bangla with a small network that learned mnist, Hyperband.
- multitask: 300 questions of trec, coarse and fine labels, with a small text network that learned
  clinc_oos; Hyperband, objective "val_gain". The accuracy is the mean of both tasks.
- federated: 500 digits of cmaterdb/bangla on 10 clients with two labels each, the network frozen,
  10 rounds, Hyperband.

A seed changes the examples, the search and the order.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_tuner
import numpy as np
import tensorflow as tf
from lib.arguments import command, parser
from lib.journal import Journal, Run
from lib.machine import machine
from lib.networks import SIZE, script_setting, text_parts, text_settings
from lib.problems import Arrays, cifar10_problem, draw
from lib.results import RESULTS, page, table, write
from lib.scores import mean_and_deviation, select, unique, verdict

import keras_lp as lp
from keras_lp.tuning.objective import make_objective

TRIALS, COST_EPOCHS, EPOCHS, BRACKET = 20, 5, 10, 18
OURS, PEER = "lp.tune", "keras-tuner over the guide's recipe"
GAINS = ("transfer", "fine-tuning", "multitask", "federated")


def guide(weights: Path, hp: keras_tuner.HyperParameters) -> keras.Model:
    """The recipe of the Keras guide to transfer learning, with the space of `lp.tune`."""
    base = keras.applications.MobileNet((SIZE, SIZE, 3), 0.25, include_top=False, weights=weights)
    base.trainable = False
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Resizing(SIZE, SIZE)(inputs)
    x = keras.layers.Rescaling(1 / 127.5, -1)(x)
    x = keras.layers.GlobalAveragePooling2D()(base(x, training=False))
    units = hp.Choice("hidden_units", [0, 64, 256])
    x = keras.layers.Dense(units, "relu")(x) if units else x
    x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1))(x)
    model = keras.Model(inputs, keras.layers.Dense(10)(x))
    rate = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model


def search_peer(weights: Path, train: Arrays, val: Arrays, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        tuner = keras_tuner.RandomSearch(
            functools.partial(guide, weights), objective="val_accuracy", max_trials=TRIALS,
            seed=seed + 1, directory=folder,
        )  # fmt: skip
        tuner.search(*train, validation_data=val, epochs=COST_EPOCHS, verbose=0)
        return tuner.oracle.get_best_trials(1)[0].score


def mobilenet(weights: Path, **fixed: Any) -> lp.TransferHyperModel:
    return lp.TransferHyperModel(
        "MobileNet", 10, input_shape=(32, 32, 3), image_size=SIZE, weights=weights,
        backbone_kwargs={"alpha": 0.25}, **fixed,
    )  # fmt: skip


def search_ours(weights: Path, train: Arrays, val: Arrays, seed: int) -> float:
    found = lp.tune(
        mobilenet(weights, schedule="constant"), train, validation_data=val, max_trials=TRIALS,
        tuner="random", epochs=COST_EPOCHS, seed=seed, verbose=0,
    )  # fmt: skip
    return found.best.score


def cost(given: Any, name: str, seed: int) -> Run:
    problem = cifar10_problem(given.cifar10)
    train, _ = draw(problem.train, 1000, seed)
    val, _ = draw(problem.val, 500, seed)
    search = search_ours if name == OURS else search_peer
    start = time.process_time()
    score = search(given.mobilenet, train, val, seed)
    run = {"seconds": time.process_time() - start, "score": float(score)}
    print(name, seed, run, flush=True)
    return run


def case(given: Any, folder: Path, name: str, seed: int) -> tuple[Any, Any, Any, Arrays]:
    """Returns the hypermodel, the training and validation data, and the test data."""
    if name == "transfer":
        problem = cifar10_problem(given.cifar10)
        train, _ = draw(problem.train, 1000, seed)
        return mobilenet(given.mobilenet), train, problem.val, problem.test
    if name == "multitask":
        return multitask(given.data_dir, folder, seed)
    problem = script_setting(given.data_dir, folder).problem
    train, _ = draw(problem.train, 500, seed)
    network = folder / "mnist.keras"
    if name == "fine-tuning":
        return lp.FinetuneHyperModel(network, 10), train, problem.val, problem.test
    clients = lp.partition(train, clients=10, shards=2, seed=seed)
    return lp.FederatedHyperModel(network, 10), clients, problem.val, problem.test


def multitask(data_dir: str | None, folder: Path, seed: int) -> tuple[Any, Any, Any, Arrays]:
    text_settings(data_dir, folder)  # pretrains
    splits = {"train": "train", "test": "test"}
    parts = {
        label: text_parts("trec", f"label-{label}", splits, data_dir)
        for label in ("coarse", "fine")
    }

    def both(split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        labels = {label: parts[label][split][1] for label in parts}
        return parts["coarse"][split][0], labels

    x, labels = both("train")
    order = np.random.default_rng(seed).permutation(len(x))

    def rows(numbers: np.ndarray) -> Any:
        return x[numbers], {label: y[numbers] for label, y in labels.items()}

    hypermodel = lp.MultitaskHyperModel(folder / "for_trec.keras", {"coarse": 6, "fine": 47})
    return hypermodel, rows(order[:300]), rows(order[300:800]), both("test")


def accuracy(model: keras.Model, test: Any) -> float:
    x, y = test
    logits = model.predict(x, batch_size=256, verbose=0)
    if not isinstance(logits, dict):
        logits, y = {"only": logits}, {"only": y}
    return float(np.mean([np.mean(logits[name].argmax(-1) == y[name]) for name in logits]))


def gain(given: Any, folder: Path, name: str, seed: int) -> Run:
    hypermodel, train, val, test = case(given, folder, name, seed)
    hp = keras_tuner.HyperParameters()
    keras.utils.set_random_seed(seed)
    model = hypermodel.build(hp)
    parts = (train,) if name == "federated" else train
    goal = make_objective(None, model, hypermodel)
    goal = make_objective("val_loss", model, hypermodel) if name == "multitask" else goal
    keep_best = keras.callbacks.EarlyStopping(
        goal.name, mode=goal.direction, patience=EPOCHS, restore_best_weights=True
    )
    hypermodel.fit(
        hp, model, *parts, validation_data=val, epochs=EPOCHS, callbacks=[keep_best], verbose=0
    )
    random, start = name == "transfer", time.process_time()
    found = lp.tune(
        hypermodel, train, validation_data=val, epochs=EPOCHS, seed=seed, verbose=0,
        max_trials=TRIALS if random else BRACKET, tuner="random" if random else "hyperband",
    )  # fmt: skip
    run = {
        **{"default": accuracy(model, test), "found": accuracy(found.model, test)},
        "seconds": time.process_time() - start,
        "hyperparameters": found.hyperparameters,
    }
    print(name, seed, run, flush=True)
    return run


def report(results: dict[str, Any]) -> str:
    runs = results["runs"]
    seconds = {name: [run["seconds"] for run in select(runs, way=name)] for name in (OURS, PEER)}
    scores = {name: [100 * run["score"] for run in select(runs, way=name)] for name in (OURS, PEER)}
    ratio = np.median(np.divide(seconds[OURS], seconds[PEER]))
    costs = [
        [name, f"{np.median(seconds[name]):.0f}", mean_and_deviation(scores[name])]
        for name in (OURS, PEER)
    ]
    rows = []
    for name in GAINS:
        found = select(runs, way=name)
        if not found:  # --only cost
            continue
        default, tuned = ([100 * run[kind] for run in found] for kind in ("default", "found"))
        change = np.subtract(tuned, default)
        rows.append([
            name, mean_and_deviation(default), mean_and_deviation(tuned),
            f"{np.mean(change):+.1f}, {verdict(change)}",
            f"{np.median([run['seconds'] for run in found]):.0f}",
        ])  # fmt: skip
    seeds = len(unique(runs, "seed"))
    gains = [
        f"Gain: test accuracy in per cent, mean and standard deviation over {seeds} seeds:",
        table(["search", "default", "found", "change", "processor seconds"], rows),
    ]
    return page(
        "Searches: cost and gain",
        results["command"],
        results["machine"],
        __doc__,
        f"Cost, {seeds} seeds: lp.tune takes **{ratio:.2f}x** of the processor time (goal 0.15x).",
        table([f"{TRIALS} trials", "processor seconds", "best validation accuracy, %"], costs),
        *(gains if rows else []),
    )


def main() -> None:
    arguments = parser(__doc__, seeds=3, data_dir=True, out=RESULTS / "tuning")
    arguments.add_argument("--mobilenet", type=Path, required=True, help="h5 file, alpha 0.25")
    arguments.add_argument("--cifar10", type=Path, required=True, help="npz file")
    arguments.add_argument("--only", choices=["cost", "gain"], help="one of the two parts")
    given = arguments.parse_args()
    tf.get_logger().setLevel("ERROR")
    journal = Journal(given.out.with_suffix(".partial.json"))
    with tempfile.TemporaryDirectory() as folder:
        costs = functools.partial(cost, given)
        gains = functools.partial(gain, given, Path(folder))
        both = {"cost": (costs, (PEER, OURS)), "gain": (gains, GAINS)}
        for measure, names in [both[given.only]] if given.only else both.values():
            for seed, name in itertools.product(range(given.seeds), names):
                journal.run(functools.partial(measure, name, seed), way=name, seed=seed)
    results = {
        "command": command(__file__, given, "mobilenet", "cifar10", "seeds", "only"),
        "machine": machine("keras-tuner"),
        "runs": journal.runs,
    }
    write(given.out, report(results), results)


if __name__ == "__main__":
    main()
