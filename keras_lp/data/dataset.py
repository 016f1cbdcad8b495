"""What the loaders return: a `tf.data.Dataset` with class names and a known order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.utils.arguments import check_positive
from keras_lp.utils.repeatable import mark_repeatable

ClassNames = list[str] | dict[str, list[str]] | None
_CACHED = 256 * 2**20  # bytes; smaller data sets are kept in memory after the first pass


def finish(
    dataset: tf.data.Dataset,
    batch_size: int | None,
    class_names: ClassNames,
    size: int | None,
    split: str,
) -> Any:
    """Batches a data set of `(input, labels)`, caches a small one, and adds its attributes.

    Args:
        dataset: single examples with a known number of them.
        batch_size: number of examples per batch, None for single examples, -1 for arrays.
        class_names: the attribute `class_names`.
        size: bytes of all examples, None if unknown.
        split: the attribute `split`.
    """
    if batch_size == -1:
        whole = dataset.batch(max(1, int(dataset.cardinality()))).get_single_element()
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), whole)
    if batch_size is not None:
        check_positive("batch_size", batch_size, integer=True)
        dataset = dataset.batch(batch_size)
    if size is not None and size <= _CACHED:
        dataset = dataset.cache()
    if batch_size is not None:
        dataset = dataset.prefetch(tf.data.AUTOTUNE)
    dataset.class_names, dataset.split = class_names, split
    return mark_repeatable(dataset)


def resize(images: tf.data.Dataset, image_size: tuple[int, int]) -> tf.data.Dataset:
    """Resizes the images of `(image, labels)`, rounded to uint8."""

    return images.map(
        lambda image, labels: (resized(image, image_size), labels),
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def resized(image: Any, image_size: tuple[int, int]) -> Any:
    """Returns an image of another size, rounded to uint8.

    Antialiasing changes nothing in an image that grows, and takes time.
    """
    smaller = tf.reduce_any(tf.shape(image)[:2] > tf.constant(image_size))
    image = tf.cond(
        smaller,
        lambda: tf.image.resize(image, image_size, antialias=True),
        lambda: tf.image.resize(image, image_size),
    )
    image = tf.ensure_shape(image, (*image_size, image.shape[-1]))
    return tf.cast(image + 0.5, tf.uint8)  # weighted means of pixels stay below 256


def chosen_per_class(labels: np.ndarray, examples_per_class: int, seed: int) -> np.ndarray:
    """Returns the sorted numbers of n examples of each class, drawn at random.

    A larger n contains the examples of a smaller one. Missing labels (-1) are never chosen.

    Args:
        labels: class numbers, `(examples,)`.
        examples_per_class: n.
        seed: random seed.

    Raises:
        ValueError: if a class has fewer examples.
    """
    check_positive("examples_per_class", examples_per_class, integer=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for number in np.unique(labels[labels >= 0]):
        of_class = order[labels[order] == number]
        if len(of_class) < examples_per_class:
            raise ValueError(
                "`examples_per_class` must be at most the number of examples of each class. "
                f"Received: examples_per_class={examples_per_class}, and class {number} has "
                f"{len(of_class)}."
            )
        chosen.append(of_class[:examples_per_class])
    return np.sort(np.concatenate(chosen))


def take(dataset: tf.data.Dataset, rows: Sequence[int] | np.ndarray) -> tf.data.Dataset:
    """Returns the examples with these sorted numbers."""
    count = int(dataset.cardinality())
    wanted = np.zeros(count, bool)
    wanted[np.asarray(rows)] = True
    mask = tf.constant(wanted)
    kept = dataset.enumerate().filter(lambda i, _: mask[i]).map(lambda _, example: example)
    return kept.apply(tf.data.experimental.assert_cardinality(len(rows)))


def class_names_of(names: dict[str, list[str]], tasks: int) -> ClassNames:
    """Returns the attribute `class_names`: a list for one task, a dict for several, or None."""
    return next(iter(names.values())) if names and tasks == 1 else names or None


def by_name(labels: Mapping[str, Any]) -> Any:
    """Returns the labels of several tasks as a dict, those of one task alone."""
    return dict(labels) if len(labels) > 1 else next(iter(labels.values()))
