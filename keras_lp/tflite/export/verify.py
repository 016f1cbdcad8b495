"""Runs a `.tflite` file in LiteRT, compares it with its Keras model and times it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from keras_lp.tflite.device.runtime import load_interpreter
from keras_lp.tflite.export.examples import Examples
from keras_lp.tflite.interface import Interface, Output

_CLEAR = 0.9  # default lowest agreement over the answers that are not nearly tied
_SPREAD = 0.15  # default limit of the mean difference of probabilities
_LOST = 0.01  # default limit of the loss of accuracy
_SURE = 1.645  # standard errors of a one-sided test at 5 %
_STEP = 1 / 256  # an 8-bit step

_CHUNK = 64  # batch size in Keras
_WARM_UP, _CALLS, _SECONDS = 5, 200, 1.0  # of the latency measurement

Run = Callable[[list[np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How much a file may differ from Keras.

    Attributes:
        limit: the largest allowed error.
        by_agreement: whether the error is the share of answers that differ (for values, the mean
            difference) or the largest difference. Differences of values are relative to their
            range.
        spread: the default limit of the mean difference of probabilities for a quantized file;
            None if the user gave a tolerance or the file is not quantized.
    """

    limit: float
    by_agreement: bool
    spread: float | None = None

    @classmethod
    def of(cls, quantization: str | None, given: float | None) -> Tolerance:
        """Returns the tolerance of `export_tflite` for a quantization."""
        usual = quantization is not None and given is None
        if quantization in ("dynamic", "int8"):
            # Rounded because 1 - 0.95 is slightly more than 0.05, and 19 of 20 must pass.
            limit = round(1 - (0.95 if given is None else given), 9)
            return cls(limit, True, _SPREAD if usual else None)
        standard = 1e-2 if quantization == "float16" else 1e-4
        return cls(standard if given is None else given, False, standard if usual else None)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Compares one output of a file with Keras.

    Attributes:
        difference: the largest absolute difference.
        agreement: share of equal answers: the most probable classes, or for `MultiLabel` whether
            each entry is above its threshold; None for values.
        error: the error that the tolerance limits, see `Tolerance`.
        allowed: the largest allowed error.
        varies: whether a file with constant output would fail. If not, the comparison proves
            nothing.
        scores: accuracy (for values, mean absolute error) of Keras and of the file; None without
            labels that fit the output.
        kind: the kind of the output, see `Output`.
    """

    difference: float
    agreement: float | None
    error: float
    allowed: float
    varies: bool
    scores: tuple[float, float] | None
    kind: str

    def describe(self) -> str:
        """Describes the comparison in words."""
        parts = [f"largest difference {self.difference:.1e}"]
        if self.agreement is not None:
            word = "top-1 agreement" if self.kind == "classes" else "agreement"
            parts.append(f"{word} {self.agreement:.1%}")
        if self.scores is not None and self.kind == "values":
            parts.append("mean absolute error {:.4g}, in Keras {:.4g}".format(*self.scores[::-1]))
        elif self.scores is not None:
            parts.append("accuracy {:.2%}, in Keras {:.2%}".format(*self.scores[::-1]))
        if not self.varies:
            parts.append(
                "cannot be verified: a file with constant output would pass on these examples"
            )
        return ", ".join(parts)


def compare(
    described: Interface, run: Run, examples: Examples, batch_size: int, tolerance: Tolerance
) -> dict[str, Comparison]:
    """Compares every output of a file with Keras; returns the comparisons by output name.

    Args:
        described: the model in float32.
        run: the file as returned by `load`.
        examples: the inputs, and labels if known.
        batch_size: batch size of the file.
        tolerance: defines the errors, their limits and `varies`.
    """
    theirs = run_all(run, examples.inputs, batch_size)
    raw = keras_outputs(described, examples.inputs)
    compared = {}
    for output, values in zip(described.outputs, raw, strict=True):
        ours = output.activate(values.astype("float64"))
        labels = examples.labels.get(output.name)
        compared[output.name] = _compare(output, ours, theirs[output.name], labels, tolerance)
    return compared


def load(content: bytes, names: list[str]) -> Run:
    """Loads a file into LiteRT with one thread; returns a function of a batch of inputs.

    Raises:
        ImportError: `ai-edge-litert` is not installed.
    """
    runner = load_interpreter(content).get_signature_runner()
    return lambda batch: runner(**dict(zip(names, batch, strict=True)))


def run_all(run: Run, inputs: list[np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """Runs a file on all examples; the last example is repeated to fill the last batch."""
    count = len(inputs[0])
    rows = np.minimum(np.arange(-(-count // batch_size) * batch_size), count - 1)
    batches = [run([array[chosen] for array in inputs]) for chosen in rows.reshape(-1, batch_size)]
    return {name: np.concatenate([one[name] for one in batches])[:count] for name in batches[0]}


def latency(run: Run, inputs: list[np.ndarray], batch_size: int) -> tuple[float, float]:
    """Returns the median and 95th percentile of the time per call in milliseconds."""
    rows = np.arange(batch_size) % len(inputs[0])
    batch = [array[rows] for array in inputs]
    for _ in range(_WARM_UP):
        run(batch)
    seconds: list[float] = []
    while len(seconds) < _CALLS and sum(seconds) < _SECONDS:
        start = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - start)
    median, p95 = np.percentile(seconds, [50, 95])
    return 1e3 * float(median), 1e3 * float(p95)


def keras_outputs(described: Interface, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the outputs of a model on all examples, in order."""
    chunks = [
        [np.asarray(raw) for raw in described.call([a[i : i + _CHUNK] for a in inputs])]
        for i in range(0, len(inputs[0]), _CHUNK)
    ]
    return [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


def _compare(
    output: Output,
    ours: np.ndarray,
    theirs: np.ndarray,
    labels: np.ndarray | None,
    tolerance: Tolerance,
) -> Comparison:
    decides = output.kind != "values"
    right = _right(output, ours, theirs, labels) if decides else None
    spread = tolerance.spread if decides else None
    constant = _constant(output, ours, tolerance)
    if spread is not None and right is not None:
        allowed, error = _LOST, _lost(right)
        of_constant = _lost(_right(output, ours, constant, labels) or right)
    elif spread is not None:
        allowed = 1.0
        mean = np.broadcast_to(ours.mean(axis=0), ours.shape)
        error, *of_constants = (
            _change(output, ours, other, spread) for other in (theirs, mean, constant)
        )
        of_constant = min(of_constants)
    else:
        allowed = tolerance.limit
        error, of_constant = (
            _error(output, ours, other, tolerance) for other in (theirs, constant)
        )
    return Comparison(
        difference=float(np.abs(ours - theirs).max()),
        agreement=_agreement(output, ours, theirs) if decides else None,
        error=error if np.isfinite(theirs).all() else float("nan"),
        allowed=allowed,
        varies=bool(of_constant > allowed),
        scores=_scores(output, ours, theirs, labels),
        kind=output.kind,
    )


def _lost(right: tuple[np.ndarray, np.ndarray]) -> float:
    """Returns the loss of accuracy compared with Keras, beyond what chance explains.

    Args:
        right: whether each answer is right, in Keras and in the file.
    """
    lost = right[0].astype("float64") - right[1]
    return float(lost.mean() - _SURE * lost.std() / np.sqrt(lost.size))


def _change(output: Output, ours: np.ndarray, theirs: np.ndarray, spread: float) -> float:
    """Returns the error of answers or probabilities, whichever is larger, with 1 at the limit.

    Only the answers that Keras prefers by more than two 8-bit steps count, because rounding may
    decide the others.
    """
    step = _STEP * max(1.0, float(np.ptp(ours)))
    if output.kind == "classes":
        second, first = np.partition(ours, -2, axis=-1)[..., -2:].T
        margin = (first - second).T
    else:
        margin = np.abs(ours - (np.array(output.thresholds) if output.thresholds else 0.5))
    clear = margin > 2 * step
    differ = output.decide(ours) != output.decide(theirs)
    share = float(differ[clear].mean()) if clear.any() else 0.0
    largest = np.abs(ours - theirs).max(axis=-1).mean()
    return round(max(share / (1 - _CLEAR), float(largest) / spread), 9)


def _agreement(output: Output, ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.mean(output.decide(ours) == output.decide(theirs)))


def _error(output: Output, ours: np.ndarray, theirs: np.ndarray, tolerance: Tolerance) -> float:
    differences = np.abs(ours - theirs)
    if output.kind == "values":
        differences = differences / _scale(ours)
        return float(differences.mean() if tolerance.by_agreement else differences.max())
    if not np.isfinite(differences).all():  # a NaN would also count as an answer
        return float("nan")
    if tolerance.by_agreement:
        return float(np.mean(output.decide(ours) != output.decide(theirs)))
    return float(differences.max())


def _scale(values: np.ndarray) -> np.ndarray:
    """Returns the range of each entry, with a floor for entries that hardly vary."""
    rounding = np.maximum(1e-2 * np.abs(values).max(axis=0), 1e-3 * np.ptp(values))
    scale = np.maximum(np.ptp(values, axis=0), rounding)
    return np.where(scale == 0, 1.0, scale)


def _constant(output: Output, ours: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """Returns the constant output that is closest to the outputs."""
    if not tolerance.by_agreement:
        best = (ours.min(axis=0) + ours.max(axis=0)) / 2
    elif output.kind == "classes":
        flat = ours.argmax(-1).ravel()
        best = np.eye(ours.shape[-1])[np.bincount(flat).argmax()]
    else:
        best = np.median(ours, axis=0)
    return np.broadcast_to(best, ours.shape)


def _scores(
    output: Output, ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray | None
) -> tuple[float, float] | None:
    """Returns the scores of both over the labels that are present."""
    if output.kind != "values":
        right = _right(output, ours, theirs, labels)
        return None if right is None else (float(right[0].mean()), float(right[1].mean()))
    errors = _errors(output, ours, theirs, labels)
    return None if errors is None else (float(errors[0].mean()), float(errors[1].mean()))


def _right(
    output: Output, ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns whether the answers of both are right, over the labels that are present."""
    errors = _errors(output, ours, theirs, labels)
    return None if errors is None else (errors[0] == 0, errors[1] == 0)


def _errors(
    output: Output, ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray | None
) -> list[np.ndarray] | None:
    if labels is None:
        return None
    if output.kind == "classes" and labels.shape == ours.shape:
        labels = labels.argmax(-1)
    answers = [one if output.kind == "values" else output.decide(one) for one in (ours, theirs)]
    if labels.size != answers[0].size:  # class numbers for a plain Keras model with logits
        return None
    labels = labels.reshape(answers[0].shape)
    present = np.isfinite(labels) & ((labels >= 0) | (output.kind == "values"))
    if not present.any():
        return None
    return [np.abs(one.astype("float64") - labels)[present] for one in answers]
