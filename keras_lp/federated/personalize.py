"""Personal models: the global model of a federation, fine-tuned on each client.

Wang et al., 2019, Federated Evaluation of On-device Personalization (arXiv:1910.10252).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from scipy import stats

from keras_lp.federated.averaging import FederatedAveraging
from keras_lp.federated.clients.arrays import Arrays, count_examples
from keras_lp.federated.clients.clients import Clients, Population
from keras_lp.federated.clients.source import Source
from keras_lp.federated.engine.rounds import changing
from keras_lp.federated.evaluation import better
from keras_lp.model.plain import set_values, with_values
from keras_lp.tasks.heads import tasks
from keras_lp.utils.arguments import Verbose, check_choice, check_positive
from keras_lp.utils.progress import Progress
from keras_lp.utils.text_table import ShownAsText, text_table

_TENTH = 10


def split_clients(
    clients: Clients, *, held_out: float = 0.25, seed: int = 0
) -> tuple[dict[Any, Arrays], dict[Any, Arrays]]:
    """Divides the examples of each client at random into a part to train on and a part held out.

    Args:
        clients: as in `FederatedAveraging.fit`. All clients are loaded.
        held_out: share of the examples that are held out, at least one of each client. Defaults to
            0.25.
        seed: random seed. Defaults to 0.

    Returns:
        Two dicts of the same ids: the training part and the held-out part, tuples of arrays.

    Raises:
        ValueError: if `held_out` is not between 0 and 1, or a client has a single example.

    Example:

    >>> import numpy as np, keras_lp as lp
    >>> clients = lp.partition((np.zeros((20, 3)), np.arange(20) % 2), clients=2)
    >>> train, test = lp.split_clients(clients, held_out=0.3)
    >>> [len(y) for _, y in train.values()], [len(y) for _, y in test.values()]
    ([7, 7], [3, 3])
    """
    if not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
        raise ValueError(f"`held_out` must be between 0 and 1. Received: held_out={held_out!r}.")
    population = Population(clients)
    train: dict[Any, Arrays] = {}
    test: dict[Any, Arrays] = {}
    for i, client in enumerate(population.ids):
        data = population.load(client)
        count = count_examples(data)
        if count < 2:
            raise ValueError(
                f"Each client needs two examples, one of them held out. Received: {count} of "
                f"client {client!r}. Leave it out."
            )
        order = np.random.default_rng((seed, i)).permutation(count)
        number = min(count - 1, max(1, round(held_out * count)))
        for part, rows in ((train, order[number:]), (test, order[:number])):
            rows = np.sort(rows)
            part[client] = tf.nest.map_structure(lambda array, rows=rows: array[rows], data)
    return train, test


@dataclasses.dataclass(repr=False)
class PersonalModels(ShownAsText):
    """The output of `lp.personalize`. Printing it compares the personal models with the global one.

    Attributes:
        metric: the name of what is compared.
        before: the result of the global model on the held-out examples of each client, by id.
        after: that of the personal model.
    """

    metric: str
    before: dict[Any, float]
    after: dict[Any, float]
    _direction: int
    _weights: dict[Any, list[np.ndarray]]
    _make: Callable[[list[np.ndarray]], keras.Model]

    def model(self, client: Hashable) -> keras.Model:
        """Returns the model of a client, a plain Keras model (see `lp.plain_model`).

        Raises:
            ValueError: if there is no such client.
        """
        check_choice("client", client, self._weights)
        return self._make(self._weights[client])

    @property
    def change(self) -> np.ndarray:
        """How much better each personal model is, below 0 if it is worse, `(clients,)`."""
        pairs = [(self.before[client], self.after[client]) for client in self.before]
        return np.array([self._direction * (after - before) for before, after in pairs])

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"` or `"not told apart"`: the 95 % interval of the mean change."""
        low, high = self._interval()
        return "better" if low > 0 else "worse" if high < 0 else "not told apart"

    def __str__(self) -> str:
        known = [np.array(list(values.values())) for values in (self.before, self.after)]
        rows = [
            [self.metric, "global", "personal"],
            ["mean over clients", *(f"{values.mean():.4f}" for values in known)],
            ["worst tenth", *(f"{self._worst(values):.4f}" for values in known)],
        ]
        change = self.change
        low, high = self._interval()
        return "\n".join(
            [
                text_table(rows, left=1),
                f"{len(change)} clients, on examples that were held out: {(change > 0).sum()} "
                f"personal models are better, {(change < 0).sum()} worse.",
                f"Mean change {change.mean():+.4f} (95 % interval {low:+.4f} to {high:+.4f}): "
                f"{self.verdict}.",
            ]
        )

    def _interval(self) -> tuple[float, float]:
        change = self.change
        if len(change) < 2:
            return -np.inf, np.inf
        margin = stats.t.ppf(0.975, len(change) - 1) * change.std(ddof=1) / np.sqrt(len(change))
        return float(change.mean() - margin), float(change.mean() + margin)

    def _worst(self, values: np.ndarray) -> float:
        ranked = np.sort(self._direction * values)
        return float(self._direction * ranked[: max(1, round(len(values) / _TENTH))].mean())


def personalize(
    federated: FederatedAveraging,
    clients: Clients,
    held_out: Clients,
    *,
    epochs: int = 1,
    batch_size: int = 20,
    metric: str | None = None,
    seed: int = 0,
    verbose: Verbose = "auto",
) -> PersonalModels:
    """Fine-tunes the global model of a federation on each client, and judges the personal models.

    Each client starts from the current weights of `federated.model` and trains those that are
    trainable, with the loss and optimizer of the model. The global model and its optimizer are
    unchanged afterwards. The examples by which the models are judged must not have been used by the
    federation: divide each client with `lp.split_clients` before `fit`.

    Args:
        federated: the federation.
        clients: the training part of each client, as in `FederatedAveraging.fit`. All clients are
            loaded.
        held_out: the held-out part of each client, with the same ids.
        epochs: number of passes over the data of a client. Defaults to 1.
        batch_size: number of examples per step. Defaults to 20.
        metric: what is compared, a name of `model.evaluate(..., return_dict=True)`. Defaults to
            None: the first metric, or the loss if there is none or several tasks.
        seed: random seed of the order of the examples. Defaults to 0.
        verbose: as in `FederatedAveraging.evaluate`. Defaults to `"auto"`.

    Returns:
        `PersonalModels`: print it; `model(client)` returns the model of a client.

    Raises:
        ValueError: if the ids differ, the metric is unknown, the federation has personal layers, or
            clients are refused as in `FederatedAveraging.fit`.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"], optimizer="sgd")
    >>> x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    >>> train, test = lp.split_clients(lp.partition((x, x.sum(1) > 0), clients=5))
    >>> federated = lp.FederatedAveraging(model)
    >>> history = federated.fit(train, rounds=2, verbose=0)
    >>> personal = lp.personalize(federated, train, test, verbose=0)
    >>> personal.metric, len(personal.after)
    ('accuracy', 5)

    Reference: Wang et al., 2019, Federated Evaluation of On-device Personalization
    (arXiv:1910.10252).
    """
    check_positive("epochs", epochs, integer=True)
    check_positive("batch_size", batch_size, integer=True)
    if federated.personal_layers is not None:
        raise ValueError(
            "`personalize` takes a federation whose layers are all shared. Received: one with "
            f"personal_layers={federated.personal_layers!r}, whose clients have models of their "
            "own. Use its `evaluate` and `client_model`."
        )
    model: Any = federated.model
    with Source(model, clients) as source, Source(model, held_out) as judges:
        if set(source.ids) != set(judges.ids):
            other = sorted(map(repr, set(source.ids) ^ set(judges.ids)))
            raise ValueError(
                "The held-out part must have the same clients. Received: "
                f"{len(other)} clients that only one of them has, such as {other[:3]}."
            )
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        variables = [*changing(model), *model.optimizer.variables]
        start = [variable.numpy() for variable in variables]
        weights, results = {}, {}
        try:
            with Progress("Personal models", len(source.ids), verbose) as progress:
                for i, client in enumerate(source.ids):
                    own, judge = source.load(client), judges.load(client)
                    set_values(variables, start)
                    before = _evaluate(model, judge)
                    order = np.random.default_rng((seed, i)).permutation(count_examples(own))
                    shuffled = tf.nest.map_structure(lambda array, o=order: array[o], own)
                    _fit(model, shuffled, epochs, batch_size)
                    weights[client] = [variable.numpy() for variable in changing(model)]
                    results[client] = before, _evaluate(model, judge)
                    progress.step(1)
        finally:
            set_values(variables, start)
    name = _metric(model, metric, next(iter(results.values()))[0])

    def make(own: list[np.ndarray]) -> keras.Model:
        return with_values(model, changing(model), own)

    return PersonalModels(
        name,
        {client: before[name] for client, (before, _) in results.items()},
        {client: after[name] for client, (_, after) in results.items()},
        better(model, name) or 1,
        weights,
        make,
    )


def _fit(model: Any, data: Arrays, epochs: int, batch_size: int) -> None:
    x, y, *weight = data
    model.fit(
        x, y, sample_weight=weight[0] if weight else None, epochs=epochs, batch_size=batch_size,
        shuffle=False, verbose=0,
    )  # fmt: skip


def _evaluate(model: Any, data: Arrays) -> dict[str, float]:
    x, y, *weight = data
    weights = weight[0] if weight else None
    return model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)


def _metric(model: Any, metric: str | None, results: Mapping[str, float]) -> str:
    if metric is not None:
        check_choice("metric", metric, results)
        return metric
    names = [name for name in results if name != "loss"]
    return names[0] if names and len(tasks(model)) < 2 else "loss"
