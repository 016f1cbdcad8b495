"""The clients and their data as arrays that the model can train on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones.pixels import warn_of_scaled_images
from keras_lp.federated.clients.arrays import Arrays, as_arrays, check_unbatched, count_examples
from keras_lp.federated.clients.padding import fill
from keras_lp.model import checks
from keras_lp.model.data import as_numbers
from keras_lp.model.model import input_structure
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import tasks
from keras_lp.tasks.task import Task


class ClientData(Protocol):
    """What is used of TFF's `ClientData`."""

    @property
    def client_ids(self) -> Sequence[Any]:
        """The ids of the clients."""

    def create_tf_dataset_for_client(self, client_id: Any, /) -> Any:
        """Returns the data set of one client."""


# A mapping from ids to data, TFF's ClientData, or (ids, load).
Clients = Mapping[Any, Any] | tuple[Sequence[Any], Callable[[Any], Any]] | ClientData


class Population:
    """The ids of the clients and a function that loads the data of a client.

    Args:
        clients: a mapping from ids to data; a TFF `ClientData`; or a pair `(ids, load)`, where
            `load(id)` returns the data of one client.
        model: the model that trains on the data. The ranks of its inputs distinguish batches from
            examples. Defaults to None.

    Raises:
        ValueError: there are no clients, or an id occurs twice.
        TypeError: `clients` has the wrong type.
    """

    def __init__(self, clients: Clients, model: keras.Model | None = None) -> None:
        self._model = model
        self._load: Callable[[Any], Any]
        ids: Any
        given: Any = clients
        if isinstance(clients, Mapping):
            ids, self._load = clients, clients.__getitem__
        elif hasattr(clients, "create_tf_dataset_for_client"):  # TFF's ClientData
            ids, self._load = given.client_ids, given.create_tf_dataset_for_client
        elif isinstance(clients, (tuple, list)) and len(clients) == 2 and callable(clients[1]):
            ids, self._load = clients
        else:
            raise TypeError(
                "`clients` must be a mapping from client ids to data, a pair (ids, load) or a TFF "
                f"ClientData. Received: clients of type {type(clients).__name__}. Create a mapping "
                "with lp.partition((x, y), clients=10)."
            )
        self.ids: list[Any] = list(ids)
        if not self.ids:
            raise ValueError(
                f"`clients` must have at least one client. Received: clients={clients!r}."
            )
        if len(set(self.ids)) < len(self.ids):
            raise ValueError(
                "Client ids must be unique. Received: "
                f"{len(self.ids)} ids, {len(set(self.ids))} of them different. Rename the "
                "duplicates."
            )
        self.given = clients if isinstance(clients, dict) else {}

    def load(self, client: Hashable) -> Arrays:
        """Returns the arrays of one client."""
        return as_arrays(self._load(client), f"client {client!r}", self._model)

    def holds(self, client: Hashable) -> bool:
        """Whether the data of a client are arrays in memory."""
        return isinstance(self.given.get(client), (tuple, list))

    def check(self) -> None:
        """Checks the data sets in a dict of clients without reading them."""
        for client, data in self.given.items():
            if isinstance(data, tf.data.Dataset):
                check_unbatched(data, f"client {client!r}", self._model)


def fitting_arrays(model: keras.Model, client: Hashable, data: Arrays) -> Arrays:
    """Returns the arrays of a client in the form that the model trains on.

    Labels of a task that the client does not have are filled with the missing value of the task.

    Args:
        model: the model that trains on the data.
        client: the id of the client, for errors.
        data: `(x, y)` or `(x, y, sample_weight)` arrays.

    Raises:
        ValueError: the client is empty, inputs are not finite or have the wrong shape, labels are
            outside the classes, weights are negative or not finite, or sequences differ in length
            and the model does not mask padding.
        TypeError: labels are not numbers.
    """
    where = f" of client {client!r}"
    examples = count_examples(data, where)
    if not examples:
        raise ValueError(
            f"A client must have at least one example. Received: no example{where}. Leave it out."
        )
    x, y, *weight = fill(model, data, where)
    _check_inputs(model, x, where)
    known = tasks(model)
    y = as_numbers(model, y, where)
    checks.check_examples(model, x, y, where)
    warn_of_scaled_images(model, x, f"x{where}")
    if known and isinstance(model.output, Mapping):
        checks.check_label_names(known, y, where)
        y = {
            name: _labels(task, y.get(name), (examples, *model.output[name].shape[1:]))
            for name, task in sorted(known.items())
        }
    elif known and isinstance(y, Mapping):
        raise ValueError(
            "The labels of a model with one output must be an array. Received: "
            f"y{where} with the keys {list(y)}."
        )
    elif known:
        y = _labels(next(iter(known.values())), y, (examples, *model.output.shape[1:]))
    checks.check_weights(weight, where)
    return x, y, *tf.nest.map_structure(lambda array: array.astype("float32"), weight)


def _check_inputs(model: keras.Model, x: Any, where: str) -> None:
    structure = input_structure(model)
    expected = sorted(structure) if isinstance(structure, Mapping) else len(model.inputs)
    flat = tf.nest.flatten(x)
    given = sorted(x) if isinstance(x, Mapping) else len(flat)
    if expected != given:
        raise ValueError(
            "Inputs must match the structure of the model, a dict by name or a number of arrays: "
            f"{expected}. Received: x{where} with {given}."
        )
    for array, tensor in zip(flat, tf.nest.flatten(structure), strict=True):
        shape = tuple(tensor.shape[1:])
        own_shape = array.shape[1:]
        fits = len(own_shape) == len(shape) and all(
            size is None or size == own for size, own in zip(shape, own_shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"Inputs must have the input shape of the model, {shape}. Received: x{where} "
                f"with shape {own_shape} per example. Unbatch a batched data set with "
                "`dataset.unbatch()`."
            )


def _labels(task: Task, y: np.ndarray | None, output_shape: tuple[int, ...]) -> np.ndarray:
    """Returns labels in the shape and dtype of the task; all missing if there are none."""
    numbers = isinstance(task, Classification) and (
        y is None or len(output_shape) > y.ndim or y.shape[-1] == 1
    )
    shape = output_shape[:-1] if numbers else output_shape
    # A sequence of variable length is as long as its labels and padded later.
    own = () if y is None else y.shape
    sizes = [
        size if size is not None else own[i] if i < len(own) else 1 for i, size in enumerate(shape)
    ]
    y = np.full(sizes, task.missing) if y is None else y
    return y.reshape(sizes).astype("int32" if numbers else "float32")
