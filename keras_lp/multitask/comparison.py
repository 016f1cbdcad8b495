"""Compares a multitask model with single-task models of the same budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones.copying import finalize_normalization
from keras_lp.finetuning.layerwise import with_multipliers
from keras_lp.model.assemble import compile_tasks
from keras_lp.model.data import with_numbers
from keras_lp.model.model import Model
from keras_lp.tasks.heads import backbone_of, tasks
from keras_lp.tasks.missing import is_present
from keras_lp.utils.arguments import Verbose, check_positive
from keras_lp.utils.keras_internals import metric_direction
from keras_lp.utils.progress import Progress
from keras_lp.utils.text_table import ShownAsText, text_table


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(ShownAsText):
    """Results of `lp.compare_single_tasks`; printed as a table.

    Attributes:
        metrics: name of the metric of each task, such as `"accuracy"`.
        single: by task, this metric of the single-task model for each seed, `(seeds,)`.
        multitask: by task, this metric of the multitask model for each seed, `(seeds,)`.
        gains: by task, the relative improvement of the multitask model over the single-task
            model in percent for each seed, `(seeds,)`; below 0 it is worse.

    Example:

    >>> import numpy as np, keras_lp as lp
    >>> single, multitask = {"topic": np.array([0.8, 0.8])}, {"topic": np.array([0.8, 0.88])}
    >>> gains = {"topic": np.array([0, 10])}
    >>> found = lp.Comparison({"topic": "accuracy"}, single, multitask, gains)
    >>> found.delta_m.tolist()
    [0.0, 10.0]

    Reference: Maninis et al., 2019 (arXiv:1904.08918), who call the mean gain delta-m.
    """

    metrics: dict[str, str]
    single: dict[str, np.ndarray]
    multitask: dict[str, np.ndarray]
    gains: dict[str, np.ndarray]

    @property
    def delta_m(self) -> np.ndarray:
        """The mean gain over the tasks in percent for each seed, `(seeds,)`."""
        return np.mean(list(self.gains.values()), axis=0)

    def __str__(self) -> str:
        rows = [["task", "metric", "single-task", "multitask", "gain, %"]]
        for task, metric in self.metrics.items():
            values = [_spread(of[task], ".4f") for of in (self.single, self.multitask)]
            rows.append([task, metric, *values, _spread(self.gains[task], "+.2f")])
        rows.append(["all (delta-m)", "", "", "", _spread(self.delta_m, "+.2f")])
        seeds = len(self.delta_m)
        return f"{text_table(rows, left=2)}\nmean ± standard deviation over {seeds} seeds"


def compare_single_tasks(
    model: Model,
    data: Any,
    *,
    validation_data: Any,
    epochs: int,
    seeds: int = 3,
    batch_size: int = 32,
    verbose: Verbose = "auto",
) -> Comparison:
    """Trains a multitask model and a single-task model per task, and prints the gains.

    All models are new: the layers below the heads start from the current weights of `model`, the
    heads are initialised for each seed, and `model` itself does not change. A single-task model is
    the same model with one head. It gets only the examples that have a label of its task, repeated
    if there are few, for as many steps of the same batch size as the multitask model. The metric
    is the first of each task (`accuracy`, `f1` or `mae`), on `validation_data` after the last step.

    The gain is 100 (multitask - single) / single, with the opposite sign for metrics where less is
    better. Its mean over the tasks is the delta-m of Maninis et al.

    Args:
        model: a compiled model from `lp.multitask_model` with two or more tasks, not yet trained
            on these tasks.
        data: `(x, labels)` or `(x, labels, sample_weight)`, arrays and a dict of arrays by task;
            or a batched `tf.data.Dataset` of such tuples with a known number of batches.
        validation_data: data in the same form, to compare on.
        epochs: number of epochs of the multitask model.
        seeds: number of repetitions, with the seeds 0, 1, ... Defaults to 3.
        batch_size: batch size for arrays. Defaults to 32.
        verbose: 0 is silent; otherwise the table is printed. `"auto"` shows a progress bar in a
            terminal or notebook. 1 also prints a line per trained model elsewhere; 2 prints these
            lines. Defaults to `"auto"`.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: if the model has fewer than two tasks, the number of batches is unknown, or a
            task has no labels.
        TypeError: if keras_lp did not build the model.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu")])
    >>> model = lp.multitask_model(backbone, {"sign": 2, "sum": lp.Regression()}, pretrained=False)
    >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    >>> data = x, {"sign": (x[:, 0] > 0).astype(int), "sum": x.sum(1)}
    >>> found = lp.compare_single_tasks(
    ...     model, data, validation_data=data, epochs=1, seeds=1, verbose=0
    ... )
    >>> found.metrics
    {'sign': 'accuracy', 'sum': 'mae'}

    References: Maninis et al., 2019 (arXiv:1904.08918); Kurin et al., 2022 (arXiv:2201.04122),
    on equal budgets.
    """
    _check(model, epochs, seeds, batch_size)
    known = tasks(model)
    first = {name: task.make_metrics()[0] for name, task in known.items()}
    data, validation_data = (with_numbers(model, part) for part in (data, validation_data))
    train, val = _Examples(data, batch_size, "data"), _Examples(validation_data, batch_size)
    for name, task in known.items():
        train.check(name, task)
        val.check(name, task)
    found: dict[str, list[list[float]]] = {name: [] for name in known}
    with Progress("Models trained", seeds * (1 + len(known)), verbose) as progress:
        for seed in range(seeds):
            keras.utils.set_random_seed(seed)
            multi = _again(model)
            multi.fit(**train.all(), epochs=epochs, verbose=0)
            logs = multi.evaluate(**val.all(), verbose=0, return_dict=True)
            progress.step()
            for name, task in known.items():
                keras.utils.set_random_seed(seed)
                twin, metric = _twin(model, name), first[name].name
                twin.fit(**train.of(name, task), epochs=epochs, verbose=0)
                alone = twin.evaluate(**val.alone(name), verbose=0, return_dict=True)[metric]
                found[name].append([alone, logs[f"{name}_{metric}"]])
                progress.step()
    single, multitask = (
        {name: np.array(pairs)[:, i] for name, pairs in found.items()} for i in (0, 1)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = {
            name: 100 * sign_of(first[name]) * (multitask[name] - single[name]) / single[name]
            for name in known
        }
    metrics = {name: metric.name for name, metric in first.items()}
    result = Comparison(metrics, single, multitask, gains)
    if verbose:
        print(result)
    return result


class _Examples:
    """Data with the labels of all tasks, or of one task."""

    def __init__(self, data: Any, batch_size: int, argument: str = "validation_data") -> None:
        self._data, self._size, self._argument = data, batch_size, argument
        self._is_dataset = isinstance(data, tf.data.Dataset)
        if not self._is_dataset and (
            not isinstance(data, (tuple, list)) or len(data) not in (2, 3)
        ):
            raise ValueError(
                f"`{argument}` must be (x, labels), (x, labels, sample_weight) or a batched "
                f"tf.data.Dataset of them. Received: {argument} of type {type(data).__name__}."
            )

    def check(self, name: str, task: Any) -> None:
        """Raises `ValueError` unless the data are finite and have a label of a task."""
        if self._is_dataset and self._data.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise _no_number(int(self._data.cardinality()))
        if not any(_has_label(task, y[name]).any() for y in self._labels() if name in y):
            raise ValueError(
                f"Each task needs labels in `{self._argument}`. Received: none of the task "
                f"{name!r}."
            )

    def all(self) -> dict[str, Any]:
        """Returns arguments of `fit` or `evaluate`."""
        if self._is_dataset:
            return {"x": self._data}
        x, y, *weight = self._data
        weights = {"sample_weight": weight[0]} if weight else {}
        return {"x": x, "y": y, "batch_size": self._size, **weights}

    def alone(self, name: str) -> dict[str, Any]:
        """Returns arguments of `evaluate` with the labels of one task."""
        if self._is_dataset:
            return {"x": self._data.map(lambda *batch: _labels_of(name, *batch))}
        x, y, *weight = _labels_of(name, *self._data)
        weights = {"sample_weight": weight[0]} if weight else {}
        return {"x": x, "y": y, "batch_size": self._size, **weights}

    def of(self, name: str, task: Any) -> dict[str, Any]:
        """Returns arguments of a `fit` on one task with as many steps as on all data."""
        if not self._is_dataset:
            x, *rest = _labels_of(name, *self._data)
            rows = np.resize(np.flatnonzero(_has_label(task, rest[0])), len(rest[0]))
            x = keras.tree.map_structure(lambda leaf: np.asarray(leaf)[rows], x)
            rest = [np.asarray(part)[rows] for part in rest]
            arguments = dict(zip(("y", "sample_weight"), rest, strict=False))
            return {"x": x, **arguments, "batch_size": self._size}

        def labelled(x: Any, y: Any, *_: Any) -> Any:
            return tf.reduce_any(is_present(task, y))

        steps = int(self._data.cardinality())
        if steps < 1:
            raise _no_number(steps)
        batches = self._data.map(lambda *batch: _labels_of(name, *batch))
        size = next(iter(batches.take(1)))[1].shape[0]
        examples = batches.unbatch().filter(labelled).repeat().shuffle(8 * size)
        return {"x": examples.batch(size).take(steps)}

    def _labels(self) -> Iterator[Mapping[str, Any]]:
        if self._is_dataset:
            yield from (batch[1] for batch in self._data)
        else:
            yield self._data[1]


def _no_number(steps: int) -> ValueError:
    return ValueError(
        "A comparison with equal steps needs a data set with a known number of batches, above 0. "
        f"Received: a cardinality of {steps}. Set it with "
        "dataset.apply(tf.data.experimental.assert_cardinality(n))."
    )


def _labels_of(name: str, x: Any, y: Any, *weight: Any) -> tuple[Any, ...]:
    """Returns an example or a batch with labels and weights of one task."""
    own = [part.get(name) if isinstance(part, Mapping) else part for part in weight]
    return (x, y[name], *(part for part in own if part is not None))


def _has_label(task: Any, y: Any) -> np.ndarray:
    y = np.asarray(y)
    present: np.ndarray = np.asarray(is_present(task, y)).reshape(len(y), -1)
    return np.any(present, axis=1)


def _again(model: Model) -> Model:
    """Returns the same model with new heads, compiled with the same arguments."""
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    new, old = (cast(keras.Model, backbone_of(one)) for one in (again, model))
    new.set_weights(old.get_weights())
    finalize_normalization(new)
    return again


def _twin(model: Model, name: str) -> Model:
    """Returns the same model with one new head."""
    again = _again(model)
    optimizer = again.optimizer
    twin = Model(again.input, again.output[name])
    multipliers = getattr(optimizer, "multipliers", None)
    if multipliers is None:
        return compile_tasks(twin, type(optimizer).from_config(optimizer.get_config()))
    rates = dict(zip(map(id, again.trainable_variables), multipliers, strict=True))
    own = [rates[id(variable)] for variable in twin.trainable_variables]
    return compile_tasks(twin, with_multipliers(optimizer, own))


def sign_of(metric: keras.metrics.Metric) -> int:
    """Returns 1 if more is better, -1 if less is better."""
    return -1 if metric_direction(metric) == "down" else 1


def _spread(values: np.ndarray, form: str) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():{form}} ± {deviation:{form.replace('+', '')}}"


def _check(model: Any, epochs: Any, seeds: Any, batch_size: Any) -> None:
    if not isinstance(model, Model):
        raise TypeError(
            "compare_single_tasks takes a model from lp.multitask_model. Received: "
            f"model={model!r}."
        )
    if not isinstance(model.output, Mapping) or len(tasks(model)) < 2:
        raise ValueError(
            "compare_single_tasks takes a model with two or more tasks. Received: one with "
            f"{list(tasks(model))}. Add a task, or train it with `fit`."
        )
    for argument, value in (("epochs", epochs), ("seeds", seeds), ("batch_size", batch_size)):
        check_positive(argument, value, integer=True)
