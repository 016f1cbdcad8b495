"""`flower_app`: a compiled model as a Flower app."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras

from keras_lp.federated.averaging import FederatedAveraging
from keras_lp.federated.fleet.messages import from_record, to_record
from keras_lp.federated.fleet.node import Node
from keras_lp.federated.fleet.server import FleetRounds, Nodes
from keras_lp.utils.arguments import check_positive
from keras_lp.utils.files import whole_file

_INSTALL = "A fleet needs Flower. Install it: pip install 'keras_lp[flower]'"
_LEFT_OUT = ("compression", "personal_layers", "lora_averaging", "lora_ranks")


class FlowerApp(NamedTuple):
    """The output of `flower_app`.

    Attributes:
        server: Flower's `ServerApp`.
        client: Flower's `ClientApp`.
    """

    server: Any
    client: Any


def flower_app(
    model: keras.Model | str | os.PathLike[str],
    data: Callable[[Any], Any],
    *,
    rounds: int,
    min_nodes: int = 2,
    deadline: float | None = 3600.0,
    output: str | os.PathLike[str] = "fleet",
    validation_data: Any = None,
    **settings: Any,
) -> FlowerApp:
    """Returns a Flower app that trains a model as `FederatedAveraging` does, over real machines.

    The same local training runs on each node: loss and optimizer of the model, missing labels,
    layer rates, adapters, several tasks. The server averages, applies the server optimizer, and
    adds the noise of `privacy`. After the same rounds over the same clients, the weights are those
    of `FederatedAveraging`.

    A node gets the file of the model once. In each round, the trainable weights travel; frozen
    weights are compared by a digest. A node that fails, does not answer before the deadline or
    sends numbers that are not finite costs its update, with a warning. If all nodes fail, the run
    fails with their errors.

    Nodes are known by `name` or `partition-id` in their `--node-config`, which must differ. The
    nodes that are there at the start take part; clients per round are drawn from them.

    Everything is written to `output`: checkpoints, from which a run that was killed continues when
    it is started again; `history.json` after each round; and `model.keras` at the end.

    `python -m keras_lp.federated.fleet init FOLDER --model model.keras` writes an app for
    `flwr run`, whose nodes start TensorFlow once.

    Args:
        model: a compiled model, or the path of a `.keras` file.
        data: function from Flower's `Context` of a node to its data: `(x, y)` or
            `(x, y, sample_weight)` arrays. It is called on the node.
        rounds: number of rounds.
        min_nodes: how many nodes to wait for. Defaults to 2.
        deadline: seconds after which answers no longer count in a round; None waits for all.
            Defaults to 3600.
        output: folder of the server. Defaults to `"fleet"`.
        validation_data: as in `FederatedAveraging.fit`, evaluated on the server. Defaults to None.
        **settings: arguments of `FederatedAveraging`, except compression, personal layers and the
            settings of adapters.

    Returns:
        A `FlowerApp` with `server` and `client`.

    Raises:
        ValueError: an argument does not fit.
        TypeError: `data` is not a function, or a setting is unknown.
        ImportError: Flower is not installed.

    Example:

    >>> import keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"], optimizer="sgd")
    >>> app = lp.flower_app(model, load_data, rounds=3)  # doctest: +SKIP
    >>> flwr.simulation.run_simulation(app.server, app.client, 10)  # doctest: +SKIP

    Reference: Beutel et al., 2020, Flower: A Friendly Federated Learning Framework
    (arXiv:2007.14390).
    """
    try:
        from flwr.clientapp import ClientApp
        from flwr.serverapp import ServerApp
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    check_positive("rounds", rounds, integer=True)
    check_positive("min_nodes", min_nodes, integer=True)
    if deadline is not None:
        check_positive("deadline", deadline)
    if not callable(data):
        raise TypeError(f"`data` must be a function of the context. Received: data={data!r}.")
    wrong = sorted(settings.keys() & set(_LEFT_OUT))
    if wrong:
        raise ValueError(
            f"A fleet does not support {', '.join(_LEFT_OUT)}. Received: {wrong}. Leave them out, "
            "or use FederatedAveraging."
        )
    if isinstance(model, keras.Model):
        FederatedAveraging(model, **settings)  # checks the settings
    server, client = ServerApp(), ClientApp()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        loaded = model if isinstance(model, keras.Model) else keras.saving.load_model(model)
        nodes = Nodes(grid, min_nodes, deadline)
        train(loaded, nodes, rounds, Path(output).expanduser(), validation_data, settings)

    nodes: dict[int, tuple[int, Node]] = {}

    @client.train()
    def answer(message: Any, context: Any) -> Any:
        from flwr.app import Message

        run, node = nodes.get(context.node_id, (None, None))
        if node is None or run != context.run_id:  # the data may have changed
            node = Node(lambda: data(context), node_name(context))
            nodes[context.node_id] = context.run_id, node
        found = node.answer(*from_record(message.content))
        return Message(to_record(*found), reply_to=message)

    return FlowerApp(server, client)


def train(
    model: keras.Model,
    nodes: Nodes,
    rounds: int,
    output: Path,
    validation_data: Any,
    settings: dict[str, Any],
) -> keras.callbacks.History:
    """Trains a model over nodes, and writes checkpoints, history and model."""
    federated = _Fleet(model, **settings)
    history = federated.fit(
        nodes,  # type: ignore[arg-type]
        rounds=rounds,
        validation_data=validation_data,
        callbacks=_Written(output),
        checkpoint_dir=output / "checkpoints",
        verbose=2,
    )
    model.save(output / "model.keras")
    print(f"{federated.rounds_done} rounds are done: {output / 'model.keras'}", flush=True)
    return history


def node_name(context: Any) -> int | str:
    """Returns the name of a node: from its settings, or its number."""
    for key in ("name", "partition-id"):
        if key in context.node_config:
            value = context.node_config[key]
            return int(value) if str(value).isdigit() else str(value)
    return int(context.node_id)


class _Fleet(FederatedAveraging):
    """A federation of nodes."""

    _engine = FleetRounds


class _Written(keras.callbacks.Callback):
    """Writes the history after each round."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        before = self.model.history.history  # gets this round after this callback
        history = {
            name: [float(one) for one in (*before.get(name, ()), value)]
            for name, value in (logs or {}).items()
        }
        with whole_file(self._folder / "history.json") as file:
            file.write(json.dumps(history, indent=1).encode())
