"""A phone file against its Keras model: run in LiteRT, compared, timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import keras
import numpy as np

from keras_lp.tflite.device.runtime import load_interpreter
from keras_lp.tflite.export.examples import Examples
from keras_lp.tflite.interface import Output, call_flat, outputs

_CLEAR = 0.9  # of the answers that are not nearly tied agree, by default
_SPREAD = 0.15  # how far the probabilities of an example are off on the mean, by default
_LOST = 0.01  # of the accuracy, by default
_SURE = 1.645  # standard errors: a loss that chance explains in one of twenty files is none
_STEP = 1 / 256  # of 8 bits

_CHUNK = 64  # examples that Keras computes at once
_WARM_UP, _CALLS, _SECONDS = 5, 200, 1.0  # of the timing

Run = Callable[[list[np.ndarray]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a file may be from Keras.

    Attributes:
        limit: the largest error.
        by_agreement: whether the error is the share of answers that differ (for values their mean
            difference), or the largest difference. That of values is a share of their range.
        spread: the difference of probabilities that the default of a quantized file allows on the
            mean; None where the user gave a tolerance, or nothing is quantized.
    """

    limit: float
    by_agreement: bool
    spread: float | None = None

    @classmethod
    def of(cls, quantization: str | None, given: float | None) -> Tolerance:
        """The tolerance of `export_tflite` for a quantization."""
        usual = quantization is not None and given is None
        if quantization in ("dynamic", "int8"):
            # Rounded: 1 - 0.95 is a little more than 0.05, and 19 of 20 are within.
            limit = round(1 - (0.95 if given is None else given), 9)
            return cls(limit, True, _SPREAD if usual else None)
        standard = 1e-2 if quantization == "float16" else 1e-4
        return cls(standard if given is None else given, False, standard if usual else None)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One output of a file compared with Keras's.

    Attributes:
        difference: the largest absolute one.
        agreement: share of the answers that are the same: most probable classes, or for
            `MultiLabel` entries above their threshold or not; None for values.
        error: what the tolerance limits, see `Tolerance`.
        allowed: how large it may be.
        varies: whether a file that always gives the same would be found out. If not, the
            comparison proves nothing.
        scores: Keras's and the file's accuracy (for values mean absolute error), None without
            labels that fit the output.
        kind: of the output, see `Output`.
    """

    difference: float
    agreement: float | None
    error: float
    allowed: float
    varies: bool
    scores: tuple[float, float] | None
    kind: str

    def describe(self) -> str:
        """The comparison in words."""
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
                "cannot be verified: a file that always gives the same would pass on these examples"
            )
        return ", ".join(parts)


def compare(
    model: keras.Model, run: Run, examples: Examples, batch_size: int, tolerance: Tolerance
) -> dict[str, Comparison]:
    """Compares every output of a file with Keras's; returns the comparisons by output.

    Args:
        model: the model in float32.
        run: the file, as `load` gives it.
        examples: what both get.
        batch_size: of the file.
        tolerance: decides what `varies` means.
    """
    theirs = run_all(run, examples.inputs, batch_size)
    raw = keras_outputs(model, examples.inputs)
    compared = {}
    for output, values in zip(outputs(model), raw, strict=True):
        ours = output.activate(values.astype("float64"))
        labels = examples.labels.get(output.name)
        compared[output.name] = _compare(output, ours, theirs[output.name], labels, tolerance)
    return compared


def load(content: bytes, names: list[str]) -> Run:
    """Loads a file into LiteRT, one thread; returns a call on a batch of inputs in order.

    Raises:
        ImportError: `ai-edge-litert` is not installed.
    """
    runner = load_interpreter(content).get_signature_runner()
    return lambda batch: runner(**dict(zip(names, batch, strict=True)))


def run_all(run: Run, inputs: list[np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """Runs a file on all examples; the last ones come again to fill its last batch."""
    count = len(inputs[0])
    rows = np.minimum(np.arange(-(-count // batch_size) * batch_size), count - 1)
    batches = [run([array[chosen] for array in inputs]) for chosen in rows.reshape(-1, batch_size)]
    return {name: np.concatenate([one[name] for one in batches])[:count] for name in batches[0]}


def latency(run: Run, inputs: list[np.ndarray], batch_size: int) -> tuple[float, float]:
    """Times calls of a file one after the other; returns the median and p95 in milliseconds."""
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


def keras_outputs(model: keras.Model, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a model as it gives them, in order."""
    chunks = [
        [np.asarray(raw) for raw in call_flat(model, [a[i : i + _CHUNK] for a in inputs])]
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
    """Returns by how much a file is less accurate than Keras, less what chance explains.

    Args:
        right: whether Keras's answers are right, and the file's.
    """
    lost = right[0].astype("float64") - right[1]
    return float(lost.mean() - _SURE * lost.std() / np.sqrt(lost.size))


def _change(output: Output, ours: np.ndarray, theirs: np.ndarray, spread: float) -> float:
    """Returns how far answers and probabilities are from Keras's, 1 where both are at the limit.

    Answers count where Keras prefers them by more than two steps of 8 bits: rounding may decide
    the others.
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
    if not np.isfinite(differences).all():  # NaN decides too, for something
        return float("nan")
    if tolerance.by_agreement:
        return float(np.mean(output.decide(ours) != output.decide(theirs)))
    return float(differences.max())


def _scale(values: np.ndarray) -> np.ndarray:
    """The range of each entry; not below what rounding makes of one that hardly varies."""
    rounding = np.maximum(1e-2 * np.abs(values).max(axis=0), 1e-3 * np.ptp(values))
    scale = np.maximum(np.ptp(values, axis=0), rounding)
    return np.where(scale == 0, 1.0, scale)


def _constant(output: Output, ours: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """What is nearest to the outputs among those that are the same for every example."""
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
    """The scores of both over the labels that are there."""
    if output.kind != "values":
        right = _right(output, ours, theirs, labels)
        return None if right is None else (float(right[0].mean()), float(right[1].mean()))
    errors = _errors(output, ours, theirs, labels)
    return None if errors is None else (float(errors[0].mean()), float(errors[1].mean()))


def _right(
    output: Output, ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Whether the answers of both are right, over the labels that are there."""
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
    if labels.size != answers[0].size:  # class numbers of a plain Keras model that gives logits
        return None
    labels = labels.reshape(answers[0].shape)
    present = np.isfinite(labels) & ((labels >= 0) | (output.kind == "values"))
    if not present.any():
        return None
    return [np.abs(one.astype("float64") - labels)[present] for one in answers]
