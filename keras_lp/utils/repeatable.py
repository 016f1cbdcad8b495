"""Data sets that give the same examples in every pass, known by a mark."""

from __future__ import annotations

import tensorflow as tf

_MARK = "_keras_lp_repeatable"


def mark_repeatable(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Marks a data set as one that gives the same examples in every pass, and returns it.

    Transformations of it (`map`, `batch`) are not marked: they may be random.
    """
    setattr(dataset, _MARK, True)
    return dataset


def is_repeatable(dataset: object) -> bool:
    """Whether a data set is marked."""
    return getattr(dataset, _MARK, False) is True
