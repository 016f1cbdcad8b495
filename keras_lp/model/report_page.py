"""`report`: what a model learned and how well, on one page."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import keras
import numpy as np
from scipy import special, stats

from keras_lp.backbones.text import TextEncoder
from keras_lp.model.calibration import best_temperature, calibration_error
from keras_lp.model.outputs import collect
from keras_lp.model.report import trainable_report
from keras_lp.tasks.classification import Classification
from keras_lp.tasks.heads import Head, heads
from keras_lp.tasks.multi_label import MultiLabel
from keras_lp.utils.files import whole_file
from keras_lp.utils.page import (
    line_chart,
    matrix,
    page,
    paragraphs,
    picture,
    pictures,
    preformatted,
)
from keras_lp.utils.text_table import text_table

_CLASSES = 30  # of a confusion matrix
_WORST = 8  # errors
_FEDERATED = ("clients", "dropped", "bytes_up", "bytes_down", "update_norm", "epsilon", "clip")


Logs = keras.callbacks.History | Mapping[str, Sequence[float]]


@runtime_checkable
class Exported(Protocol):
    """A file for a phone: the output of `lp.export_tflite`. Its text describes it."""

    path: str
    contents: Any


@dataclasses.dataclass(frozen=True)
class Report:
    """The output of `lp.report`.

    Attributes:
        html: the page.
        card: a model card in Markdown.
        path: the file of the page, None if it was not written.
    """

    html: str = dataclasses.field(repr=False)
    card: str = dataclasses.field(repr=False)
    path: str | None

    def _repr_html_(self) -> str:
        return self.html


def report(
    model: keras.Model,
    history: Logs | Sequence[Logs] | None = None,
    test_data: tuple[Any, Any] | None = None,
    path: str | os.PathLike[str] | None = "report.html",
    *,
    exported: Exported | Sequence[Exported] = (),
) -> Report:
    """Writes a page about a model: what trained, the curves, test results, errors, calibration.

    The page needs no other file and no network. For each task with test labels it has the result
    with a 95 % interval, the confusion matrix (up to 30 classes), the eight worst errors with their
    pictures or texts, and the calibration error, with the temperature that `lp.calibrate` would
    choose on these data. For a federation it has the clients, the bytes and the epsilon of the
    history. Curves of several trainings, and of `lp.fit_two_phase`, have their phases marked.

    Args:
        model: a model that keras_lp built.
        history: the output of `fit`, `fit_head`, `fit_two_phase` or `FederatedAveraging.fit`, or
            its dict; or a list of these, in the order of the trainings. Defaults to None: no
            curves.
        test_data: arrays `(x, y)` that the model was not trained on. Defaults to None: no results.
        path: the HTML file; None writes nothing. Defaults to `"report.html"`.
        exported: the output of `lp.export_tflite`, or a list of several: sizes, latencies and how
            the files differ from Keras are shown. Defaults to (): none.

    Returns:
        A `Report`, which notebooks show as the page. `card` is a model card in Markdown.

    Raises:
        ValueError: if keras_lp did not build the model, `history` or `exported` is something else,
            or `fit` would reject the data.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"])
    >>> x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    >>> y = (x.sum(1) > 0).astype("int32")
    >>> history = model.fit(x[:100], y[:100], epochs=3, verbose=0)
    >>> made = lp.report(model, history, (x[100:], y[100:]), path=None)
    >>> [line for line in made.card.splitlines() if line.startswith("##")][:2]
    ['## Tasks', '## What trained']

    References: intervals of Wilson, 1927, for shares, and of Student for means; Mitchell et al.,
    2019, Model Cards for Model Reporting (arXiv:1810.03993).
    """
    known = heads(model)
    if not known:
        raise ValueError(
            f"report takes a model that keras_lp built. Received: model {model.name!r} without a "
            "task head."
        )
    if test_data is not None and (not isinstance(test_data, tuple) or len(test_data) != 2):
        raise ValueError(
            f"`test_data` must be arrays (x, y). Received: {type(test_data).__name__}."
        )
    files = [exported] if isinstance(exported, Exported) else exported
    if not isinstance(files, list | tuple) or not all(isinstance(one, Exported) for one in files):
        raise ValueError(
            "`exported` must be the output of lp.export_tflite, or a list of several. Received: "
            f"{exported!r}."
        )
    lines: list[str] = []
    trainable_report(model, lines.append)
    kinds = [(name, type(head.task).__name__, str(head.task.units)) for name, head in known.items()]
    tasks = text_table([("task", "kind", "outputs"), *kinds], left=2)
    sections = {"Model": [preformatted(tasks)], "What trained": [preformatted("\n".join(lines))]}
    logs, phases = _joined(history)
    if logs:
        sections["Training"] = _curves(logs, phases)
        if "bytes_up" in logs:
            sections["Federation"] = [preformatted(_federation(logs))]
    results = [] if test_data is None else _results(known, model, test_data)
    for one in results:
        sections[f"Test results of {one.name}"] = one.parts
    if files:
        sections["Files"] = [preformatted("\n\n".join(map(str, files)))]
    measured = [one.line for one in results]
    card = _card(model.name, tasks, lines, measured, [str(file) for file in files])
    sections["Model card"] = [preformatted(card)]
    content = page(model.name, sections)
    if path is not None:
        with whole_file(path) as file:
            file.write(content.encode())
    return Report(content, card, None if path is None else os.fspath(path))


@dataclasses.dataclass(frozen=True)
class _TaskResult:
    """The results of a task: a line of the card, and parts of the page."""

    name: str
    line: str
    parts: list[str]


def _joined(
    history: Logs | Sequence[Logs] | None,
) -> tuple[dict[str, list[float]], list[tuple[str, int]]]:
    """Returns the logs of one or several trainings, and name and length of each phase."""
    several = isinstance(history, list | tuple)
    parts: Any = history if several else [] if history is None else [history]
    joined: dict[str, list[float]] = {}
    phases: list[tuple[str, int]] = []
    done = 0
    for number, part in enumerate(parts, 1):
        logs = part.history if isinstance(part, keras.callbacks.History) else part
        if not isinstance(logs, Mapping):
            raise ValueError(
                "`history` must be the output of `fit`, its dict, or a list of these. Received: "
                f"{part!r}."
            )
        count = max((len(values) for values in logs.values()), default=0)
        for name in {**joined, **logs}:
            known = [float(value) for value in logs.get(name, [])]
            missing = [math.nan] * (count - len(known))
            joined.setdefault(name, [math.nan] * done).extend([*known, *missing])
        own = getattr(part, "phases", {f"training {number}": count} if several else {})
        phases += own.items()
        done += count
    return joined, phases


def _curves(logs: Mapping[str, Sequence[float]], phases: Sequence[tuple[str, int]]) -> list[str]:
    """Returns a chart for each metric, of training and validation."""
    names = [name for name in logs if not name.startswith("val_")]
    x_title = "round" if "bytes_up" in logs else "epoch"
    charts = []
    for name in names:
        if name in (*_FEDERATED, "seconds", "learning_rate"):
            continue
        series = {"training": [float(value) for value in logs[name]]}
        if f"val_{name}" in logs:
            series["validation"] = [float(value) for value in logs[f"val_{name}"]]
        charts.append(line_chart(series, x_title, name, phases))
    return charts


def _federation(logs: Mapping[str, Sequence[float]]) -> str:
    rows = [
        ("rounds", f"{len(logs['bytes_up']):,}"),
        ("clients per round", f"{np.mean(logs['clients']):,.1f}"),
        ("bytes sent by clients", f"{sum(logs['bytes_up']):,.0f}"),
        ("bytes received by clients", f"{sum(logs['bytes_down']):,.0f}"),
    ]
    if "epsilon" in logs:
        rows.append(("epsilon spent", f"{logs['epsilon'][-1]:.3f}"))
    return text_table(rows, left=1)


def _results(known: Mapping[str, Head], model: keras.Model, data: Any) -> list[_TaskResult]:
    found = []
    for name, (y, output, weight) in collect(model, known, data, _piece).items():
        here, task = weight > 0, known[name].task
        if not here.any():
            continue
        parts: list[str] = []
        if isinstance(task, Classification):
            right = (output.argmax(1) == y)[here]
            line = f"accuracy {_share(right)}"
            inputs = _inputs(model, data[0], len(y))
            parts = _class_parts(task, y, output, here, inputs)
        elif isinstance(task, MultiLabel):
            line = f"right labels {_share((task.is_predicted(output) == (y > 0.5))[here])}"
        else:
            line = f"mean absolute error {_mean(np.abs(y - output)[here])}"
        found.append(_TaskResult(name, f"{name}: {line}", [paragraphs(line.capitalize()), *parts]))
    return found


def _piece(head: Head, y: Any, output: Any, weight: Any) -> tuple[np.ndarray, ...]:
    """Returns labels, outputs and weights: a row per example, or per label of several."""
    task = head.task
    if isinstance(task, MultiLabel):
        return tuple(part.reshape(-1, task.units) for part in (y, output, weight))
    if not isinstance(task, Classification):
        return y.reshape(-1), output.reshape(-1), weight.reshape(-1)
    if y.size == output.size:  # distributions over the classes
        y = y.reshape(output.shape).argmax(-1)
    return y.reshape(-1), output.reshape(-1, task.units), weight.reshape(-1)


def _class_parts(
    task: Classification, y: np.ndarray, logits: np.ndarray, here: np.ndarray, inputs: Any
) -> list[str]:
    """Returns the confusion matrix, the calibration and the worst errors of a task with classes."""
    y, logits = y[here].astype(int), logits[here].astype("float64")
    predicted, ones = logits.argmax(1), np.ones(len(y))
    right, target = (predicted == y) * 1.0, logits[np.arange(len(y)), y]
    temperature = best_temperature(logits, target, ones)
    errors = [calibration_error(logits / t, right, ones) for t in (1.0, temperature)]
    parts = []
    if task.units <= _CLASSES:
        counts = np.zeros((task.units, task.units))
        np.add.at(counts, (y, predicted), 1)
        parts.append(matrix(counts, task.class_names, "the label", "the prediction"))
    parts.append(
        paragraphs(
            f"Calibration error {errors[0]:.3f}; {errors[1]:.3f} with the temperature "
            f"{temperature:.2f}, which lp.calibrate would choose on these data."
        )
    )
    p = special.softmax(logits, axis=1)
    wrong = np.flatnonzero(predicted != y)
    worst = wrong[np.argsort(p[wrong, y[wrong]], kind="stable")][:_WORST]
    places = np.flatnonzero(here)[worst]
    if len(worst):
        rows = [["example", "label", "prediction", "probability"]]
        names = task.class_names
        for i, place in zip(worst, places, strict=True):
            chosen = names[predicted[i]], f"{p[i, predicted[i]]:.3f}"
            rows.append([str(place), names[y[i]], *chosen])
        parts += [paragraphs("The worst errors:"), *_shown(inputs, places)]
        parts.append(preformatted(text_table(rows)))
    return parts


def _inputs(model: keras.Model, x: Any, count: int) -> np.ndarray | None:
    """Returns inputs that can be shown, one per label: pictures or texts."""
    if isinstance(x, Mapping) or len(array := np.asarray(x)) != count:
        return None
    encoder = TextEncoder.of(model)
    if encoder is not None and array.ndim == 2:
        tokens = np.array(encoder.tokens)
        space = " " if encoder.level == "word" else ""
        return np.array([space.join(tokens[row[row > 0]]) for row in array])
    is_text = array.ndim == 1 and array.dtype.kind in "USO"
    is_image = array.ndim == 4 and array.shape[-1] in (1, 3)
    return array if is_text or is_image else None


def _shown(inputs: np.ndarray | None, places: np.ndarray) -> list[str]:
    """Returns the inputs of some examples, pictures or texts."""
    if inputs is None:
        return []
    chosen = inputs[places]
    if inputs.ndim == 1:
        lines = [f"{place}: {text}" for place, text in zip(places, chosen, strict=True)]
        return [preformatted("\n".join(lines))]
    low, high = float(inputs.min()), float(inputs.max())
    return [pictures([("in this order", [picture(one, low, high) for one in chosen])])]


def _share(right: np.ndarray) -> str:
    interval = stats.binomtest(int(right.sum()), right.size).proportion_ci(method="wilson")
    return (
        f"{right.mean():.1%} (95 % interval {interval.low:.1%} to {interval.high:.1%}, "
        f"{right.size:,} labels)"
    )


def _mean(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values.mean():.4g} (1 label)"
    margin = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.4g} ± {margin:.2g} (95 % interval, {len(values):,} labels)"


def _card(
    name: str,
    tasks: str,
    trained: Sequence[str],
    measured: Sequence[str],
    files: Sequence[str],
) -> str:
    """Returns a model card in Markdown."""
    described = ["\n## Files\n", *(f"    {line}" for text in files for line in text.splitlines())]
    shown = [f"- {line}" for line in measured] or ["Not measured."]
    return "\n".join(
        [
            f"# {name}",
            "\n## Tasks\n",
            *(f"    {line}" for line in tasks.splitlines()),
            "\n## What trained\n",
            *(f"    {line}" for text in trained for line in text.splitlines()),
            "\n## Test results\n",
            *shown,
            *(described if files else []),
            "\n## Data, intended use, limits\n",
            "Write here what the model was trained on, what it is for, and what it is not for.",
        ]
    )
