"""Partitions a data set into clients for simulations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import tensorflow as tf

from keras_lp.federated.clients.arrays import Arrays, as_arrays, class_of, count_examples
from keras_lp.utils.arguments import check_positive
from keras_lp.utils.interop import without_column


def partition(
    data: Any,
    clients: int | None = None,
    *,
    alpha: float | None = None,
    shards: int | None = None,
    by: Any = None,
    seed: int = 0,
) -> dict[str, Arrays]:
    """Partitions a data set into clients. Every example goes to one client; no client is empty.

    Without `alpha`, `shards` and `by`, the clients get equal parts of the shuffled examples.
    Partition training data only. If a client needs held-out data, split them from its own part.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` arrays or pandas columns (`y` may be a dict by
            task, or a `DataFrame` with a column per task), or an unbatched `tf.data.Dataset` or
            Grain loader of such tuples.
        clients: number of clients, from 1 to the number of examples. Defaults to None,
            which is allowed only with `by`: each key is then a client.
        alpha: concentration of the Dirichlet distribution of the shares of each class over the
            clients. The smaller it is, the more the clients differ. Needs one class per example: a
            number, a name, or a one-hot or soft label. Defaults to None.
        shards: number of shards per client. The examples are sorted by class and cut into
            `clients * shards` equal shards, which are assigned at random. With 2, most clients have
            two classes. Needs one class per example. Defaults to None.
        by: a natural key of each example, such as speaker, writer or language, as an array
            `(examples,)`, or the name of a column of `x`, a pandas `DataFrame`; the column is then
            not an input. All examples with the same key go to the same client. With fewer clients
            than keys, the largest keys are assigned first, each to the client with the fewest
            examples. Defaults to None.
        seed: random seed of the shuffling and the shares. Defaults to 0.

    Returns:
        A dict from client id to a tuple of arrays, as many as in `data`. The ids are `"client_0"`,
        `"client_1"`, ... (`"client_00"`, ... for more than 10 clients), or with `by` and no
        `clients` the sorted keys as strings.

    Raises:
        ValueError: there are more clients than examples or keys, or more shards than examples;
            more than one of `alpha`, `shards` and `by` is given; `alpha` is 0 or less; labels are
            not classes although `alpha` or `shards` needs them; `by` has the wrong length; or the
            data set is batched.
        TypeError: `data` are not pairs.

    Example:

    >>> import numpy as np, keras_lp as lp
    >>> x, y = np.arange(20.0)[:, None], np.arange(20) % 2
    >>> [len(y) for x, y in lp.partition((x, y), clients=3).values()]
    [7, 7, 6]
    >>> speakers = np.repeat(["ROMEO", "JULIET"], [8, 12])
    >>> {name: len(y) for name, (x, y) in lp.partition((x, y), by=speakers).items()}
    {'JULIET': 12, 'ROMEO': 8}

    References: Hsu, Qi and Brown, 2019 (arXiv:1909.06335) for `alpha`; McMahan et al., 2017
    (arXiv:1602.05629) for `shards`.
    """
    if isinstance(by, str) and isinstance(data, (tuple, list)) and len(data) in (2, 3):
        x, by = without_column(data[0], by)
        data = (x, *data[1:])
    arrays = as_arrays(data, "partition")
    examples = count_examples(arrays)
    ways = {
        name: value
        for name, value in {"alpha": alpha, "shards": shards, "by": by}.items()
        if value is not None
    }
    if len(ways) > 1:
        raise ValueError(
            "At most one of `alpha`, `shards` and `by` must be given. "
            f"Received: {' and '.join(ways)}."
        )
    count = cast(int, clients)  # None with `by` alone
    if clients is not None or by is None:
        check_positive("clients", clients, integer=True)
        if count > examples:
            raise ValueError(
                "Every client must get an example. Received: "
                f"clients={clients} for {examples} examples. Use fewer clients."
            )
    rng = np.random.default_rng(seed)
    if by is not None:
        named = _by_key(by, examples, clients)
    elif shards is not None:
        named = _numbered(_shards(_classes(arrays[1], "shards"), count, shards, rng))
    elif alpha is not None:
        check_positive("alpha", alpha)
        named = _numbered(_dirichlet(_classes(arrays[1], "alpha"), count, alpha, rng))
    else:
        named = _numbered(np.array_split(rng.permutation(examples), count))
    return {
        name: tf.nest.map_structure(lambda array, rows=rows: array[rows], arrays)
        for name, rows in named.items()
    }


def _numbered(parts: list[np.ndarray]) -> dict[str, np.ndarray]:
    width = len(str(len(parts) - 1))
    return {f"client_{i:0{width}d}": part for i, part in enumerate(parts)}


def _classes(y: Any, argument: str) -> np.ndarray:
    """Returns the class of each example as a number or name."""
    found = None if isinstance(y, Mapping) else class_of(y)
    if found is None or found.ndim != 1:
        raise ValueError(
            f"`{argument}` requires labels with one class per example: numbers, names or one-hot "
            "labels. "
            "Received: "
            f"y={type(y).__name__ if isinstance(y, Mapping) else f'{y.dtype} of shape {y.shape}'}"
            f". Leave `{argument}` out for equal parts."
        )
    return found


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
    for part in parts:  # an empty client gets one example from the largest
        if not part:
            part.append(max(parts, key=len).pop())
    return [np.sort(part) for part in parts]


def _shards(
    labels: np.ndarray, clients: int, shards: int, rng: np.random.Generator
) -> list[np.ndarray]:
    check_positive("shards", shards, integer=True)
    if clients * shards > len(labels):
        raise ValueError(
            "Every shard must get an example. Received: "
            f"clients={clients} with shards={shards} for {len(labels)} examples. Use fewer."
        )
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_class, clients * shards)
    dealt = rng.permutation(len(pieces)).reshape(clients, shards)
    return [np.sort(np.concatenate([pieces[i] for i in hand])) for hand in dealt]


def _by_key(by: Any, examples: int, clients: int | None) -> dict[str, np.ndarray]:
    keys = np.asarray(by)
    if keys.shape != (examples,):
        raise ValueError(
            f"`by` must have one key per example, shape ({examples},). Received: by of shape "
            f"{keys.shape}."
        )
    names, owner, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    if clients is None:
        strings = [
            name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()
        ]
        return {name: np.flatnonzero(owner == i) for i, name in enumerate(strings)}
    if clients > len(names):
        raise ValueError(
            "With `by`, every client must get a key. Received: "
            f"clients={clients} for {len(names)} different keys. Use fewer clients."
        )
    client_of, totals = np.empty(len(names), int), np.zeros(clients, int)
    for key in np.argsort(-sizes, kind="stable"):
        client_of[key] = np.argmin(totals)
        totals[client_of[key]] += sizes[key]
    return _numbered([np.flatnonzero(client_of[owner] == i) for i in range(clients)])
