"""`fit_head`: solves the heads on a frozen backbone instead of training them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_lp.backbones import features
from keras_lp.backbones.pixels import warn_of_scaled_images
from keras_lp.model import checks, class_balance
from keras_lp.model.caching import FeatureCache
from keras_lp.model.data import as_numbers, checked, readable
from keras_lp.model.linear_heads import linear_heads
from keras_lp.privacy.differential_privacy import DifferentialPrivacy
from keras_lp.privacy.report import PrivacyReport
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import Head
from keras_lp.tasks.regression import Regression, is_waiting, standardize
from keras_lp.tasks.task import ClassTask, ClassWeight
from keras_lp.transfer.head_solver import Components, Labels, choose_l2, solve
from keras_lp.transfer.private_head import train_privately
from keras_lp.utils.arguments import Verbose, check_positive
from keras_lp.utils.moments import ROWS

_FOLDS = 5
_ENOUGH = 50  # examples per class, above which one split into folds is precise enough
_MANY = 10_000  # examples, above which one held-out fifth is precise enough
_COSTLY = 50_000  # examples times outputs, above which one held-out fifth must be enough
_UNJUDGED = 0.1  # the strength if nothing can be held out


@checks.plain_errors()
def fit_head(
    model: keras.Model,
    data: Any,
    *,
    validation_data: Any = None,
    l2: float | Literal["auto"] = "auto",
    class_weight: ClassWeight | None = None,
    privacy: DifferentialPrivacy | None = None,
    verbose: Verbose = "auto",
) -> keras.callbacks.History:
    """Solves the heads of a model with a frozen backbone: a linear probe.

    The features of the examples are computed once and standardised. The loss of a linear head on
    them, plus `l2 / 2` times the sum of its squared weights, is convex and has one optimum, which
    L-BFGS finds. There is no learning rate and no number of epochs, and the result is the same
    every time. Kernel and bias, with the standardisation folded in, are written to the plain Keras
    heads. Several heads are solved separately; task weights have no effect.

    The objective of a `Classification` is that of scikit-learn's `LogisticRegression` with
    `C = 1 / (l2 * n)` on standardised features of `n` examples. That of a `Regression` is `Ridge`
    with `alpha = l2 * n / 2`, and that of each label of a `MultiLabel` a logistic regression.

    Args:
        model: a compiled model from `lp.transfer_model` or `lp.multitask_model` with a frozen
            backbone (`trainable="head"`), no `augmentation`, and heads with `hidden_units=()`.
        data: `(x, y)` or `(x, y, sample_weight)` arrays or pandas columns, or a finite batched
            `tf.data.Dataset`, `PyDataset` or Grain loader; labels as in `fit`, including missing
            ones.
        validation_data: held-out examples in one of these forms. They determine `l2="auto"`, and
            their `val_loss` and metrics are in the history. Defaults to None.
        l2: strength of the penalty, above 0. `"auto"` chooses the strength with the lowest loss
            on `validation_data` if it is given, else by cross-validation: 5 stratified folds,
            repeated three times for few examples; only one fold for more than 10,000 examples (or
            more than 50,000 outputs of all examples). Defaults to `"auto"`.
        class_weight: weights of the examples of each class, a dict by number or name, or
            `"balanced"`, as in `lp.Classification`. It replaces the `class_weight` of the task.
            Only for a model with one task. Defaults to None: the task's own.
        privacy: `lp.DifferentialPrivacy` for the examples, see below. Defaults to None.
        verbose: 0 prints nothing, else progress and one line with the result. Defaults to
            `"auto"`.

    With `privacy`, the heads are trained by 100 steps of gradient descent with all examples, of
    which each contributes a gradient of limited length, and with noise (DP-SGD). `l2="auto"` is
    then 0. The features are not standardised, as their mean and deviation depend on the examples;
    if the model has trained before, on public examples, it keeps the scale of these. The loss and
    metrics of the training examples are withheld. `validation_data` are not protected.

    Returns:
        A `History` of one epoch: `loss` and metrics as in `evaluate(data)`, `l2`, the
        cross-validated `cv_loss` (both `<task>_...` for several tasks), and `val_...`. With
        `privacy`: `epsilon`, `l2` and `val_...`, and the attribute `privacy_report`; print it.

    Raises:
        ValueError: if the features change during training, the heads are not linear, `fit` would
            reject the labels or inputs, a task has no labels, or `l2` is not above 0; with
            `privacy` also if class weights are `"balanced"`, an `lp.Regression` has no `mean` and
            `std`, or `delta` is 1 / examples or more.
        ImportError: if `privacy` is given and dp-accounting is not installed.
        TypeError: if the data have another type.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"])
    >>> x = np.random.default_rng(0).normal(size=(100, 4)).astype("float32")
    >>> history = lp.fit_head(model, (x, x.sum(1) > 0), verbose=0)
    >>> history.history["accuracy"][0] > 0.9
    True

    References: Kornblith et al., 2019, Do Better ImageNet Models Transfer Better?
    (arXiv:1805.08974); Radford et al., 2021, CLIP (arXiv:2103.00020); Abadi et al., 2016, Deep
    Learning with Differential Privacy (arXiv:1607.00133).
    """
    if l2 != "auto":
        check_positive("l2", l2)
    checks.check_trainable_unchanged(model)
    known = linear_heads(model)
    if class_weight is not None:
        class_balance.check(known, class_weight)
    data = checked(model, readable(data, "data"))
    if isinstance(data, tuple):
        warn_of_scaled_images(model, data[0], "data")
    if validation_data is not None:
        held_out = readable(validation_data, "validation_data")
        validation_data = checked(model, held_out, " of validation_data")
    with FeatureCache(model, verbose) as cache:
        examples = _Examples(model, cache.take(data)[0])
        held_out = None
        if validation_data is not None:
            held_out = _Examples(model, cache.take(validation_data)[0])
        if privacy is not None:
            found, report = _solve_privately(known, examples, l2, class_weight, privacy)
            validation = {} if held_out is None else _evaluate(model, held_out)
            return _history(model, {}, found, validation, verbose, report)
        standardize(known, [examples.y])
        class_balance.balance_classes(known, [examples.y])
        if class_weight is not None:
            class_weight = class_balance.resolve(known, class_weight, [examples.y])
        components = Components(examples.rows)
        judged = None if held_out is None or l2 != "auto" else components.turn(held_out.rows)
        found = {}
        for name, head in known.items():
            labels = _labels(head, examples, class_weight)
            if not np.any(labels.weights > 0):
                raise ValueError(
                    "Each head needs a label with a weight above 0. Received: data without any for "
                    f"{name!r}."
                )
            strength: Any
            strength, score, start = l2, None, None
            if l2 == "auto" and judged is not None:
                everything = np.ones((components.count, 1))
                other = _labels(head, held_out, class_weight)
                strength, _, start = choose_l2(components, labels, everything, (judged, other))
            elif l2 == "auto":
                folds = _folds(examples, head)
                if folds is None:
                    strength = _UNJUDGED
                else:
                    strength, score, start = choose_l2(components, labels, folds)
            solution = solve(components, labels, strength, start=start)
            kernel = components.kernel(solution.weights[:, 0])
            head.set_raw_weights(kernel, solution.bias[0] - components.mean @ kernel)
            prefix = f"{name}_" if len(known) > 1 else ""
            found[f"{prefix}l2"] = float(strength)
            if score is not None:
                found[f"{prefix}cv_loss"] = float(score)
        logs = _evaluate(model, examples)
        validation = {} if held_out is None else _evaluate(model, held_out)
    return _history(model, logs, found, validation, verbose)


def _history(
    model: keras.Model,
    logs: dict[str, float],
    found: dict[str, float],
    validation: dict[str, float],
    verbose: Verbose,
    report: PrivacyReport | None = None,
) -> keras.callbacks.History:
    """Prints the line with the result, and returns the history.

    Args:
        model: the model.
        logs: the results on the training examples.
        found: settings that were found.
        validation: the results on held-out examples.
        verbose: whether to print.
        report: the report of a private training. Defaults to None.
    """
    logs = {**logs, **found, **{f"val_{name}": value for name, value in validation.items()}}
    if verbose not in (0, False):
        print(_line(logs, found))
    history: Any = keras.callbacks.History()
    history.set_model(model)
    history.on_train_begin()
    history.on_epoch_end(0, logs)
    if report is not None:
        history.privacy_report = report
    model.history = history
    return history


def _solve_privately(
    known: Mapping[str, Head],
    examples: _Examples,
    l2: float | Literal["auto"],
    class_weight: ClassWeight | None,
    settings: DifferentialPrivacy,
) -> tuple[dict[str, float], PrivacyReport]:
    """Trains the heads with differential privacy; returns what a history has, and the report."""
    if examples.features.ndim != 2:
        raise ValueError(
            "A private head takes one row of features per example. Received: features of shape "
            f"{examples.features.shape[1:]} per example. Pool them: `transfer_model(..., pooling="
            '"avg")`.'
        )
    waiting = class_weight is None and class_balance.waiting_heads(known)
    if class_weight == "balanced" or waiting:
        raise ValueError(
            'class_weight="balanced" counts the labels, without noise. Received: it with `privacy`.'
            " Pass the weights as a dict."
        )
    unscaled = [name for name, head in known.items() if is_waiting(head)]
    if unscaled:
        raise ValueError(
            "A private lp.Regression needs `mean` and `std`: those of the labels would not be "
            f"protected. Received: {unscaled} without them."
        )
    if class_weight is not None:
        class_weight = class_balance.resolve(known, class_weight, [examples.y])
    labels = {name: _labels(head, examples, class_weight) for name, head in known.items()}
    first, columns = next(iter(known.values())), examples.features.shape[-1]
    mean, scale = np.zeros(columns), np.ones(columns)
    if first.scales_inputs:  # from public examples, if any
        mean, scale = (np.asarray(one, "float64") for one in (first.input_mean, first.input_scale))
    rows = ((examples.rows - mean) * scale).astype("float32")
    strength = 0.0 if l2 == "auto" else float(l2)
    solved, mechanism = train_privately(rows, labels, strength, settings)
    for name, (kernel, bias) in solved.items():
        kernel = kernel * scale[:, None]
        known[name].set_raw_weights(kernel, bias - mean @ kernel)
    report = mechanism.report()
    return {"epsilon": report.epsilon, "l2": strength}, report


class _Examples:
    """Features, labels and weights of a data set, from the cache."""

    def __init__(self, model: keras.Model, parts: tuple[Any, ...]) -> None:
        x, y, *rest = parts
        self.y, self.sample_weight = as_numbers(model, y), next(iter(rest), None)
        self._parts = x, self.y, *rest
        self.features, self.mask = x[features.KEY], x.get(features.MASK)

    @property
    def rows(self) -> np.ndarray:
        """The features, `(rows, columns)`, with one row per step if examples have several."""
        return self.features.reshape(-1, self.features.shape[-1])

    def batches(self) -> Iterator[Any]:
        """Yields `(features, y, sample_weight)` in large pieces."""
        for start in range(0, len(self.features), ROWS):
            rows = slice(start, start + ROWS)
            yield keras.tree.map_structure(
                lambda part, rows=rows: tf.convert_to_tensor(np.asarray(part[rows])), self._parts
            )


def _labels(head: Head, examples: _Examples, class_weight: Any) -> Labels:
    """Returns the labels of a head; missing labels have a weight of 0."""
    task, steps = head.task, examples.features.shape[:-1]
    y, sample_weight = (
        part.get(head.name) if isinstance(part, Mapping) else part
        for part in (examples.y, examples.sample_weight)
    )
    if class_weight is None and head.is_balanced:
        class_weight = head.class_weight
    if isinstance(task, Regression) and y is not None:
        y = (np.asarray(y, "float64") - np.asarray(head.mean)) / np.asarray(head.std)
    y, outputs, weight = task.mask_missing(y, tf.zeros((*steps, task.units)), sample_weight)
    _, _, weight = task.for_loss(y, outputs, weight, class_weight)
    values, weights = np.asarray(y), np.asarray(weight, "float64")
    if isinstance(task, Classification):
        if examples.mask is not None:
            weights = weights * np.asarray(examples.mask)
        soft = values.ndim > weights.ndim
        values = values.reshape(-1, task.units).astype("float64") if soft else values.ravel()
        return Labels("softmax", values, weights.ravel(), task.units, task.label_smoothing)
    values = values.astype("float64").reshape(-1, task.units)
    weights = weights.reshape(values.shape)
    if not isinstance(task, ClassTask):
        return Labels("squared", values, weights, task.units)
    values = values * (1 - task.label_smoothing) + task.label_smoothing / 2
    return Labels("sigmoid", values, weights, task.units)


def _folds(examples: _Examples, head: Head) -> np.ndarray | None:
    """Returns the training rows of each fold, `(rows, folds)` of 1 and 0; None if all must train.

    The examples of a class are spread evenly over the folds. The only example of a class is never
    held out. All steps of an example are in the same fold.
    """
    count, steps = len(examples.features), int(np.prod(examples.features.shape[1:-1]))
    groups = np.zeros(count, int)
    y = examples.y.get(head.name) if isinstance(examples.y, Mapping) else examples.y
    if isinstance(head.task, Classification) and y is not None and steps == 1:
        y = np.asarray(y).reshape(count, -1)
        soft = y.shape[1] > 1
        groups = np.where((y >= 0).all(1), y.argmax(1) if soft else y[:, 0], -1).astype(int)
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    several = np.array([sizes[group] > 1 for group in groups])
    if not several.any():
        return None
    random, columns = np.random.default_rng(0), []
    few = count < _ENOUGH * max(len(sizes), 2)
    many = count > _MANY or count * head.task.units > _COSTLY
    for _ in range(3 if few and not many else 1):
        order = np.lexsort((random.random(count), groups))
        order = order[several[order]]
        number = np.full(count, -1)
        number[order] = np.arange(len(order)) % _FOLDS
        columns += [number != fold for fold in range(1 if many else _FOLDS)]
    kept = [column for column in columns if not column.all()]
    return np.repeat(np.array(kept, float).T, steps, axis=0)


def _evaluate(model: keras.Model, examples: _Examples) -> dict[str, float]:
    """Returns the output of `model.evaluate` without tracing a function."""
    model.reset_metrics()
    for batch in examples.batches():
        logs = model.test_step(batch)
    return {name: float(value) for name, value in sorted(logs.items())}  # as in `fit`


def _line(logs: Mapping[str, float], found: Mapping[str, float]) -> str:
    chosen = ", ".join(f"{name}={value:.3g}" for name, value in found.items())
    results = ", ".join(f"{name} {value:.4f}" for name, value in logs.items() if name not in found)
    return f"Head solved with {chosen}: {results}"
