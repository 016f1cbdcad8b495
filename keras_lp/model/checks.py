"""Checks of the user's data before training starts."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones.pixels import warn_of_scaled_images
from keras_lp.tasks.heads import tasks
from keras_lp.tasks.missing import name_numbers
from keras_lp.tasks.task import Task
from keras_lp.utils.keras_internals import flags_at_compile
from keras_lp.utils.names import near
from keras_lp.utils.repeatable import is_repeatable, mark_repeatable


def check_trainable_unchanged(model: keras.Model) -> None:
    """Raises an error if a `trainable` flag changed since `compile`.

    Keras would use the flags from `compile` without a warning.
    """
    compiled = flags_at_compile(model)
    changed = [layer.name for layer, flag in compiled.items() if layer.trainable != flag]
    if changed:
        raise ValueError(
            "The `trainable` flags of a model must not change after its last `compile`: Keras "
            "would still use the old ones. Received: a model whose layers "
            f"{changed[:5]}{' and more' if len(changed) > 5 else ''} have changed since (perhaps "
            "by fine-tuning another model on the same backbone: layers are shared). Call "
            "`lp.finetune_model(model, trainable=...)`, or `model.compile(...)` again."
        )


def check_examples(model: keras.Model, x: Any, y: Any, where: str = "") -> None:
    """Raises an error if inputs are not finite or labels do not fit their task.

    Args:
        model: the model.
        x: inputs, an array or a structure of arrays.
        y: labels: an array, or a dict by task.
        where: text that errors append to the argument's name, such as `" of client 'a'"`.
    """
    check_finite(x, where)
    known = tasks(model)
    if y is None or not known:
        return
    if isinstance(y, Mapping):
        check_label_names(known, y, where)
    else:
        y = dict.fromkeys(known, y)
    outputs = model.output if isinstance(model.output, Mapping) else {}
    for name, labels in y.items():
        steps = len(outputs.get(name, model.outputs[0]).shape) - 2
        for array in _arrays(labels):
            title = f"y{where}" if len(known) == 1 else f"y[{name!r}]{where}"
            known[name].check_labels(array, title, steps)


def check_finite(x: Any, where: str = "") -> None:
    """Raises an error if numbers in a structure of inputs are not finite."""
    for array in _arrays(x):
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ValueError(
                "Inputs must be finite numbers. Received: x"
                f"{where} with {np.size(array) - np.isfinite(array).sum()} NaN or infinite "
                f"values of {np.size(array)}. Drop or fill these examples."
            )


def check_weights(weights: Any, where: str = "") -> None:
    """Raises `ValueError` unless sample weights are finite numbers of 0 or more.

    Args:
        weights: an array, a dict of arrays, or None.
        where: text that the error appends to the argument's name, such as `" of client 'a'"`.
    """
    for array in _arrays(weights):
        if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
            wrong = np.ones(array.shape, bool)
        else:
            wrong = ~(np.isfinite(array) & (array >= 0))
        if wrong.any():
            raise ValueError(
                "Sample weights must be finite numbers of 0 or more. Received: sample_weight"
                f"{where} with the value {array[wrong].flat[0]} ({wrong.sum()} of {array.size} "
                "values are not)."
            )


def check_label_names(
    tasks: Mapping[str, Any], y: Any, where: str = "", argument: str = "y"
) -> None:
    """Raises `ValueError` unless labels (or another argument) are a dict by task name."""
    if not isinstance(y, Mapping):
        raise ValueError(
            f"Labels of a model with the tasks {list(tasks)} must be a dict by task. Received: "
            f"y{where} of type {type(y).__name__}. Pass y={{{next(iter(tasks))!r}: ..., ...}}."
        )
    unknown = [name for name in y if name not in tasks]
    if unknown:
        raise ValueError(
            f"Labels and weights must be named after the tasks {list(tasks)}. Received: "
            f"{argument}{where} with {unknown}.{near(str(unknown[0]), tasks)}"
        )


_found: contextvars.ContextVar[list[Exception] | None] = contextvars.ContextVar("found")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raises errors of `checked_dataset` directly, without TensorFlow's error around them."""
    errors: list[Exception] = []
    token = _found.set(errors)
    try:
        yield
    except tf.errors.OpError as error:
        if errors:
            raise errors[0] from None
        raise error
    finally:
        _found.reset(token)


def check_batched(model: keras.Model, dataset: Any) -> None:
    """Raises `ValueError` for a `tf.data.Dataset` of single examples of a model's inputs."""
    spec = getattr(dataset, "element_spec", None)
    if spec is None or not getattr(model, "inputs", None):
        return
    flat = tf.nest.flatten(spec[0] if isinstance(spec, tuple) else spec)
    pairs = list(zip(flat, model.inputs, strict=False))
    single = [
        one.shape.rank is not None and one.shape.rank == len(tensor.shape) - 1
        for one, tensor in pairs
        if isinstance(one, tf.TensorSpec)
    ]
    if len(flat) == len(model.inputs) and single and all(single):
        raise ValueError(
            "A data set must give batches. Received: single examples, of shape "
            f"{tuple(flat[0].shape)}. Batch it: `dataset.batch(32)`."
        )


def checked_dataset(model: keras.Model, dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the data set with `check_examples` applied to every batch before its use."""
    check_batched(model, dataset)
    found = _found.get(None)
    if not isinstance(dataset.element_spec, tuple) or len(dataset.element_spec) < 2:
        raise ValueError(
            "A data set to train on must yield pairs (x, y). Received: a data set of "
            f"{dataset.element_spec}."
        )
    for argument, spec in zip(("y", "sample_weight"), dataset.element_spec[1:], strict=False):
        if isinstance(spec, Mapping) and tasks(model):
            check_label_names(tasks(model), spec, argument=argument)

    def check(x: Any, y: Any, *rest: Any) -> Any:
        def look(*flat: Any) -> np.bool_:
            arrays = [tensor.numpy() for tensor in flat]
            xs, ys, weights = tf.nest.pack_sequence_as((x, y, rest), arrays)
            try:
                check_examples(model, xs, ys)
                check_weights(weights)
                warn_of_scaled_images(model, xs)
            except (TypeError, ValueError) as error:
                if found is not None:
                    found.append(error)
                raise
            return np.bool_(True)

        seen = tf.py_function(look, tf.nest.flatten((x, y, rest)), tf.bool)
        with tf.control_dependencies([seen]):
            x, y, *others = tf.nest.map_structure(tf.identity, (x, y, *rest))
        return x, label_numbers(tasks(model), y), *others

    read = dataset.map(check, num_parallel_calls=1).prefetch(tf.data.AUTOTUNE)
    return mark_repeatable(read) if is_repeatable(dataset) else read


def label_numbers(known: Mapping[str, Task], y: Any) -> Any:
    """Returns tensors of labels in which names are replaced by class numbers."""
    if isinstance(y, Mapping):
        return {name: name_numbers(known[name], labels) for name, labels in y.items()}
    return name_numbers(next(iter(known.values())), y) if known else y


def _arrays(structure: Any) -> list[np.ndarray]:
    return [
        np.asarray(leaf)
        for leaf in tf.nest.flatten(structure)
        if leaf is not None and not isinstance(leaf, (str, bytes))
    ]
