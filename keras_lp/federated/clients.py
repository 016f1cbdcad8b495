"""Clients: partitions of a data set, and each client's own data as arrays."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp import checks
from keras_lp.heads import tasks
from keras_lp.model import input_structure
from keras_lp.tasks import Classification, Task

Clients = Mapping[str, Any]


def partition(
    data: Any, clients: int, *, alpha: float | None = None, seed: int = 0
) -> dict[str, tuple[Any, Any]]:
    """Divides a data set over clients: disjoint, covering, no client empty.

    Args:
        data: `(x, y)` of arrays (`y` may be a dict by task), or an unbatched `tf.data.Dataset`
            of such pairs.
        clients: how many parts, from 1 to the number of examples.
        alpha: concentration of the Dirichlet distribution that gives each client its share of
            each class: the smaller, the more the clients differ. It needs one class number an
            example. Defaults to None: equal parts of the shuffled examples.
        seed: seed of the shuffle and the shares. Defaults to 0.

    Returns:
        A dict from `"client_0"`, `"client_1"`, ... to `(x, y)` arrays.

    Raises:
        ValueError: more clients than examples, `alpha` of 0 or less, labels that are not class
            numbers where `alpha` is given, or a batched data set.
        TypeError: data that are not pairs.

    Example:

    >>> import numpy as np, keras_lp as lp
    >>> x, y = np.arange(20.0)[:, None], np.arange(20) % 2
    >>> [len(y) for x, y in lp.partition((x, y), clients=3).values()]
    [7, 7, 6]

    Reference: label skew after Hsu, Qi and Brown, 2019 (arXiv:1909.06335).
    """
    x, y = _as_arrays(data, "partition")
    examples = _examples(x, y, "")
    checks.check_positive("clients", clients, integer=True)
    if clients > examples:
        raise ValueError(
            "Every client needs an example. Received: "
            f"clients={clients} for {examples} examples. Ask for fewer clients."
        )
    rng = np.random.default_rng(seed)
    if alpha is None:
        parts = np.array_split(rng.permutation(examples), clients)
    else:
        checks.check_positive("alpha", alpha)
        parts = _dirichlet(_class_numbers(y), clients, alpha, rng)
    width = len(str(clients - 1))
    return {
        f"client_{i:0{width}d}": tf.nest.map_structure(lambda a, part=part: a[part], (x, y))
        for i, part in enumerate(parts)
    }


def client_arrays(model: keras.Model, client: str, data: Any) -> tuple[Any, Any]:
    """Returns one client's `(x, y)` as arrays that the model can train on.

    Tasks that the client has no labels for get their missing value.

    Args:
        model: the model that will train.
        client: the client's id, for the errors.
        data: `(x, y)` arrays or an unbatched `tf.data.Dataset`.

    Raises:
        ValueError: an empty client, a batched data set, inputs that are not finite or not of the
            model's shape, labels outside the classes.
        TypeError: data that are not pairs.
    """
    where = f" of client {client!r}"
    x, y = _as_arrays(data, f"client {client!r}")
    examples = _examples(x, y, where)
    if not examples:
        raise ValueError(
            f"A client needs at least one example. Received: no example{where}. Leave it out."
        )
    structure = input_structure(model)
    expected = sorted(structure) if isinstance(structure, Mapping) else len(model.inputs)
    flat = tf.nest.flatten(x)
    given = sorted(x) if isinstance(x, Mapping) else len(flat)
    if expected != given:
        raise ValueError(
            "Inputs must have the model's structure, a dict of the names or as many arrays: "
            f"{expected}. Received: x{where} with {given}."
        )
    for array, tensor in zip(flat, model.inputs, strict=True):
        expected = tuple(tensor.shape[1:])
        given = array.shape[1:]
        fits = len(given) == len(expected) and all(
            size is None or size == own for size, own in zip(expected, given, strict=True)
        )
        if not fits:
            raise ValueError(
                f"Inputs must have the shape that the model takes, {expected}. Received: x{where} "
                f"of shape {given} an example. A batched data set must be unbatched: "
                "`dataset.unbatch()`."
            )
    known = tasks(model)
    checks.check_examples(known, x, y, where)
    if known and isinstance(model.output, Mapping):
        checks.check_label_names(known, y, where)
        y = {
            name: _labels(task, y.get(name), (examples, *model.output[name].shape[1:]))
            for name, task in sorted(known.items())
        }
    elif known and isinstance(y, Mapping):
        raise ValueError(
            f"This model has one output, so its labels are an array. Received: y{where} with the "
            f"keys {list(y)}."
        )
    return x, y


def _labels(task: Task, y: np.ndarray | None, output_shape: tuple[int, ...]) -> np.ndarray:
    """Returns labels of one shape and type for every client, all missing where there are none."""
    classification = isinstance(task, Classification)
    shape = output_shape[:-1] if classification else output_shape
    y = np.full(shape, task.missing) if y is None else y
    return y.reshape(shape).astype("int32" if classification else "float32")


def _class_numbers(y: Any) -> np.ndarray:
    if isinstance(y, Mapping) or y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            "`alpha` skews the classes, so labels must be one class number an example. Received: "
            f"y={type(y).__name__ if isinstance(y, Mapping) else f'{y.dtype} of shape {y.shape}'}"
            ". Leave `alpha` out for equal parts."
        )
    return y


def _dirichlet(
    labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator
) -> list[np.ndarray]:
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, chunk in zip(parts, np.split(members, cuts), strict=True):
            part.extend(chunk)
    for part in parts:  # an empty client takes one example from the largest
        if not part:
            part.append(max(parts, key=len).pop())
    return [np.sort(part) for part in parts]


def _examples(x: Any, y: Any, where: str) -> int:
    sizes = {len(array) for array in tf.nest.flatten((x, y))}
    if len(sizes) > 1:
        raise ValueError(
            "There must be as many labels as inputs. Received: arrays of the lengths "
            f"{sorted(sizes)}{where}."
        )
    return sizes.pop()


def _as_arrays(data: Any, what: str) -> tuple[Any, Any]:
    if isinstance(data, tf.data.Dataset):
        return _from_dataset(data, what)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return _sorted_arrays(data[0]), _sorted_arrays(data[1])
    raise TypeError(
        f"The data of {what} must be a pair (x, y) of arrays or an unbatched tf.data.Dataset of "
        f"such pairs. Received: {type(data).__name__}."
    )


def _sorted_arrays(part: Any) -> Any:
    """Returns arrays; those of a dict in the order of its names, which TFF wants."""
    if isinstance(part, Mapping):
        return collections.OrderedDict((name, np.asarray(part[name])) for name in sorted(part))
    if isinstance(part, (tuple, list)) and all(np.ndim(array) > 0 for array in part):
        return tuple(np.asarray(array) for array in part)
    return np.asarray(part)


def _from_dataset(data: tf.data.Dataset, what: str) -> tuple[Any, Any]:
    spec = data.element_spec
    if not (isinstance(spec, tuple) and len(spec) == 2):
        raise ValueError(
            f"The data set of {what} must yield pairs (x, y). Received: element_spec={spec}."
        )
    if any(leaf.shape.rank and leaf.shape[0] is None for leaf in tf.nest.flatten(spec)):
        raise ValueError(
            f"The data set of {what} must yield single examples. Received: a batched data set, "
            f"element_spec={spec}. Use `dataset.unbatch()`."
        )
    if data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            f"The data set of {what} must end. Received: one that repeats without end. Drop "
            "`repeat()`: `local_epochs` says how often a client sees its data."
        )
    examples = list(data.as_numpy_iterator())
    if not examples:
        empty = tf.nest.map_structure(lambda leaf: np.zeros((0, *leaf.shape)), spec)
        return _sorted_arrays(empty[0]), _sorted_arrays(empty[1])
    x, y = tf.nest.map_structure(lambda *leaves: np.stack(leaves), *examples)
    return _sorted_arrays(x), _sorted_arrays(y)
