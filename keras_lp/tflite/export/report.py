"""What an export tells."""

from __future__ import annotations

import dataclasses
import math

from keras_lp.tflite.contents import Contents
from keras_lp.tflite.export.verify import Comparison
from keras_lp.utils.text_table import ShownAsText


@dataclasses.dataclass(frozen=True, repr=False)
class ExportReport(ShownAsText):
    """What `lp.export_tflite` wrote, and how it compares with Keras. Print it.

    Attributes:
        path: the file.
        quantization: None, `"dynamic"`, `"float16"` or `"int8"`.
        contents: inputs, outputs, labels, signatures and operations of the file.
        copied_from: the types in which the model computes, where the file was made from a float32
            copy of it, which is also what it was compared with; else none.
        verified_on: `"verification_data"`, `"calibration_data"` or `"generated inputs"`; None
            where nothing was verified.
        examples: how many of them.
        comparisons: by output: largest difference, agreement, scores, whether it varies.
        latency: median and p95 of a call in LiteRT in milliseconds, one thread; None where the
            file was not run.
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
        """Bytes of the file."""
        return self.contents.size

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the outputs by their names in the signature."""
        _, tensors = next(iter(self.contents.signatures.values()))
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        return {name: shapes[name] for name in self.comparisons or shapes}

    @property
    def max_difference(self) -> float | None:
        """Largest absolute difference of any output between LiteRT and Keras."""
        found = [one.difference for one in self.comparisons.values()]
        if any(math.isnan(difference) for difference in found):
            return math.nan
        return max(found, default=None)

    @property
    def top1_agreement(self) -> float | None:
        """Share of the examples with the same most probable class, the least over the outputs."""
        each = (one.agreement for one in self.comparisons.values() if one.kind == "classes")
        found = [agreement for agreement in each if agreement is not None]
        return min(found, default=None)

    @property
    def outputs_vary(self) -> bool:
        """Whether every output varies so much that the comparison proves something."""
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
