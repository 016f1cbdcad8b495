"""Exports a model to a `.tflite` file and compares the file with Keras."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any, Literal, get_args

import keras

from keras_lp.tasks.task import is_number
from keras_lp.tflite.contents import read_contents, write_whole
from keras_lp.tflite.export.convert import convert
from keras_lp.tflite.export.copies import compute_types, float32_copy, without_loops
from keras_lp.tflite.export.examples import GENERATED, Examples, generate_examples, read_examples
from keras_lp.tflite.export.report import ExportReport
from keras_lp.tflite.export.verify import Comparison, Tolerance, compare, latency, load
from keras_lp.tflite.interface import Interface, describe
from keras_lp.tflite.metadata.annotate import TFLiteMetadata, annotate
from keras_lp.utils.arguments import Verbose, check_choice, check_positive
from keras_lp.utils.files import check_archive

Quantization = Literal["dynamic", "float16", "int8"]

_CALIBRATE_ON, _VERIFY_ON = 300, 1000  # calibration examples at most


def export_tflite(
    model: keras.Model | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    quantization: Quantization | None = None,
    calibration_data: Any = None,
    batch_size: int = 1,
    metadata: bool | TFLiteMetadata = True,
    verify: bool = True,
    verification_data: Any = None,
    tolerance: float | None = None,
    verbose: Verbose = "auto",
) -> ExportReport:
    """Exports a model to a `.tflite` file that any LiteRT runtime can run.

    Classification and MultiLabel outputs are probabilities (softmax and sigmoid), Regression
    outputs are values in the units of the labels. A model that keras_lp did not build is exported
    as it is. The signature uses the input and output names of the model, and `input` for an
    unnamed input. With every quantization, inputs and outputs keep the dtypes of the model (for
    example float32 images). A mixed-precision model is exported from a float32 copy. Adapters of
    `lp.LoRA` are merged into the weights.

    Before the file is written to `path`, it is run in LiteRT and compared with Keras. It must stay
    within these limits:

    - Without quantization, the largest difference is at most 1e-4. Differences of probabilities
      are absolute, differences of values are relative to the range of the values in the examples.
    - With quantization and labels in `verification_data`, the file is at most one percentage point
      less accurate than Keras, beyond what chance explains for this number of examples (one-sided
      test, 5 %).
    - With quantization and no labels, at least 0.9 of the answers agree. An answer is the most
      probable class, or for MultiLabel whether an entry is above its threshold. Answers that Keras
      prefers by two 8-bit steps or less do not count. The largest difference of the probabilities
      of an example is at most 0.15 on average (`"float16"`: 1e-2).
    - Quantized values differ by at most 0.05 of their range on average (`"float16"`: the largest
      difference is at most 1e-2 of the range).

    An output that hardly varies over the examples is reported as "cannot be verified", because a
    file with constant output would pass too.

    Args:
        model: a built Keras model, or the path of a `.keras` file.
        path: path of the file to write.
        quantization: None keeps float32. `"float16"` halves the file size. `"dynamic"` stores
            weights in 8 bits (a quarter of the size). `"int8"` also computes in 8 bits; on the
            calibration data, outlier activations are clipped, biases are corrected (Nagel et al.,
            2019, arXiv:1906.04721) and an affine correction is added to the heads. Defaults to
            None.
        calibration_data: for `"int8"`, examples like those on the phone, of which at most 300 are
            used: inputs, `(inputs, labels)` or a batched `tf.data.Dataset`. Defaults to None.
        batch_size: number of examples per call of the file. Defaults to 1.
        metadata: True writes class names, label thresholds and pixel normalization as TFLite
            metadata (required by MediaPipe). `lp.TFLiteMetadata` adds a vocabulary and more. False
            writes no metadata. Defaults to True.
        verify: whether to run the file and compare it with Keras. Defaults to True.
        verification_data: examples for the comparison, in the formats of `calibration_data`. With
            labels, the report includes the accuracy of both. Defaults to None: at most 1,000
            examples of the calibration data, else generated inputs. The report names the source.
        tolerance: the largest allowed difference, or for `"dynamic"` and `"int8"` the lowest
            allowed agreement over all answers. Replaces the limits above. Defaults to None.
        verbose: `"auto"` shows a progress bar of the calibration in a terminal or notebook; 1
            does, and prints lines elsewhere; 2 prints lines; 0 is silent. Defaults to `"auto"`.

    Returns:
        An `ExportReport`, which can be printed.

    Raises:
        ValueError: the file differs too much from Keras, the model uses an operation that is not
            builtin in LiteRT, is not built or has inputs of unknown size, the data do not fit the
            model, or `path` is a folder. No file is written; an existing file is kept.
        TypeError: `model` is not a Keras model.
        ImportError: `ai-edge-litert` is not installed. With `verify=False` only int8 needs it.

    Example:

    >>> import numpy as np, keras, keras_lp as lp
    >>> backbone = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu")])
    >>> model = lp.transfer_model(backbone, ["small", "large"])
    >>> x = np.random.default_rng(0).normal(size=(100, 4)).astype("float32")
    >>> history = lp.fit_head(model, (x, x.sum(1) > 0), verbose=0)
    >>> report = lp.export_tflite(model, "sums.tflite", quantization="int8", calibration_data=x)
    >>> report.outputs
    {'predictions': (1, 2)}
    >>> report.top1_agreement > 0.9
    True
    """
    check_choice("quantization", quantization, [None, *get_args(Quantization)])
    check_positive("batch_size", batch_size, integer=True)
    _check_options(quantization, calibration_data, metadata, verify, verification_data, tolerance)
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"`path` must be a file to write. Received: the folder {path}.")
    described = describe(_loaded(model))
    types = tuple(sorted(compute_types(described.model)))
    if types:
        described = describe(float32_copy(described.model))
    calibration = _read(described, calibration_data, "calibration_data")
    examples = _read(described, verification_data, "verification_data") or calibration
    content = _converted(described, quantization, calibration, batch_size, verbose)
    if metadata:
        options = metadata if isinstance(metadata, TFLiteMetadata) else TFLiteMetadata()
        content = annotate(content, described, options)
    report = ExportReport(str(path), quantization, read_contents(content), types)
    if verify:
        examples = examples or generate_examples(described)
        if examples is calibration:
            examples = examples.thinned(_VERIFY_ON)
        allowed = Tolerance.of(quantization, tolerance)
        report = _verified(report, content, described, examples, batch_size, allowed)
    write_whole(path, content)
    return report


def _check_options(
    quantization: str | None,
    calibration_data: Any,
    metadata: Any,
    verify: bool,
    verification_data: Any,
    tolerance: Any,
) -> None:
    if (quantization == "int8") != (calibration_data is not None):
        raise ValueError(
            '`calibration_data` must be passed with quantization="int8", and only then. '
            f"Received: quantization={quantization!r} "
            f"{'without' if calibration_data is None else 'with'} calibration_data. For int8, pass "
            "a few hundred training examples. To compare on examples, pass `verification_data`."
        )
    if not isinstance(metadata, (bool, TFLiteMetadata)):
        raise TypeError(
            f"`metadata` must be True, False or lp.TFLiteMetadata. Received: metadata={metadata!r}."
        )
    if not verify and (verification_data is not None or tolerance is not None):
        raise ValueError(
            "`verification_data` and `tolerance` require verify=True. Received: verify=False."
        )
    if tolerance is not None and (not is_number(tolerance) or not 0 <= tolerance <= 1):
        raise ValueError(
            "`tolerance` must be a number from 0 to 1: the largest difference, or for "
            f'"dynamic" and "int8" the lowest agreement. Received: tolerance={tolerance!r}.'
        )


def _loaded(model: Any) -> keras.Model:
    if not isinstance(model, (str, os.PathLike)):
        return model
    path = Path(model).expanduser()
    if not path.is_file() or not zipfile.is_zipfile(path):
        state = "which is not one" if path.exists() else "which does not exist"
        raise ValueError(
            f"The path of a model must be a `.keras` file. Received: {str(path)!r}, {state}. "
            "Write one with `model.save('model.keras')`."
        )
    check_archive(path)
    return keras.saving.load_model(path, compile=False)


def _read(described: Interface, data: Any, argument: str) -> Examples | None:
    return None if data is None else read_examples(described, data, argument)


def _converted(
    described: Interface,
    quantization: str | None,
    calibration: Examples | None,
    batch_size: int,
    verbose: Verbose,
) -> bytes:
    if calibration is None:
        return convert(described, quantization, batch_size=batch_size)
    described = dataclasses.replace(described, model=without_loops(described.model))
    inputs = calibration.thinned(_CALIBRATE_ON).inputs
    return convert(described, quantization, inputs, batch_size, verbose)


def _verified(
    report: ExportReport,
    content: bytes,
    described: Interface,
    examples: Examples,
    batch_size: int,
    allowed: Tolerance,
) -> ExportReport:
    """Returns the report with the comparisons, or raises if one exceeds the tolerance."""
    run = load(content, described.input_names)
    comparisons = compare(described, run, examples, batch_size, allowed)
    for name, one in comparisons.items():
        if not one.error <= one.allowed:  # also raises for NaN
            remedy = "Try another quantization, or allow more with `tolerance`."
            if examples.source == GENERATED:
                remedy = f"Pass real examples as `verification_data`. {remedy}"
            raise ValueError(
                f"A {report.quantization or 'float32'} file must {_rule(one, allowed)}. "
                f"Received: model {described.model.name!r}, output {name!r}, {one.describe()}, on "
                f"{examples.source}. {remedy}"
            )
    return dataclasses.replace(
        report,
        verified_on=examples.source,
        examples=len(examples),
        comparisons=comparisons,
        latency=latency(run, examples.inputs, batch_size),
    )


def _rule(one: Comparison, allowed: Tolerance) -> str:
    if one.kind == "values":
        mean = " on average" if allowed.by_agreement else ""
        share = f"{allowed.limit:g} of the range of the values"
        return f"differ from Keras by at most {share}{mean} (here {one.error:.2g})"
    if allowed.spread is not None and one.scores is not None:
        return "be at most 1 point less accurate than Keras, beyond what chance explains"
    if allowed.spread is not None:
        return (
            "agree with Keras on at least 0.9 of the answers that are not nearly tied, and its "
            f"probabilities must differ by at most {allowed.spread:g} on average"
        )
    if allowed.by_agreement:
        return f"agree with Keras on at least {1 - allowed.limit:.4g} of the answers"
    return f"differ from Keras by at most {allowed.limit:g}"
