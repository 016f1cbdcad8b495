"""The report of an export."""

from __future__ import annotations

import dataclasses
import math

from keras_lp.tflite.contents import Contents
from keras_lp.tflite.export.verify import Comparison
from keras_lp.utils.text_table import ShownAsText


@dataclasses.dataclass(frozen=True, repr=False)
class ExportReport(ShownAsText):
    """Describes the file that `lp.export_tflite` wrote and compares it with Keras. Can be printed.

    Attributes:
        path: path of the file.
        quantization: None, `"dynamic"`, `"float16"` or `"int8"`.
        contents: inputs, outputs, labels, signatures and operations of the file.
        copied_from: compute dtypes of the model, if the file was converted from a float32 copy
            and compared with that copy; otherwise empty.
        verified_on: `"verification_data"`, `"calibration_data"` or `"generated inputs"`; None if
            the file was not verified.
        examples: number of examples in the comparison.
        comparisons: a `Comparison` per output: largest difference, agreement, scores, and whether
            the output varies.
        latency: median and 95th percentile of the time per call in LiteRT on one thread, in
            milliseconds; None if the file was not run.
    """

    path: str
    quantization: str | None
    contents: Contents
    copied_from: tuple[str, ...] = ()
    verified_on: str | None = None
    examples: int = 0
    comparisons: dict[str, Comparison] = dataclasses.field(default_factory=dict)
    latency: tuple[float, float] | None = None

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.contents.size

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs by their names in the signature."""
        _, tensors = next(iter(self.contents.signatures.values()))
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        return {name: shapes[name] for name in self.comparisons or shapes}

    @property
    def max_difference(self) -> float | None:
        """Largest absolute difference between LiteRT and Keras over all outputs."""
        found = [one.difference for one in self.comparisons.values()]
        if any(math.isnan(difference) for difference in found):
            return math.nan
        return max(found, default=None)

    @property
    def top1_agreement(self) -> float | None:
        """Share of examples with the same most probable class; the lowest over all outputs."""
        each = (one.agreement for one in self.comparisons.values() if one.kind == "classes")
        found = [agreement for agreement in each if agreement is not None]
        return min(found, default=None)

    @property
    def outputs_vary(self) -> bool:
        """Whether every output varies enough for the comparison to be meaningful."""
        return bool(self.comparisons) and all(one.varies for one in self.comparisons.values())

    def __str__(self) -> str:
        batch = self.contents.inputs[0].shape[0]
        outputs = ", ".join(f"{name}{list(shape)}" for name, shape in self.outputs.items())
        kind = self.quantization or "float32"
        if kind == "int8":
            counts = self.contents.operations.items()
            total = sum(n for name, n in counts if name not in ("QUANTIZE", "DEQUANTIZE"))
            kind += f" in {self.contents.int8_operations} of {total} operations"
        lines = [f"{self.path}: {self.size / 1024:,.1f} KiB, {kind}, outputs {outputs}"]
        if self.copied_from:
            lines.append(f"made from a float32 copy: layers compute in {list(self.copied_from)}")
        if self.verified_on is None:
            return "\n".join([*lines, "not verified"])
        lines.append(f"compared with Keras on {self.examples:,} examples of {self.verified_on}:")
        lines += [f"  {name}: {one.describe()}" for name, one in self.comparisons.items()]
        if self.latency is not None:
            median, p95 = self.latency
            lines.append(
                f"a call of {batch} example{'s' if batch > 1 else ''}, one thread: {median:.3g} ms "
                f"(p95 {p95:.3g})"
            )
        return "\n".join(lines)
