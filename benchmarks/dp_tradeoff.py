r"""What does differential privacy cost in accuracy and time, and does transfer make it cheap?

    TFDS_DATA_DIR=... python benchmarks/dp_tradeoff.py --mobilenet mobilenet_2_5_224_tf_no_top.h5

Examples are protected: `lp.fit_head` of a head on MobileNet (alpha 0.25, ImageNet weights, 96
pixels), all training examples of pneumonia_mnist and the first 20,000 of fashion_mnist; accuracy on
the test split. delta is 0.1 / examples.

Clients are protected: mnist on 1,000 clients of 60 examples, 100 per round, 40 rounds, one local
epoch, SGD with learning rate 0.1, delta 1e-4, adaptive clipping. Either all weights of a small
convolutional network are trained from scratch, or a head on the same network, frozen, that learned
fashion_mnist before.

Time: a private round of the first federation against one without, 5 rounds each in turn; and a step
of the private head (clipped gradients of all examples, noise) against one without clipping and
noise, in turn. Medians of the ratios, seconds on the clock.

A seed changes the clients, the initial weights and the noise.
"""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from lib.arguments import command, parser
from lib.frozen import features_of, network
from lib.journal import Journal, Run
from lib.machine import machine
from lib.networks import SIZE, conv_net
from lib.plots import STYLES, panels
from lib.problems import Arrays, scaled
from lib.results import RESULTS, page, table, write
from lib.scores import mean_and_deviation, select
from lib.timing import in_turn, ratio

import keras_lp as lp
from keras_lp.privacy.mechanism import Mechanism
from keras_lp.transfer.head_solver import Labels
from keras_lp.transfer.private_head import clipped_sums, prepared

EPSILONS: tuple[float | None, ...] = (None, 8, 4, 2, 1)
XRAY, FASHION, MNIST = "pneumonia_mnist", "fashion_mnist", "mnist"
HEADS = {XRAY: "train", FASHION: "train[:20000]"}
SCRATCH, HEAD = "mnist, network from scratch", "mnist, head on a frozen network"
CLIENTS, PER_ROUND, ROUNDS, RATE, DELTA = 1000, 100, 40, 0.1, 1e-4


@functools.cache
def features(weights: Path, name: str, data_dir: str | None) -> tuple[Arrays, Arrays]:
    """Returns the features of the frozen network and the labels, of both splits."""
    below = features_of(network("MobileNet", weights))
    inputs = keras.Input((28, 28, 1))
    x = keras.layers.Resizing(SIZE, SIZE)(inputs)
    model = keras.Model(inputs, below(keras.layers.Concatenate()([x, x, x])))
    parts = []
    for split in (HEADS[name], "test"):
        images, labels = lp.load_dataset(name, split=split, batch_size=-1, data_dir=data_dir)
        found = model.predict(images.astype("float32"), batch_size=128, verbose=0)
        parts.append((found, labels))
    return parts[0], parts[1]


def head(given: Any, name: str, epsilon: float | None, seed: int) -> Run:
    (x, y), test = features(given.mobilenet, name, given.data_dir)
    backbone = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Activation("linear")])
    model = lp.transfer_model(backbone, int(y.max()) + 1)
    privacy = epsilon and lp.DifferentialPrivacy(epsilon=epsilon, delta=0.1 / len(y), seed=seed)
    lp.fit_head(model, (x, y), privacy=privacy or None, verbose=0)
    run = {"accuracy": float(model.evaluate(*test, verbose=0, return_dict=True)["accuracy"])}
    print(name, epsilon, seed, run, flush=True)
    return run


@functools.cache
def pretrained() -> keras.Model:
    keras.utils.set_random_seed(0)
    backbone = conv_net()
    model = lp.transfer_model(backbone, 10, pretrained=False, trainable="all", learning_rate=1e-3)
    model.fit(*scaled(FASHION), epochs=3, batch_size=64, verbose=0)
    trained = next(layer for layer in model.layers if layer.name == "conv_net")
    backbone.set_weights(trained.get_weights())
    return backbone


def federation(name: str, privacy: lp.DifferentialPrivacy | None, seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    frozen = name == HEAD
    model = lp.transfer_model(
        pretrained() if frozen else conv_net(), 10, pretrained=frozen, optimizer="sgd",
        trainable="head" if frozen else "all", learning_rate=RATE,
    )  # fmt: skip
    return lp.FederatedAveraging(
        model, clients_per_round=PER_ROUND, weighting="uniform", privacy=privacy, seed=seed
    )


def clients_of(seed: int) -> dict[str, Arrays]:
    return lp.partition(scaled(MNIST), clients=CLIENTS, seed=seed)


def federated(given: Any, name: str, epsilon: float | None, seed: int) -> Run:
    privacy = epsilon and lp.DifferentialPrivacy(epsilon=epsilon, delta=DELTA, seed=seed)
    made = federation(name, privacy or None, seed)
    made.fit(clients_of(seed), ROUNDS, verbose=0)
    test = scaled(MNIST, "test")
    run = {
        "accuracy": float(made.model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]),
        "noise": made.privacy_report().noise_multiplier if epsilon else 0.0,
        "weights": int(sum(np.prod(v.shape) for v in made.model.trainable_variables)),
    }
    print(name, epsilon, seed, run, flush=True)
    return run


def times(given: Any) -> Run:
    clients = clients_of(0)
    privacy = lp.DifferentialPrivacy(noise_multiplier=1.0, delta=DELTA)
    made = {
        name: federation(SCRATCH, one, 0) for name, one in (("private", privacy), ("not", None))
    }
    rounds = in_turn(
        {name: functools.partial(one.fit, clients, 5, verbose=0) for name, one in made.items()}, 11
    )
    (x, y), _ = features(given.mobilenet, FASHION, given.data_dir)
    x, squares = prepared(x)
    labels = {"only": Labels("softmax", y, np.ones(len(y)), 10)}
    weights = [np.zeros((x.shape[1] + 1, 10))]
    mechanism = Mechanism(
        lp.DifferentialPrivacy(noise_multiplier=10.0, delta=1e-6), "example", len(y), len(y), 1
    )

    def private() -> None:
        mechanism.start()
        clipped_sums(x, squares, labels, weights, mechanism.clip)
        mechanism.noise([weights[0].shape])

    def plain() -> None:
        logits = x @ weights[0][:-1].astype("float32") + weights[0][-1]
        slope = labels["only"].losses(slice(None), logits[:, None])[1][:, 0].astype("float32")
        x.T @ slope, slope.sum(0)

    steps = in_turn({"private": private, "not": plain}, 31)
    return {
        kind: {name: [one.clock for one in found] for name, found in timed.items()}
        for kind, timed in (("round", rounds), ("step", steps))
    }


def report(results: dict[str, Any]) -> str:
    runs = [run for run in results["runs"] if "accuracy" in run]
    names = [*HEADS, SCRATCH, HEAD]
    rows = [
        [
            name,
            *(
                mean_and_deviation(
                    [100 * run["accuracy"] for run in select(runs, name=name, epsilon=epsilon)]
                )
                for epsilon in EPSILONS
            ),
        ]
        for name in names
    ]
    header = ["", "no privacy", *(f"epsilon {epsilon}" for epsilon in EPSILONS[1:])]
    (timed,) = [run for run in results["runs"] if "round" in run]
    lines = []
    for kind, what, goal in (
        ("round", "A private round of 100 clients", 1.15), ("step", "A private step of a head", 1.5)
    ):  # fmt: skip
        middle, low, high = ratio(timed[kind]["private"], timed[kind]["not"])
        lines.append(
            f"{what} takes **{middle:.2f}x** of one without privacy (quartiles {low:.2f} to "
            f"{high:.2f}; goal {goal}x)."
        )
    some = {name: select(runs, name=name)[-1]["weights"] for name in (SCRATCH, HEAD)}
    lines.append(f"The network has {some[SCRATCH]:,} weights that train, the head {some[HEAD]:,}.")
    return page(
        "Differential privacy: accuracy and time",
        results["command"],
        results["machine"],
        __doc__,
        "Test accuracy in per cent, mean and standard deviation over the seeds:",
        table(header, rows),
        *lines,
    )


def plot(path: Path, runs: list[Run]) -> None:
    with panels(path, 2, sharex=True) as axes:
        places = range(len(EPSILONS))
        groups = (
            (list(HEADS), "examples are protected"),
            ([SCRATCH, HEAD], "clients are protected"),
        )
        styles = iter(STYLES)
        for axis, (names, title) in zip(axes, groups, strict=True):
            for name in names:
                found = [
                    100 * np.array([r["accuracy"] for r in select(runs, name=name, epsilon=e)])
                    for e in EPSILONS
                ]
                mean = np.array([np.mean(one) for one in found])
                spread = np.array([np.std(one) for one in found])
                colour, style = next(styles)
                axis.plot(places, mean, style, color=colour)
                axis.annotate(name, (0, mean[0]), (10, 2), textcoords="offset points", color=colour)
                axis.fill_between(places, mean - spread, mean + spread, color=colour, alpha=0.15)
            axis.set(title=title, xlabel="epsilon", ylabel="test accuracy, %")
            axis.set_xticks(places, ["∞", *(str(e) for e in EPSILONS[1:])])


def main() -> None:
    arguments = parser(__doc__, seeds=3, data_dir=True, out=RESULTS / "dp_tradeoff")
    arguments.add_argument("--mobilenet", type=Path, required=True, help="h5 file, alpha 0.25")
    given = arguments.parse_args()
    if given.data_dir:
        os.environ["TFDS_DATA_DIR"] = given.data_dir
    tf.get_logger().setLevel("ERROR")
    journal = Journal(given.out.with_suffix(".partial.json"))
    ways = {**dict.fromkeys(HEADS, head), SCRATCH: federated, HEAD: federated}
    journal.run(functools.partial(times, given), name="times")
    for seed, name, epsilon in itertools.product(range(given.seeds), ways, EPSILONS):
        learn = functools.partial(ways[name], given, name, epsilon, seed)
        journal.run(learn, name=name, epsilon=epsilon, seed=seed)
    results = {
        "command": command(__file__, given, "mobilenet", "seeds"),
        "machine": machine("dp-accounting"),
        "runs": journal.runs,
    }
    write(given.out, report(results), results)
    plot(given.out.with_suffix(".png"), [run for run in journal.runs if "accuracy" in run])


if __name__ == "__main__":
    main()
