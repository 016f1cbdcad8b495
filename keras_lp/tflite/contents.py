"""The contents of a `.tflite` file, as printed by `python -m keras_lp.tflite inspect FILE`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from pathlib import Path

from keras_lp.tflite.device.device import check_whole
from keras_lp.tflite.flatbuffer import schema
from keras_lp.tflite.metadata.metadata import (
    TensorMetadata,
    associated_files,
    on_one_line,
    read_labels,
    read_least_scores,
    read_metadata,
)
from keras_lp.utils.files import whole_file
from keras_lp.utils.text_table import text_table

_SHOWN = 12  # number of labels shown


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output: its name in the signature, dtype, shape and metadata."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    metadata: TensorMetadata

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a file.

    Attributes:
        size: size of the file in bytes.
        inputs: the inputs of the first subgraph, in its order.
        outputs: the outputs of the first subgraph, in its order.
        signatures: the inputs and the outputs of each signature, by name.
        operations: the count of each operation over all subgraphs.
        int8_operations: number of operations with 8-bit output, without conversions.
        subgraphs: number of subgraphs.
        files: the texts of the associated files (labels, thresholds, vocabulary), by name.
    """

    size: int
    inputs: list[Tensor]
    outputs: list[Tensor]
    signatures: dict[str, tuple[list[Tensor], list[Tensor]]]
    operations: dict[str, int]
    int8_operations: int
    subgraphs: int
    files: dict[str, str]

    def __str__(self) -> str:
        calls = [
            f"{name}({self._listed(takes)}) -> {self._listed(gives)}"
            for name, (takes, gives) in self.signatures.items()
        ]
        counts = [[name, str(count)] for name, count in self.operations.items()]
        parts = {
            "inputs": _table([self._row(tensor) for tensor in self.inputs]),
            "outputs": _table([self._row(tensor) for tensor in self.outputs]),
            "signatures": "\n".join(calls) or "none",
            f"operations, {self.subgraphs} subgraph{'s' if self.subgraphs > 1 else ''}": (
                _table(counts)
            ),
            "files": "\n".join(
                f"{name}, {text.count(chr(10)) + 1:,} lines" for name, text in self.files.items()
            )
            or "none",
        }
        lines = [f"size: {self.size / 1024:,.1f} KiB"]
        for title, body in parts.items():
            lines += [f"{title}:", *(f"  {line}" for line in body.splitlines())]
        return "\n".join(lines)

    def labels(self, tensor: Tensor) -> list[str]:
        """Returns the labels of an output; empty if the file has none."""
        return read_labels(self.files, tensor.metadata.labels)

    def thresholds(self, tensor: Tensor) -> list[float]:
        """Returns the thresholds of the labels of an output; empty if the file has none."""
        return read_least_scores(self.files.get(tensor.metadata.calibration, ""))

    def _listed(self, tensors: list[Tensor]) -> str:
        """Lists names, with types if there are several signatures."""
        alone = len(self.signatures) == 1
        return ", ".join(one.name if alone else f"{one.name} {one}" for one in tensors)

    def _row(self, tensor: Tensor) -> list[str]:
        notes = []
        if tensor.metadata.mean is not None:
            mean, std = tensor.metadata.mean, tensor.metadata.std
            notes.append(f"(pixel - {mean:g}) / {std:g}")
        if labels := self.labels(tensor):
            more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
            thresholds = self.thresholds(tensor)
            if len(thresholds) == len(labels):
                labels = [f"{a} > {b:.3g}" for a, b in zip(labels, thresholds, strict=True)]
            notes.append(f"labels {on_one_line(', '.join(labels[:_SHOWN]))}{more}")
        if tensor.metadata.vocabulary:
            notes.append(f"vocabulary in {tensor.metadata.vocabulary}")
        return [tensor.name, str(tensor), "; ".join(notes)]


def _table(rows: list[list[str]]) -> str:
    return text_table(rows, left=len(rows[0])) if rows else "none"


def read_contents(content: bytes) -> Contents:
    """Reads the bytes of a file.

    Raises:
        ValueError: the bytes are not a `.tflite` file.
    """
    model = _parsed(content)
    graph = model.Subgraphs(0)
    signatures, names = {}, {}
    for one in (model.SignatureDefs(i) for i in range(model.SignatureDefsLength())):
        takes = [one.Inputs(i) for i in range(one.InputsLength())]
        gives = [one.Outputs(i) for i in range(one.OutputsLength())]
        of = model.Subgraphs(one.SubgraphIndex())
        inputs, outputs = (
            [_tensor(of, entry.TensorIndex(), entry.Name().decode()) for entry in entries]
            for entries in (takes, gives)
        )
        signatures[one.SignatureKey().decode()] = inputs, outputs
        if one.SubgraphIndex() == 0:
            names = {entry.TensorIndex(): entry.Name().decode() for entry in takes + gives}
    indices = (
        [graph.Inputs(i) for i in range(graph.InputsLength())],
        [graph.Outputs(i) for i in range(graph.OutputsLength())],
    )
    inputs, outputs = (
        [
            _tensor(graph, index, names.get(index), metadata)
            for index, metadata in itertools.zip_longest(side, about[: len(side)])
        ]
        for side, about in zip(indices, read_metadata(content), strict=True)
    )
    operations = _operations(model)
    return Contents(
        len(content),
        inputs,
        outputs,
        signatures,
        operations=dict(sorted(Counter(name for name, _ in operations).items())),
        int8_operations=sum(
            given == schema.TensorType.INT8 and name not in ("QUANTIZE", "DEQUANTIZE")
            for name, given in operations
        ),
        subgraphs=model.SubgraphsLength(),
        files=associated_files(content),
    )


def inspect(path: str) -> str:
    """Returns the contents of a file as text."""
    content = Path(path).expanduser().read_bytes()
    check_whole(content, path)
    try:
        return f"{path}\n{read_contents(content)}"
    except Exception as error:  # damaged tables can raise anything
        raise ValueError(
            f"A .tflite file must be complete. Received: {path}, {len(content):,} bytes that are "
            f"truncated or damaged ({error or type(error).__name__}). Copy or export it again."
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file atomically and creates its folder if needed."""
    with whole_file(path) as file:
        file.write(content)


def foreign_operations(content: bytes) -> list[str]:
    """Returns the operations of all subgraphs that are not builtin in LiteRT."""
    builtin = set(_operation_names().values())
    return sorted({name for name, _ in _operations(_parsed(content))} - builtin)


def _parsed(content: bytes) -> schema.Model:
    if not schema.Model.ModelBufferHasIdentifier(content, 0):
        raise ValueError(
            "A .tflite file must have the identifier TFL3 after its first 4 bytes. Received: "
            f"{len(content):,} bytes that start with {content[:8]!r}. Pass a file that "
            "lp.export_tflite wrote."
        )
    return schema.Model.GetRootAs(content, 0)


def _operations(model: schema.Model) -> list[tuple[str, int]]:
    """Returns the name and output type of every operation of every subgraph."""
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    found = []
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        for operator in (graph.Operators(i) for i in range(graph.OperatorsLength())):
            given = graph.Tensors(operator.Outputs(0)).Type() if operator.OutputsLength() else -1
            found.append((_operation_name(codes[operator.OpcodeIndex()]), given))
    return found


def _operation_name(code: schema.OperatorCode) -> str:
    if code.CustomCode():
        return code.CustomCode().decode()
    # Files from before the 128th operation was added have only the older field.
    return _operation_names()[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]


@functools.cache
def _operation_names() -> dict[int, str]:
    return _named(schema.BuiltinOperator)


@functools.cache
def _type_names() -> dict[int, str]:
    return {number: name.lower() for number, name in _named(schema.TensorType).items()}


def _named(enumeration: type) -> dict[int, str]:
    return {number: name for name, number in vars(enumeration).items() if isinstance(number, int)}


def _tensor(
    graph: schema.SubGraph,
    index: int,
    name: str | None,
    metadata: TensorMetadata | None = None,
) -> Tensor:
    tensor = graph.Tensors(index)
    shape = tuple(tensor.Shape(i) for i in range(tensor.ShapeLength()))
    name = name or tensor.Name().decode()
    return Tensor(name, _type_names()[tensor.Type()], shape, metadata or TensorMetadata())
