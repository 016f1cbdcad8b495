"""Which features of a data set are the input and the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import tensorflow as tf

from keras_lp.data.dataset import by_name
from keras_lp.utils.names import near

Kind = Literal[
    "class", "classes", "number", "vector", "array", "image", "text", "audio", "name", "other"
]


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature of a data set, whatever package it is from.

    Attributes:
        kind: `"class"` and `"classes"` are one class number and several; `"number"`, `"vector"`
            and `"array"` are numbers of 0, 1 and more dimensions; `"name"` is the name of the class
            that another feature has the number of.
        description: its type, for errors.
        names: class names, None if there are none or they are in another feature.
    """

    kind: Kind
    description: str
    names: list[str] | None = None

    @property
    def can_be_input(self) -> bool:
        """Whether it is likely to be the input."""
        return self.kind in ("image", "text", "audio", "vector", "array")


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


def numbers_of_rank(rank: int) -> Kind:
    """Returns the kind of numbers with this number of dimensions."""
    return ("number", "vector", "array")[min(rank, 2)]


def find_roles(
    name: str,
    features: Mapping[str, Feature],
    inputs: str | None,
    labels: str | Sequence[str] | None,
) -> tuple[str, list[Label]]:
    """Returns the input feature and the labels of a data set.

    Args:
        name: name of the data set, for errors.
        features: its features by name.
        inputs: the input feature; None finds the only image, text, audio or array.
        labels: the label features; None takes class labels and sequences of them.

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
        wanted = [key for key, feature in kinds.items() if feature.kind in ("class", "classes")]
    else:
        wanted = [labels] if isinstance(labels, str) else list(labels)
    found = [_label(name, key, kinds[key]) for key in wanted if key != inputs]
    if inputs is None:
        able = [key for key, feature in kinds.items() if feature.can_be_input]
        able = [key for key in able if key not in wanted]
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


def read_pair(inputs: str, roles: Sequence[Label]) -> Callable[[Mapping[str, Any]], Any]:
    """Returns a function from an example, a dict of features, to `(input, labels)`."""

    def pair(example: Mapping[str, Any]) -> tuple[Any, Any]:
        return example[inputs], by_name({one.key: one.read(example[one.feature]) for one in roles})

    return pair


def first_class_label(name: str, roles: Sequence[Label]) -> str:
    """Returns the feature that is the first label.

    Raises:
        ValueError: if it is not one class number.
    """
    if not roles[0].is_class:
        raise ValueError(
            "`examples_per_class` needs a first label that is one class. Received: "
            f"{roles[0].feature!r} of {name!r}. Pass `labels`."
        )
    return roles[0].feature


def _label(name: str, key: str, feature: Feature) -> Label:
    if feature.kind == "class":
        return Label(key, lambda value: tf.cast(value, tf.int64), feature.names, is_class=True)
    if feature.kind == "classes":
        count = len(feature.names or ())

        def one_per_class(numbers: Any) -> Any:
            rows = tf.one_hot(tf.cast(numbers, tf.int32), count, on_value=True, off_value=False)
            return tf.cast(tf.reduce_any(rows, 0), tf.int64)

        return Label(key, one_per_class, feature.names, is_class=False)
    if feature.kind in ("number", "vector"):
        return Label(key, lambda value: tf.cast(value, tf.float32), None, is_class=False)
    raise ValueError(
        "A label must be a class label, a sequence of them, a number or a vector of numbers. "
        f"Received: {key!r} of {name!r}, {feature.description}."
    )


def _listed(kinds: Mapping[str, Feature]) -> str:
    return "the features " + ", ".join(
        f"{key} ({feature.description})" for key, feature in kinds.items()
    )
