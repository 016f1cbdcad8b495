"""Networks with ImageNet weights whose files are measured, and what they learn."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import keras

import keras_lp as lp
from lib.networks import SIZE
from lib.problems import Arrays, Problem, cifar10_problem, xray_problem

EPOCHS = 10
FILES = ("mobilenet", "mobilenetv2", "cifar10")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with ImageNet weights, and what it learns."""

    name: str
    problem: Problem
    weights: Path
    options: dict[str, Any]

    def learn(self, train: Arrays, seed: int) -> keras.Model:
        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        model = lp.transfer_model(
            self.name.split()[0],
            self.problem.labels,
            weights=self.weights,
            input_shape=train[0].shape[1:],
            image_size=SIZE,
            **self.options,
        )
        model.fit(*train, epochs=EPOCHS, verbose=0)
        return model


def add_options(arguments: argparse.ArgumentParser) -> None:
    """Adds the options of the files and of the numbers of images."""
    arguments.add_argument(
        "--mobilenet", type=Path, help="h5 file of MobileNet, alpha 0.25, no top"
    )
    arguments.add_argument("--mobilenetv2", type=Path, help="h5 file of MobileNetV2, no top")
    arguments.add_argument("--cifar10", type=Path, help="npz file of cifar10_subset")
    arguments.add_argument("--pictures", type=int, default=1000, help="to train a head on")
    arguments.add_argument("--test", type=int, default=1000, help="test pictures at most")


def networks(given: argparse.Namespace, arguments: argparse.ArgumentParser) -> list[Network]:
    """Returns the networks whose files are given."""
    found = []
    if given.mobilenet:
        options = {"backbone_kwargs": {"alpha": 0.25}}
        xray = xray_problem(given.data_dir)
        found.append(Network("MobileNet 0.25", xray, given.mobilenet, options))
    if given.mobilenetv2 and given.cifar10:
        cifar = cifar10_problem(given.cifar10)
        found.append(Network("MobileNetV2", cifar, given.mobilenetv2, {}))
    if not found:
        arguments.error("no network. Pass --mobilenet FILE, or --mobilenetv2 and --cifar10 FILE.")
    return found
