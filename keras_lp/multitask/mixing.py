"""Combines several data sets, one or more per task, into one stream for a multitask model.

Temperature sampling: Arivazhagan et al., 2019 (arXiv:1907.05019); with a cap on the size of a data
set: Raffel et al., 2020, section 3.5.2 (arXiv:1910.10683).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.tasks.classification import as_task
from keras_lp.tasks.missing import name_numbers
from keras_lp.tasks.task import Task, TaskLike
from keras_lp.utils.arguments import check_positive
from keras_lp.utils.interop import plain
from keras_lp.utils.names import near


def mix(
    datasets: Mapping[str, Any],
    *,
    batch_size: int = 32,
    temperature: float = 1.0,
    cap: int | None = None,
    seed: int = 0,
    tasks: Mapping[str, TaskLike] | None = None,
) -> tf.data.Dataset:
    """Mixes data sets that each have labels of some tasks into one batched stream for `fit`.

    Every batch has a label tensor for every task. If the data set of an example lacks a task, the
    label is missing: -1 for integers, NaN for floats, which `lp.multitask_model` ignores in the
    loss and the metrics.

    **An epoch** has N examples, where N is the sum of `min(n_i, cap)` over the data sets of `n_i`
    examples. Exactly `k_i` of them come from data set i, in proportion to
    `min(n_i, cap) ** (1 / temperature)`, rounded so that the sum is N (largest remainders). With
    the defaults, every example occurs once per epoch. A data set with more than `k_i` examples
    contributes a new random subset in each epoch. One with fewer is repeated, in a new order each
    time, and every example occurs before any is repeated. The data sets alternate at random.

    Shuffling is complete: the examples of every data set are held in memory, so map file names to
    images after mixing. The order is new in each epoch.

    Args:
        datasets: dict by task of unbatched `tf.data.Dataset`s of `(x, y)`, of Grain loaders of
            such examples, or of pairs of arrays or pandas columns.
            `y` is the label of that task; or a dict of labels by task, in which case the key is
            only a name of the data set. All `x` have the same structure and dtype, and shapes that
            fit in one batch. Labels have a known shape, `()` for class numbers or names,
            `(classes,)` for one-hot and soft labels.
        batch_size: batch size; the last batch may be smaller. Defaults to 32.
        temperature: a number above 0. 1 keeps the proportions of the data sets, larger values make
            the shares more equal, and `float("inf")` makes them equal. Defaults to 1.
        cap: largest size with which a data set counts. Defaults to None, no cap.
        seed: the same seed gives the same sequence of epochs. Defaults to 0.
        tasks: dict of tasks by name, as in `lp.multitask_model`. Needed if the dtype does not
            determine the missing label: an `lp.Regression` gets float32 with NaN, also for integer
            labels; floats of an `lp.MultiLabel` get -1; class names of an `lp.Classification`
            become class numbers. Defaults to None.

    Returns:
        A `tf.data.Dataset` of `(x, labels)` with `ceil(N / batch_size)` batches, where `labels` is
        a dict by task of `(batch, ...)` tensors. Integer and bool labels are at least int32.

    Raises:
        ValueError: if there is no data set; a data set is batched, infinite, of unknown size,
            empty, or without a share in the epoch; inputs differ in structure, dtype or shape;
            labels of one task differ in kind or shape; no data set has a task of `tasks`; or an
            argument is out of range.
        TypeError: if `datasets` has other values than data sets, or labels are not numbers.

    Example:

    >>> import numpy as np, keras_lp as lp
    >>> faces, ages = np.zeros((6, 8)), np.array([31, 52, 44, 23, 18, 60])
    >>> moods, mood = np.ones((2, 8)), np.array([0, 1])
    >>> train = lp.mix(
    ...     {"age": (faces, ages), "mood": (moods, mood)},
    ...     batch_size=4,
    ...     temperature=float("inf"),
    ...     tasks={"age": lp.Regression(), "mood": 2},
    ... )
    >>> labels = [labels for _, labels in train]
    >>> [len(batch["age"]) for batch in labels]
    [4, 4]
    >>> int(sum(np.isfinite(batch["age"]).sum() for batch in labels))
    4
    >>> int(sum((batch["mood"] >= 0).numpy().sum() for batch in labels))
    4

    Reference: Raffel et al., 2020, section 3.5.2 (arXiv:1910.10683); Arivazhagan et al., 2019
    (arXiv:1907.05019).
    """
    check_positive("batch_size", batch_size, integer=True)
    check_positive("temperature", temperature)
    if cap is not None:
        check_positive("cap", cap, integer=True)
    sources = {
        name: _with_numbers(name, dataset, tasks or {})
        for name, dataset in _sources(datasets).items()
    }
    _check_inputs(sources)
    sizes = {name: _size(name, dataset) for name, dataset in sources.items()}
    counts = epoch_counts(sizes, temperature, cap)
    labels = _labels(sources, tasks or {})
    choice_seed, *seeds = np.random.SeedSequence(seed).generate_state(len(sources) + 1).tolist()
    streams = [
        _complete(
            _shuffle(dataset, sizes[name], stream_seed)
            .repeat(-(-counts[name] // sizes[name]))
            .take(counts[name]),
            name,
            labels,
        )
        for (name, dataset), stream_seed in zip(sources.items(), seeds, strict=True)
    ]
    turns = np.repeat(np.arange(len(streams)), list(counts.values()))
    choice = _shuffle(tf.data.Dataset.from_tensor_slices(turns), len(turns), choice_seed)
    return (
        tf.data.Dataset.choose_from_datasets(streams, choice)
        .apply(tf.data.experimental.assert_cardinality(len(turns)))
        .batch(batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )


def epoch_counts(sizes: Mapping[str, int], temperature: float, cap: int | None) -> dict[str, int]:
    """Returns the number of examples of each data set in an epoch.

    Args:
        sizes: number of examples by data set.
        temperature: a number above 0.
        cap: largest size with which a data set counts, or None.

    Raises:
        ValueError: if a data set has no share.
    """
    capped = np.minimum(list(sizes.values()), np.inf if cap is None else cap)
    total = int(capped.sum())
    weights = (capped / capped.max()) ** (1 / temperature)
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[largest] += 1
    shares = dict(zip(sizes, counts.tolist(), strict=True))
    if not all(shares.values()):
        raise ValueError(
            "Every data set must have a share in an epoch. Received: "
            f"temperature={temperature}, cap={cap} for {dict(sizes)} examples, which gives "
            f"{shares}. Raise `temperature`, or set a lower `cap`."
        )
    return shares


@dataclasses.dataclass(frozen=True)
class _Label:
    """Properties of the labels of one task in the stream."""

    dtype: tf.DType
    shape: tf.TensorShape
    missing: float


def _complete(dataset: tf.data.Dataset, name: str, labels: Mapping[str, _Label]) -> tf.data.Dataset:
    """Adds labels of all tasks to every example."""
    missing = {
        task: tf.cast(tf.fill(label.shape, label.missing), label.dtype)
        for task, label in labels.items()
    }

    def complete(x: Any, y: Any) -> Any:
        known = {task: tf.cast(one, labels[task].dtype) for task, one in _by_task(name, y).items()}
        return x, {**missing, **known}

    # Without casts this computes nothing; running it eagerly then costs nothing.
    return dataset.map(complete, synchronous=True)


def _by_task(name: str, y: Any) -> Mapping[str, Any]:
    return y if isinstance(y, Mapping) else {name: y}


def _shuffle(dataset: tf.data.Dataset, size: int, seed: int) -> tf.data.Dataset:
    """Shuffles a whole data set, in a new order in each pass."""

    # The seed of `tf.random.set_seed` affects every shuffle. Inside a function it is the function's
    # own seed, so that a program's seed for its weights does not change the order of its data.
    def shuffled() -> tf.data.Dataset:
        tf.random.set_seed(0)
        return dataset.shuffle(size, seed=seed)

    return tf.function(shuffled, autograph=False).get_concrete_function()()


def _sources(datasets: Any) -> dict[str, tf.data.Dataset]:
    """Returns the data sets as data sets of pairs."""
    if not isinstance(datasets, Mapping) or not all(isinstance(name, str) for name in datasets):
        raise TypeError(
            "`datasets` must be a dict of data sets by task. Received: "
            f"datasets={datasets!r}. Pass for example {{'sentiment': dataset, 'topic': other}}."
        )
    if not datasets:
        raise ValueError("`datasets` must have at least one data set. Received: datasets={}.")
    return {name: _as_dataset(name, data) for name, data in datasets.items()}


def _with_numbers(
    name: str, dataset: tf.data.Dataset, tasks: Mapping[str, TaskLike]
) -> tf.data.Dataset:
    """Returns a data set with class numbers instead of names, for the given tasks."""
    spec = dataset.element_spec[1]
    named = {
        task: as_task(tasks[task])
        for task, one in _by_task(name, spec).items()
        if task in tasks and isinstance(one, tf.TensorSpec) and one.dtype == tf.string
    }
    if not named:
        return dataset

    def number(x: Any, y: Any) -> Any:
        known = {
            task: name_numbers(named[task], one) if task in named else one
            for task, one in _by_task(name, y).items()
        }
        return x, known if isinstance(y, Mapping) else known[name]

    return dataset.map(number)


def _as_dataset(name: str, data: Any) -> tf.data.Dataset:
    data = plain(data, batched=False)
    if isinstance(data, Sequence) and len(data) == 2:
        try:
            return tf.data.Dataset.from_tensor_slices(tuple(data))
        except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
            raise ValueError(
                "A pair (x, y) must be of arrays with as many labels as inputs. Received: "
                f"datasets[{name!r}], for which TensorFlow says: {error}"
            ) from error
    if not isinstance(data, tf.data.Dataset):
        raise TypeError(
            "A data set must be an unbatched tf.data.Dataset of pairs (x, y), or a pair of "
            f"arrays. Received: datasets[{name!r}] of type {type(data).__name__}."
        )
    spec = data.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2:
        raise ValueError(
            f"A data set must yield pairs (x, y). Received: datasets[{name!r}] that yields "
            f"{spec}. Map it to pairs: `dataset.map(lambda example: (..., ...))`."
        )
    return data


def _check_inputs(sources: Mapping[str, tf.data.Dataset]) -> None:
    """Raises an error unless all inputs fit in one batch."""
    (first, dataset), *others = sources.items()
    expected = dataset.element_spec[0]
    for name, other in others:
        spec = other.element_spec[0]
        try:
            tf.nest.assert_same_structure(expected, spec)
        except (ValueError, TypeError):
            fits = False
        else:
            pairs = zip(tf.nest.flatten(expected), tf.nest.flatten(spec), strict=True)
            fits = all(one.is_compatible_with(another) for one, another in pairs)
        if not fits:
            raise ValueError(
                "Inputs of all data sets must have the same structure and dtypes, and shapes "
                f"that fit in one batch. Received: datasets[{first!r}] with x of {expected} "
                f"and datasets[{name!r}] with x of {spec}. Map them to one form first."
            )


def _size(name: str, dataset: tf.data.Dataset) -> int:
    size = int(dataset.cardinality())
    if size == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            f"A data set must be finite. Received: datasets[{name!r}], which repeats forever. "
            "Remove `repeat()`: `temperature` and `cap` control how often a data set is seen."
        )
    if size == tf.data.UNKNOWN_CARDINALITY:
        raise ValueError(
            "A data set must have a known number of examples. Received: "
            f"datasets[{name!r}], whose cardinality is unknown (after `filter`, `flat_map` or "
            "`from_generator`). Set it with "
            "`dataset.apply(tf.data.experimental.assert_cardinality(n))`."
        )
    if size == 0:
        raise ValueError(
            f"A data set must have at least one example. Received: datasets[{name!r}] without any."
        )
    return size


def _labels(
    sources: Mapping[str, tf.data.Dataset], tasks: Mapping[str, TaskLike]
) -> dict[str, _Label]:
    """Returns the properties of the labels of each task in the stream."""
    specs: dict[str, dict[str, tf.TensorSpec]] = {}  # by task, then by data set
    for name, dataset in sources.items():
        for task, spec in _by_task(name, dataset.element_spec[1]).items():
            _check_label(name, task, spec)
            specs.setdefault(task, {})[name] = spec
    for task in tasks:
        if task not in specs:
            raise ValueError(
                f"`tasks` must name tasks that a data set has, {list(specs)}. Received: "
                f"{task!r}.{near(str(task), specs)}"
            )
    return {
        task: _label(task, found, as_task(tasks[task]) if task in tasks else None)
        for task, found in specs.items()
    }


def _check_label(name: str, task: Any, spec: Any) -> None:
    where = f"datasets[{name!r}] with labels of {task!r} of {spec}"
    if not isinstance(spec, tf.TensorSpec):
        raise TypeError(
            f"Labels must be one tensor, or a dict of tensors by task. Received: {where}."
        )
    if not (spec.dtype.is_integer or spec.dtype.is_floating or spec.dtype.is_bool):
        raise TypeError(
            f"Labels must be numbers. Received: {where}. For class names pass `tasks`: "
            f"{{{task!r}: lp.Classification(names)}}."
        )
    if not spec.shape.is_fully_defined():
        raise ValueError(
            "Labels must have a known shape, so that they can be missing. Received: "
            f"{where}. A batched data set must be unbatched: `dataset.unbatch()`. Else map the "
            "labels with `tf.ensure_shape`."
        )


def _label(task: str, specs: Mapping[str, tf.TensorSpec], given: Task | None) -> _Label:
    kinds = {(spec.shape, spec.dtype.is_floating) for spec in specs.values()}
    if len(kinds) > 1:
        raise ValueError(
            "Labels of one task must have the same shape and be all integers or all floats. "
            f"Received: labels of {task!r} of {dict(specs)}. Map them to one form first."
        )
    ((shape, floating),) = kinds
    dtypes = [spec.dtype.as_numpy_dtype for spec in specs.values()]
    # Integers with less than 32 bits or without a sign cannot always be -1.
    dtype = tf.as_dtype(np.result_type(*dtypes, *([] if floating else [np.int32])))
    if given is None:
        return _Label(dtype, shape, float("nan") if floating else -1)
    return _Label(tf.float32 if np.isnan(given.missing) else dtype, shape, given.missing)
