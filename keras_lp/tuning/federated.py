"""Search over the settings of `lp.FederatedAveraging`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keras_tuner import HyperParameters

from keras_lp.backbones.features import obstacle
from keras_lp.backbones.resolve import BackboneLike
from keras_lp.federated.averaging import FederatedAveraging
from keras_lp.federated.clients.source import Source
from keras_lp.model.model import Model
from keras_lp.multitask.multitask import multitask_model
from keras_lp.tasks.classification import as_task
from keras_lp.tasks.task import TaskLike
from keras_lp.transfer.transfer import transfer_model
from keras_lp.tuning import space
from keras_lp.tuning.hypermodel import BuilderHyperModel
from keras_lp.tuning.space import SEARCH

_ROUNDS = (  # arguments of `lp.FederatedAveraging`
    "clients_per_round",
    "local_epochs",
    "batch_size",
    "server_optimizer",
    "proximal_strength",
    "weighting",
    "seed",
)

_SPACES = {
    "learning_rate": space.learning_rate(1e-3, 1.0, default=0.1),
    "local_epochs": lambda hp: hp.Choice("local_epochs", [1, 2, 5]),
    "server_optimizer": space.server_optimizer,
    "proximal_strength": lambda hp: hp.Choice("proximal_strength", [0.0, 0.01, 0.1, 1.0]),
    "dropout": space.dropout,
    "hidden_units": space.hidden_units,
}


class FederatedHyperModel(BuilderHyperModel):
    """A `keras_tuner.HyperModel` of `lp.FederatedAveraging`. A round is an epoch.

    `search(clients, validation_data=..., epochs=rounds)` of a tuner passes its arguments to `fit`.
    A trial that continues another one (Hyperband) continues from its weights and round number; the
    state of the server optimizer starts again.

    Every argument is a value, which is fixed; a function of `hp`, which defines your own search
    space; or for those below `"search"`, the default space.

    | argument | default space | searched by default |
    |---|---|---|
    | `learning_rate`, of the clients | 1e-3 to 1, on a logarithmic scale | yes |
    | `local_epochs` | 1, 2 or 5 | yes |
    | `server_optimizer` | None, `"adam"` or `"yogi"` | yes |
    | `proximal_strength` | 0, 0.01, 0.1 or 1 | yes |
    | `dropout` | 0 to 0.5 in steps of 0.1 | no, 0 |
    | `hidden_units` | `()`, `(64,)` or `(256,)` | no, `()` |

    Args:
        backbone: as in `lp.transfer_model`. A model object is copied for each trial that trains it.
        task: a task as in `lp.transfer_model`, or a dict of tasks as in `lp.multitask_model`.
        learning_rate: see the table.
        local_epochs: see the table.
        server_optimizer: see the table.
        proximal_strength: see the table.
        optimizer: the optimizer of the clients. Defaults to `"sgd"`.
        name: as in `keras_tuner.HyperModel`.
        tunable: as in `keras_tuner.HyperModel`.
        **arguments: other arguments of the builder and of `lp.FederatedAveraging`.

    Raises:
        TypeError: if neither has an argument.
        ValueError: if a layer of the backbone cannot be copied.

    Example:

    >>> import keras, keras_lp as lp
    >>> import keras_tuner
    >>> backbone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> hypermodel = lp.FederatedHyperModel(backbone, 3, local_epochs=1)
    >>> hp = keras_tuner.HyperParameters()
    >>> model = hypermodel.build(hp)
    >>> hp.values
    {'learning_rate': 0.1, 'server_optimizer': 'none', 'proximal_strength': 0.0}

    References: McMahan et al., 2017 (arXiv:1602.05629); Reddi et al., 2021 (arXiv:2003.00295).
    """

    own = _ROUNDS

    def __init__(
        self,
        backbone: BackboneLike,
        task: TaskLike | Mapping[str, TaskLike],
        *,
        learning_rate: Any = SEARCH,
        local_epochs: Any = SEARCH,
        server_optimizer: Any = SEARCH,
        proximal_strength: Any = SEARCH,
        optimizer: Any = "sgd",
        name: str | None = None,
        tunable: bool = True,
        **arguments: Any,
    ) -> None:
        given = {
            "learning_rate": learning_rate,
            "local_epochs": local_epochs,
            "server_optimizer": server_optimizer,
            "proximal_strength": proximal_strength,
            "optimizer": optimizer,
            **arguments,
        }
        several = isinstance(task, Mapping)
        builder = multitask_model if several else transfer_model
        known = task if several else as_task(task)
        super().__init__(builder, backbone, known, given, _SPACES, name, tunable)
        self._sources: dict[Any, Any] = {}

    def fit(self, hp: HyperParameters, model: Model, clients: Any, **kwargs: Any) -> Any:
        """Runs rounds of a trial and returns its `History`.

        Args:
            hp: the hyperparameters of the trial.
            model: the output of `build(hp)`.
            clients: as in `lp.FederatedAveraging.fit`.
            **kwargs: arguments of `lp.FederatedAveraging.fit`; `epochs` is the number of rounds,
                `initial_epoch` the number of rounds that are done.
        """
        values = self.values(hp)
        if obstacle(model) is None and self.is_shared(values):
            clients = self._with_features(values, clients)
            kwargs["validation_data"] = self._held_out(values, kwargs.get("validation_data"))
        rounds = {name: values[name] for name in _ROUNDS if name in values}
        federated = FederatedAveraging(model, **rounds)
        federated.rounds_done = kwargs.pop("initial_epoch", 0)
        return federated.fit(clients, kwargs.pop("epochs", 1), **kwargs)

    def forget_features(self) -> None:
        """Frees the memory and the files of the features."""
        super().forget_features()
        for source, *_ in self._sources.values():
            source.__exit__()
        self._sources.clear()

    def _with_features(self, values: Mapping[str, Any], clients: Any) -> Any:
        """Returns clients with features as inputs, which are computed once for all trials."""
        base = self._base(values)
        key = id(base), id(clients)
        if key not in self._sources:
            source = Source(base, clients)
            found = source.features() if source.on_features else clients
            self._sources[key] = source, found, base, clients  # the ids stay in use
        return self._sources[key][1]

    def _held_out(self, values: Mapping[str, Any], data: Any) -> Any:
        """Returns arrays for validation with features as inputs."""
        if not isinstance(data, (tuple, list)) or len(data) < 2:
            return data
        x, y, *rest = data
        found = self.shared_features(values).replace({"x": x, "y": y})
        return (found["x"], y, *rest)
