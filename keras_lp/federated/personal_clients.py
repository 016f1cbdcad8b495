"""What the clients of a federation keep between rounds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_lp.federated.checkpoints import Checkpoints
from keras_lp.federated.client_store import ClientStore
from keras_lp.federated.clients.arrays import count_examples
from keras_lp.federated.clients.source import Source
from keras_lp.federated.engine.client_work import LocalTraining
from keras_lp.federated.engine.personal import Personal, PersonalLayers
from keras_lp.model.short_runs import fast_statistics

_FOLDER = "clients"  # in the folder of checkpoints


class PersonalClients:
    """What each client keeps: its personal layers, and with error feedback what it did not send.

    Args:
        model: the model.
        layers: the personal layers, or None.
        error_feedback: whether there is error feedback.
    """

    def __init__(self, model: keras.Model, layers: PersonalLayers, error_feedback: bool) -> None:
        self._model = model
        self.layers = layers
        self._error_feedback = error_feedback
        self._store = ClientStore()

    @property
    def _anything(self) -> bool:
        return self.layers is not None or self._error_feedback

    def _variables(self) -> Personal:
        return Personal(self._model, self.layers, self._error_feedback)

    def open(self, directory: str | Path | None, round_number: int) -> None:
        """Continues after a round, with the values in a folder of checkpoints if there is one."""
        if self._anything:
            folder = None if directory is None else Path(directory) / _FOLDER
            self._store.open(folder, round_number)

    def values(self, client: Hashable) -> np.ndarray | None:
        """Returns what a client keeps, `(size,)` as in `Personal`, None at first.

        Raises:
            ValueError: if they belong to other layers.
        """
        values = self._store.read(client) if self._anything else None
        if values is None:
            return None
        size = self._variables().size
        if len(values) != size:
            raise ValueError(
                "The trainable layers of clients that keep values must stay the same. Received: "
                f"{len(values):,} values of client {client!r} for layers with {size:,}. Make a new "
                "federation."
            )
        return values

    def knows_any(self, clients: Sequence[Hashable]) -> bool:
        """Whether one of the clients has values, or no layers are personal."""
        return self.layers is None or any(self.values(one) is not None for one in clients)

    def keep(
        self,
        clients: Sequence[Hashable],
        values: np.ndarray,
        round_number: int,
        checkpoints: Checkpoints | None,
    ) -> None:
        """Stores the values of clients after a round, `(clients, size)`."""
        if not self._anything:
            return
        # Without checkpoints, an interrupted round is run again.
        earliest = round_number - 1 if checkpoints is None else checkpoints.earliest()
        for client, own in zip(clients, values, strict=True):
            self._store.write(client, own, round_number, earliest)

    def of_client(self, client: Hashable) -> tuple[list[Any], list[np.ndarray]]:
        """Returns the personal variables of the model and their values on a client.

        Raises:
            ValueError: if there are no personal layers, or no values of the client.
        """
        if self.layers is None:
            raise ValueError(
                "Clients have models of their own in a federation with personal layers. Received: "
                "one without. Pass `personal_layers`, or use `lp.personalize`."
            )
        values = self.values(client)
        if values is None:
            raise ValueError(
                f"A client has personal weights after its first round. Received: {client!r}, "
                "which has none."
            )
        personal = self._variables()
        return personal.variables, personal.arrays(values)

    def fast_statistics(
        self, source: Source, rounds: float, local: LocalTraining
    ) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which the statistics of BatchNormalization adapt in a short run.

        Args:
            source: the source of the client data, of which the first client is loaded.
            rounds: in how many rounds a client takes part.
            local: the settings of local training.
        """
        if not self._variables().states:
            return contextlib.nullcontext()
        examples = count_examples(source.load(source.ids[0]))
        steps = local.epochs * math.ceil(examples / (local.batch_size or examples))
        return fast_statistics(self._model, math.ceil(rounds * steps))
