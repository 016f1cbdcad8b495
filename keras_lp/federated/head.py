"""Solves heads on a frozen backbone on the server, with sums from the clients."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones import features
from keras_lp.federated import tff_runtime
from keras_lp.federated.checkpoints import Checkpoints, describe_model, digest
from keras_lp.federated.clients.clients import Clients
from keras_lp.federated.clients.source import Source
from keras_lp.federated.engine import head_sums
from keras_lp.federated.engine.head_problem import Problem, Standardization, label_scales
from keras_lp.federated.engine.sums import Sums
from keras_lp.federated.running import print_round, validation
from keras_lp.model import checks, class_balance
from keras_lp.model.compiled import loss_weights
from keras_lp.model.linear_heads import linear_heads
from keras_lp.tasks.heads import Head, tasks
from keras_lp.tasks.regression import Regression
from keras_lp.utils.arguments import Verbose, check_positive
from keras_lp.utils.progress import Progress, bar_only

_MOST_STEPS = 500  # of the solver, usually one round each


@checks.plain_errors()
def fit_head(
    model: keras.Model,
    clients: Clients,
    *,
    l2: float,
    tolerance: float,
    checkpoint_dir: str | os.PathLike[str] | None,
    validation_data: Any,
    verbose: Verbose,
) -> keras.callbacks.History:
    """Implements `FederatedAveraging.fit_head`, which describes the arguments."""
    check_positive("l2", l2)
    check_positive("tolerance", tolerance)
    checks.check_trainable_unchanged(model)
    known = _vector_heads(model)
    validate = validation(model, validation_data, 1)
    with (
        Source(model, clients, on_features=True) as source,
        tempfile.TemporaryDirectory(prefix="keras_lp_") as folder,
    ):
        tff_runtime.load_tff()
        checkpoints = _open(checkpoint_dir, model, source, l2)
        rounds = _Rounds(model, source, Path(folder), checkpoints, verbose)
        sums = rounds.run((), head_sums.moments(known, rounds.read_rows), lambda _: {})
        scales = label_scales(known, sums)
        waiting = class_balance.waiting_heads(known)
        if waiting:
            counts = rounds.run((), head_sums.class_sums(waiting, rounds.read_rows), lambda _: {})
            for name, head in waiting.items():
                class_balance.set_weights(head, counts[name])
        problem = Problem(Standardization(sums), known, l2)
        add_up = head_sums.losses(known, scales, rounds.read_rows)

        def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
            def describe(sums: Any) -> dict[str, float]:
                losses = _losses(model, sums)  # first, because it raises if there are no labels
                _, gradient = problem.objective(point, sums)
                return {**losses, "gradient": float(np.abs(gradient).max())}

            return problem.objective(point, rounds.run(problem.weights(point), add_up, describe))

        point = _minimize(objective, problem.start(), tolerance, verbose)
        _write(known, problem.weights(point), scales)
        rounds.history.history.update({k: [v] for k, v in validate(1)[0].items()})
    return rounds.history


class _Rounds:
    """The rounds of one call. Each round sums a function over all clients.

    After a restart the solver repeats its requests, and rounds in a checkpoint are not run again.

    Attributes:
        history: the history, with one epoch per round.
        read_rows: a function that reads the rows of a block in a graph.
    """

    def __init__(
        self,
        model: keras.Model,
        source: Source,
        folder: Path,
        checkpoints: Checkpoints | None,
        verbose: Verbose,
    ) -> None:
        waiting = source.waiting(source.ids)
        with Progress("Clients loaded", waiting, bar_only(verbose)) as progress:
            data = source.load_all(source.ids, progress)
        self._sums = Sums(data, folder)
        self.read_rows = self._sums.read_rows
        self._clients = len(source.ids)
        self._checkpoints = checkpoints
        saved = checkpoints.load_all() if checkpoints is not None else []
        self._saved = {about["sent"]: (arrays, about) for _, arrays, about in saved}
        self._verbose = verbose
        self._tasks = tasks(model)
        self.history = keras.callbacks.History()
        self.history.set_model(model)
        self.history.on_train_begin()

    def run(
        self,
        weights: tuple[np.ndarray, ...],
        function: Callable[..., Any],
        describe: Callable[[Any], dict[str, float]],
    ) -> Any:
        """Returns the sums of a function over all clients.

        Args:
            weights: the weights that are sent to the clients.
            function: `(weights, block) -> sums`.
            describe: a function that returns the logs for the sums.
        """
        number = len(self.history.epoch) + 1
        sent = hashlib.sha256(b"".join(array.tobytes() for array in weights)).hexdigest()
        if sent in self._saved:
            arrays, about = self._saved[sent]
            self.history.on_epoch_end(number - 1, about["logs"])
            return tf.nest.map_structure(lambda i: arrays[i], about["structure"])
        start = time.perf_counter()
        sums = self._ask(weights, function)
        arrays = tf.nest.flatten(sums)
        logs = {
            **describe(sums),
            "clients": self._clients,
            "bytes_up": self._clients * sum(array.nbytes for array in arrays),
            "bytes_down": self._clients * sum(array.nbytes for array in weights),
            "seconds": time.perf_counter() - start,
        }
        if self._checkpoints is not None:
            structure = tf.nest.pack_sequence_as(sums, range(len(arrays)))
            about = {"sent": sent, "structure": structure, "logs": logs}
            self._checkpoints.save(number, arrays, about)
        if self._verbose:
            print_round(number, None, logs, self._tasks)
        self.history.on_epoch_end(number - 1, logs)
        return sums

    def _ask(self, weights: tuple[np.ndarray, ...], function: Callable[..., Any]) -> Any:
        """Runs a TFF round."""
        sums = self._sums.add_up(function, weights)
        if not all(np.isfinite(array).all() for array in tf.nest.flatten(sums)):
            raise ValueError(
                "Features must be finite. Received: sums of features or losses over the clients "
                "that are not. Check the outputs of the backbone, or use float32."
            )
        return sums


def _minimize(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    tolerance: float,
    verbose: Verbose,
) -> np.ndarray:
    """Returns the minimum of a smooth convex function."""
    from scipy.optimize import minimize

    options = {"maxiter": _MOST_STEPS, "maxcor": 20, "gtol": tolerance, "ftol": 1e-6 * tolerance}
    found = minimize(objective, start, method="L-BFGS-B", jac=True, options=options)
    if found.status == 1 and verbose:
        print(
            f"Stopped after {_MOST_STEPS} steps with gradient {np.abs(found.jac).max():.1e}. A "
            "larger `l2` needs fewer steps.",
            flush=True,
        )
    return found.x


def _vector_heads(model: keras.Model) -> dict[str, Head]:
    """Returns the heads by name; raises unless there is one feature vector per example."""
    known = linear_heads(model)
    shape = features.feature_model(model).output_shape
    if len(shape) != 2:
        raise ValueError(
            "`fit_head` requires one feature vector per example. Received: features of shape "
            f'{tuple(shape)}. Build the model with pooling="avg", or train it with `fit`.'
        )
    return known


def _open(
    directory: str | os.PathLike[str] | None, model: keras.Model, source: Source, l2: float
) -> Checkpoints | None:
    """Opens the checkpoint folder, which keeps one checkpoint per round."""
    if directory is None:
        return None
    settings = {"method": "fit_head", "l2": float(l2), **describe_model(model)}
    settings["clients"] = digest([repr(client) for client in source.ids])
    return Checkpoints(directory, settings, kept=None)


def _losses(model: keras.Model, sums: Mapping[str, Any]) -> dict[str, float]:
    """Computes the losses, as in `evaluate`, from the sums of a round."""
    unlabelled = [name for name, own in sums.items() if not own["weight"] > 0]
    if unlabelled:
        raise ValueError(
            "Each task needs a label with a weight above 0. Received: clients without any for "
            f"{unlabelled}."
        )
    means = {name: float(own["loss"] / own["weight"]) for name, own in sums.items()}
    factors = loss_weights(model)
    each = {f"{name}_loss": value for name, value in means.items()} if len(means) > 1 else {}
    return {"loss": sum(factors[name] * value for name, value in means.items()), **each}


def _write(
    known: Mapping[str, Head],
    weights: Sequence[np.ndarray],
    scales: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Assigns kernels and biases to the heads, and label scales to `Regression` heads."""
    for (name, head), kernel, bias in zip(known.items(), weights[::2], weights[1::2], strict=True):
        head.set_raw_weights(kernel, bias)
        if isinstance(head.task, Regression):
            mean, std = scales[name]
            head.mean.assign(mean)
            head.std.assign(std)
