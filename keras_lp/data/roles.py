"""Which features of a TFDS data set are the input and the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.utils.names import near


@dataclasses.dataclass(frozen=True)
class Label:
    """A feature that is a label.

    Attributes:
        feature: its name in the data set.
        read: function that returns the label of an example, from the value of the feature.
        names: the class names, None for numbers and for classes that another feature names.
        is_class: whether the label is one class number.
    """

    feature: str
    read: Callable[[Any], Any]
    names: list[str] | None
    is_class: bool

    @property
    def key(self) -> str:
        """The name of its task: an identifier."""
        return self.feature.replace("-", "_").replace("/", "_")


def find_roles(
    name: str, features: Any, inputs: str | None, labels: str | Sequence[str] | None
) -> tuple[str, list[Label]]:
    """Returns the input feature and the labels of a data set.

    Args:
        name: name of the data set, for errors.
        features: the features of TFDS.
        inputs: the input feature; None finds the only image, text, audio or array.
        labels: the label features; None takes class labels, sequences of them, and integers that
            another feature names.

    Raises:
        ValueError: if the roles cannot be found, or a feature is unknown or cannot be a label.
    """
    kinds = dict(sorted(features.items()))
    for argument, given in (("inputs", inputs), ("labels", labels)):
        for one in [given] if isinstance(given, str) else given or []:
            if one not in kinds:
                raise ValueError(
                    f"`{argument}` must be features of {name!r}: {_listed(kinds)}. Received: "
                    f"{argument}={one!r}.{near(one, kinds)}"
                )
    if labels is None:
        wanted = [key for key, kind in kinds.items() if _is_label(key, kind, kinds)]
    else:
        wanted = [labels] if isinstance(labels, str) else list(labels)
    found = [_label(name, key, kinds) for key in wanted if key != inputs]
    if inputs is None:
        named = {f"{key}_name" for key in wanted}
        able = [key for key, kind in kinds.items() if key not in {*wanted, *named}]
        able = [key for key in able if _is_input(kinds[key])]
        if len(able) != 1:
            raise ValueError(
                "load_dataset needs to know which feature is the input. Received: "
                f"{name!r} with {_listed(kinds)}. Pass `inputs`: one of {able or list(kinds)}."
            )
        (inputs,) = able
    if not found:
        raise ValueError(
            "load_dataset needs to know which features are labels. Received: "
            f"{name!r} with {_listed(kinds)}, of which none is a class label. Pass `labels`, such "
            "as the name of a number."
        )
    return inputs, found


def _is_label(key: str, kind: Any, kinds: dict[str, Any]) -> bool:
    import tensorflow_datasets as tfds

    if isinstance(kind, tfds.features.Sequence):
        kind = kind.feature
    return isinstance(kind, tfds.features.ClassLabel) or f"{key}_name" in kinds


def _is_input(kind: Any) -> bool:
    import tensorflow_datasets as tfds

    known = (tfds.features.Image, tfds.features.Text, tfds.features.Audio)
    return isinstance(kind, known) or len(getattr(kind, "shape", None) or ()) > 0


def _label(name: str, key: str, kinds: dict[str, Any]) -> Label:
    import tensorflow_datasets as tfds

    kind = kinds[key]
    inner = kind.feature if isinstance(kind, tfds.features.Sequence) else kind
    if isinstance(inner, tfds.features.ClassLabel):
        count = inner.num_classes
        names = [inner.int2str(i) for i in range(count)]
        if inner is kind:
            return Label(key, _as_int64, names, is_class=True)

        def one_per_class(numbers: Any) -> Any:
            rows = tf.one_hot(tf.cast(numbers, tf.int32), count, on_value=True, off_value=False)
            return tf.cast(tf.reduce_any(rows, 0), tf.int64)

        return Label(key, one_per_class, names, is_class=False)
    dtype = np.dtype(getattr(kind, "np_dtype", None) or object)
    shape = getattr(kind, "shape", None)
    if dtype.kind not in "iufb" or shape is None or len(shape) > 1:
        raise ValueError(
            "A label must be a class label, a sequence of them, a number or a vector of numbers. "
            f"Received: {key!r} of {name!r}, {kind}."
        )
    if f"{key}_name" in kinds:
        return Label(key, _as_int64, None, is_class=True)
    return Label(key, lambda value: tf.cast(value, tf.float32), None, is_class=False)


def _as_int64(value: Any) -> Any:
    return tf.cast(value, tf.int64)


def _listed(kinds: dict[str, Any]) -> str:
    return "the features " + ", ".join(
        f"{key} ({type(kind).__name__})" for key, kind in sorted(kinds.items())
    )
