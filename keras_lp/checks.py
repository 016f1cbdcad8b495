"""Checks of what users pass, before any training starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.tasks import Task


def near(name: str, options: Iterable[str]) -> str:
    """Returns " Did you mean ...?" with the options most like `name`, else ""."""
    options = list(options)
    lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(lower[match]) for match in close)}?"


def check_choice(argument: str, value: Any, options: Iterable[Any]) -> None:
    """Raises `ValueError` unless `value` is one of the options."""
    options = list(options)
    if value not in options:
        names = [option for option in options if isinstance(option, str)]
        hint = near(value, names) if isinstance(value, str) else ""
        raise ValueError(
            f"`{argument}` must be one of {options}. Received: {argument}={value!r}.{hint}"
        )


def check_positive(argument: str, value: Any, integer: bool = False) -> None:
    """Raises `ValueError` unless `value` is a number (or an integer) above 0."""
    kinds = (int, np.integer) if integer else (int, float, np.number)
    if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
        rule = "an integer of 1 or more" if integer else "a number above 0"
        raise ValueError(f"`{argument}` must be {rule}. Received: {argument}={value!r}.")


def check_trainable_unchanged(model: keras.Model) -> None:
    """Raises if a `trainable` flag changed since `compile`.

    Keras goes on with the flags it was compiled with and says nothing.
    """
    compiled = getattr(model, "_compiled_trainable_state", {})
    changed = [layer.name for layer, flag in compiled.items() if layer.trainable != flag]
    if changed:
        raise ValueError(
            "The `trainable` flags of a model must be as they were at its last `compile`: Keras "
            "would go on with the old ones. Received: a model whose layers "
            f"{changed[:5]}{' and more' if len(changed) > 5 else ''} have changed since (perhaps "
            "by building another model on the same backbone: layers are shared). Call "
            "`lp.finetune_model(model, trainable=...)`, or `model.compile(...)` again."
        )


def check_examples(tasks: Mapping[str, Task], x: Any, y: Any, where: str = "") -> None:
    """Raises if inputs are not finite or labels are not of their task.

    Args:
        tasks: the tasks of the model by name.
        x: inputs, an array or a structure of arrays.
        y: labels: an array, or a dict by task.
        where: what the errors add to the argument's name, such as `" of client 'a'"`.
    """
    for array in _arrays(x):
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ValueError(
                "Inputs must be finite numbers. Received: x"
                f"{where} with {np.size(array) - np.isfinite(array).sum()} NaN or infinite "
                f"values of {np.size(array)}. Drop or fill these examples."
            )
    if y is None or not tasks:
        return
    if isinstance(y, Mapping):
        check_label_names(tasks, y, where)
    else:
        y = dict.fromkeys(tasks, y)
    for name, labels in y.items():
        for array in _arrays(labels):
            tasks[name].check_labels(
                array, f"y{where}" if len(tasks) == 1 else f"y[{name!r}]{where}"
            )


def check_label_names(tasks: Mapping[str, Task], y: Any, where: str = "") -> None:
    """Raises `ValueError` unless labels are a dict by names of tasks."""
    if not isinstance(y, Mapping):
        raise ValueError(
            f"Labels of a model with the tasks {list(tasks)} are a dict by task. Received: "
            f"y{where} of type {type(y).__name__}. Pass y={{{next(iter(tasks))!r}: ..., ...}}."
        )
    unknown = [name for name in y if name not in tasks]
    if unknown:
        raise ValueError(
            f"Labels must be named after the tasks {list(tasks)}. Received: y{where} with "
            f"{unknown}.{near(str(unknown[0]), tasks)}"
        )


def checked_dataset(tasks: Mapping[str, Task], dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the same data set; every batch passes `check_examples` before it is used."""

    if not isinstance(dataset.element_spec, tuple) or len(dataset.element_spec) < 2:
        raise ValueError(
            "A data set to train on must yield pairs (x, y). Received: a data set of "
            f"{dataset.element_spec}."
        )
    if isinstance(dataset.element_spec[1], Mapping):
        check_label_names(tasks, dataset.element_spec[1])

    def check(x: Any, y: Any, *rest: Any) -> Any:
        def look(*flat: Any) -> np.bool_:
            xs, ys = tf.nest.pack_sequence_as((x, y), [tensor.numpy() for tensor in flat])
            check_examples(tasks, xs, ys)
            return np.bool_(True)

        seen = tf.py_function(look, tf.nest.flatten((x, y)), tf.bool)
        with tf.control_dependencies([seen]):
            return tf.nest.map_structure(tf.identity, (x, y, *rest))

    return dataset.map(check, num_parallel_calls=1).prefetch(tf.data.AUTOTUNE)


def _arrays(structure: Any) -> list[np.ndarray]:
    return [
        np.asarray(leaf)
        for leaf in tf.nest.flatten(structure)
        if leaf is not None and not isinstance(leaf, (str, bytes))
    ]
