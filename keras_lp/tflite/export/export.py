"""A trained model as a `.tflite` file that is run and compared with Keras before you get it."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any, Literal, cast, get_args

import keras

from keras_lp.tasks.task import is_number
from keras_lp.tflite.contents import read_contents, write_whole
from keras_lp.tflite.export.convert import compute_types, convert, float32_copy, without_loops
from keras_lp.tflite.export.correction import corrected_heads
from keras_lp.tflite.export.examples import GENERATED, Examples, generate_examples, read_examples
from keras_lp.tflite.export.report import ExportReport
from keras_lp.tflite.export.verify import Comparison, Tolerance, compare, latency, load
from keras_lp.tflite.interface import check_model, input_names
from keras_lp.tflite.metadata.annotate import TFLiteMetadata, annotate
from keras_lp.utils.arguments import check_choice, check_positive
from keras_lp.utils.files import check_archive

Quantization = Literal["dynamic", "float16", "int8"]

_CALIBRATE_ON, _VERIFY_ON = 300, 1000  # of the calibration data at most


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
) -> ExportReport:
    """Writes a model as a `.tflite` file that any LiteRT runtime runs.

    Classification outputs are probabilities (softmax), MultiLabel outputs too (sigmoid), and
    Regression outputs values in the units of the labels; a model that keras_lp did not build is
    exported as it is. The signature names outputs as the model does, and inputs too (`input` where
    they have no name). A model of mixed precision is exported from a float32 copy; adapters of
    `lp.LoRA` are folded in. The file takes and gives what the model does, float32 pictures for
    example, whatever the quantization.

    The file is run in LiteRT and compared with Keras before it is put in place. What is too far
    from Keras is refused and leaves no file:

    - without quantization the largest difference may be 1e-4: of probabilities, or of values as a
      share of their range over the examples;
    - with a quantization and labels in `verification_data`, the file may be at most one point less
      accurate than Keras, beyond what chance explains on so many examples (one-sided, 5 %);
    - without labels 0.9 of the answers must agree (the most probable class, or for MultiLabel
      each entry, above its threshold or not), of those that Keras prefers by more than two steps
      of 8 bits; and the largest difference of an example's probabilities may be 0.15 on the mean,
      with `"float16"` 1e-2;
    - of quantized values the mean difference may be 0.05 of their range, with `"float16"` the
      largest 1e-2.

    An output that hardly varies over the examples is reported as "cannot be verified", as a file
    that always gives the same would pass too.

    Args:
        model: a built Keras model, or the path of a `.keras` file.
        path: where to write.
        quantization: None keeps float32; `"float16"` halves the file; `"dynamic"` stores weights
            in 8 bits, a quarter of the file; `"int8"` computes in 8 bits too. On the calibration
            data the rarest activations are cut off, biases are corrected (Nagel et al., 2019,
            arXiv:1906.04721) and an affine map is fitted into the heads. Defaults to None.
        calibration_data: for `"int8"`, examples like those on the phone, of which 300 are used:
            inputs, `(inputs, labels)` or a batched `tf.data.Dataset`. Defaults to None.
        batch_size: how many examples the file takes at once. Defaults to 1.
        metadata: True writes the names of the classes, the thresholds of labels and what to do
            to a pixel where phone clients look for them (MediaPipe needs them);
            `lp.TFLiteMetadata` adds a vocabulary and more; False writes none. Defaults to True.
        verify: whether to run and compare the file. Defaults to True.
        verification_data: examples to compare on, as `calibration_data`; with labels the report
            has the accuracy of both. Defaults to None: the calibration data (1,000 of them), else
            generated inputs, and the report says so.
        tolerance: the largest difference, or for `"dynamic"` and `"int8"` the least agreement over
            all answers; it replaces the rules above. Defaults to None.

    Returns:
        An `ExportReport`; print it.

    Raises:
        ValueError: a file that is too far from Keras; an operation outside LiteRT's builtin ones;
            a model that is not built or whose inputs have no sizes; data that do not fit it; a
            path that is a folder. No file is left, and one that was there stays.
        TypeError: anything else than a Keras model.
        ImportError: `ai-edge-litert` is not installed; verify=False needs it for int8 only.

    Example:

    ```python
    report = lp.export_tflite(
        model, "xray.tflite", quantization="int8", calibration_data=x, verification_data=val
    )
    print(report)
    ```
    """
    check_choice("quantization", quantization, [None, *get_args(Quantization)])
    check_positive("batch_size", batch_size, integer=True)
    _check_options(quantization, calibration_data, metadata, verify, verification_data, tolerance)
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"`path` must be a file to write. Received: the folder {path}.")
    model = _loaded(model)
    check_model(model)
    types = tuple(sorted(compute_types(model)))
    model = float32_copy(model) if types else model
    calibration = _read(model, calibration_data, "calibration_data")
    examples = _read(model, verification_data, "verification_data") or calibration
    content = _converted(model, quantization, calibration, batch_size)
    if metadata:
        options = metadata if isinstance(metadata, TFLiteMetadata) else TFLiteMetadata()
        content = annotate(content, model, options)
    report = ExportReport(str(path), quantization, read_contents(content), types)
    if verify:
        examples = examples or generate_examples(model)
        if examples is calibration:
            examples = examples.thinned(_VERIFY_ON)
        allowed = Tolerance.of(quantization, tolerance)
        report = _verified(report, content, model, examples, batch_size, allowed)
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
            '`calibration_data` is for quantization="int8", which measures the activations on it. '
            f"Received: quantization={quantization!r} "
            f"{'without' if calibration_data is None else 'with'} calibration_data. Pass some "
            "hundred examples of training for int8; to compare on examples pass "
            "`verification_data`."
        )
    if not isinstance(metadata, (bool, TFLiteMetadata)):
        raise TypeError(
            f"`metadata` must be True, False or lp.TFLiteMetadata. Received: metadata={metadata!r}."
        )
    if not verify and (verification_data is not None or tolerance is not None):
        raise ValueError(
            "`verification_data` and `tolerance` are for verify=True. Received: verify=False."
        )
    if tolerance is not None and (not is_number(tolerance) or not 0 <= tolerance <= 1):
        raise ValueError(
            "`tolerance` must be a number from 0 to 1: the largest difference, or for "
            f'"dynamic" and "int8" the least agreement. Received: tolerance={tolerance!r}.'
        )


def _loaded(model: Any) -> keras.Model:
    if not isinstance(model, (str, os.PathLike)):
        return model
    path = Path(model).expanduser()
    if not path.is_file() or not zipfile.is_zipfile(path):
        state = "which is no such file" if path.exists() else "which does not exist"
        raise ValueError(
            f"A model given by its path must be a `.keras` file. Received: {str(path)!r}, {state}. "
            "Write one with `model.save('model.keras')`."
        )
    check_archive(path)
    return keras.saving.load_model(path, compile=False)


def _read(model: keras.Model, data: Any, argument: str) -> Examples | None:
    return None if data is None else read_examples(model, data, argument)


def _converted(
    model: keras.Model, quantization: str | None, calibration: Examples | None, batch_size: int
) -> bytes:
    if quantization != "int8":
        return convert(model, quantization, batch_size=batch_size)
    inputs = cast(Examples, calibration).thinned(_CALIBRATE_ON).inputs
    model = without_loops(model)
    with corrected_heads(model, inputs, batch_size):
        return convert(model, quantization, inputs, batch_size)


def _verified(
    report: ExportReport,
    content: bytes,
    model: keras.Model,
    examples: Examples,
    batch_size: int,
    allowed: Tolerance,
) -> ExportReport:
    """The report with its comparisons, all of which are within the tolerance."""
    run = load(content, input_names(model))
    comparisons = compare(model, run, examples, batch_size, allowed)
    for name, one in comparisons.items():
        if not one.error <= one.allowed:  # a NaN is outside too
            remedy = "Try another quantization, or allow more with `tolerance`."
            if examples.source == GENERATED:
                remedy = f"Pass examples as `verification_data`: these are generated. {remedy}"
            raise ValueError(
                f"A file ({report.quantization or 'float32'}) must {_rule(one, allowed)}. "
                f"Received: model {model.name!r}, output {name!r}, {one.describe()}, on "
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
        mean = " on the mean" if allowed.by_agreement else ""
        share = f"{allowed.limit:g} of the range of the values"
        return f"differ from Keras by {share} at most{mean} (here {one.error:.2g})"
    if allowed.spread is not None and one.scores is not None:
        return "be at most 1 point less accurate than Keras, beyond what chance explains"
    if allowed.spread is not None:
        return (
            "agree with Keras on 0.9 of the answers that are not nearly tied, with probabilities "
            f"that differ by {allowed.spread:g} at most on the mean"
        )
    if allowed.by_agreement:
        return f"agree with Keras on {1 - allowed.limit:.4g} of the answers"
    return f"differ from Keras by {allowed.limit:g} at most"
