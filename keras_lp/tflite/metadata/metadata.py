"""Reads and writes TFLite metadata: labels, thresholds, vocabulary and normalization.

The metadata are a separate flatbuffer in one of the buffers of the model. The associated files are
a zip archive appended to the model. The slots below are those of the public schema
(metadata_schema.fbs, identifier M001) that are used here.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
from flatbuffers.number_types import Float32Flags, UOffsetTFlags
from flatbuffers.table import Table

from keras_lp.tflite.device.device import CHECKSUM
from keras_lp.tflite.flatbuffer import read_model, schema, write_model

_LINE_END = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # where str.splitlines splits
_ENTRY = "TFLITE_METADATA"
_PARSER = "1.0.1"  # the first version of the schema with a vocabulary


class _Model(enum.IntEnum):
    NAME, DESCRIPTION, SUBGRAPHS, PARSER = 0, 1, 3, 7


class _Subgraph(enum.IntEnum):
    INPUTS, OUTPUTS = 2, 3


class _Tensor(enum.IntEnum):
    NAME, DESCRIPTION, CONTENT, UNITS, FILES = 0, 1, 3, 4, 6


class _Content(enum.IntEnum):
    KIND, PROPERTIES = 0, 1


class _Kind(enum.IntEnum):
    FEATURES, IMAGE = 1, 2


class _Image(enum.IntEnum):
    COLORS = 0


class _Colors(enum.IntEnum):
    RGB, GREY = 1, 2


class _Unit(enum.IntEnum):
    KIND, OPTIONS = 0, 1


class _UnitKind(enum.IntEnum):
    NORMALIZATION, CALIBRATION, THRESHOLD = 1, 2, 3


class _Normalization(enum.IntEnum):
    MEAN, STD = 0, 1


class _Calibration(enum.IntEnum):
    TRANSFORMATION, DEFAULT = 0, 1


class _Transformation(enum.IntEnum):
    INVERSE_LOGISTIC = 2


class _Threshold(enum.IntEnum):
    GLOBAL = 0


class _File(enum.IntEnum):
    NAME, DESCRIPTION, KIND = 0, 1, 2


class _FileKind(enum.IntEnum):
    LABELS, CALIBRATION, VOCABULARY = 2, 4, 5


@dataclasses.dataclass(frozen=True)
class TensorMetadata:
    """Metadata of an input or output.

    Attributes:
        name: its name for clients.
        description: its description.
        channels: number of channels of an image, 1 or 3; None for anything else.
        mean: value that a client subtracts from each pixel before it calls the model.
        std: value by which a client then divides each pixel.
        labels: name of the associated file with one label per line, in the order of the last axis.
        vocabulary: name of the associated file with one token per line, in the order of the ids.
        calibration: name of the associated file with the score calibration of each label, see
            `least_scores`.
        least_score: lowest score with which a client shows a label; None shows all labels.
    """

    name: str = ""
    description: str = ""
    channels: int | None = None
    mean: float | None = None
    std: float | None = None
    labels: str = ""
    vocabulary: str = ""
    calibration: str = ""
    least_score: float | None = None


def least_scores(thresholds: Sequence[float]) -> str:
    """Returns the text of a calibration file that only sets scores below thresholds to 0.

    It has one line per label: scale, slope and offset of a sigmoid of the logit of the score (1, 1
    and 0 return the score itself), and the minimum score.
    """
    return "\n".join(f"1,1,0,{float(threshold)!r}" for threshold in thresholds)


def read_least_scores(text: str) -> list[float]:
    """Returns the minimum scores of a calibration file, empty unless every label has one."""
    lines = [line.split(",") for line in text.splitlines()]
    if not all(len(line) == 4 for line in lines):
        return []
    try:
        return [float(line[3]) for line in lines]
    except ValueError:
        return []


def write_metadata(
    content: bytes,
    name: str,
    description: str,
    inputs: list[TensorMetadata],
    outputs: list[TensorMetadata],
    files: dict[str, str],
) -> bytes:
    """Writes metadata into a file, replacing existing metadata; returns the new bytes.

    Args:
        content: the bytes of a file without associated files.
        name: name of the model.
        description: description of the model.
        inputs: metadata of the inputs of the first subgraph, in its order.
        outputs: metadata of the outputs of the first subgraph, in its order.
        files: the texts of the associated files, by name.
    """
    described = {
        _Model.NAME: name,
        _Model.DESCRIPTION: description,
        _Model.SUBGRAPHS: [
            {
                _Subgraph.INPUTS: [_tensor(one) for one in inputs],
                _Subgraph.OUTPUTS: [_tensor(one) for one in outputs],
            }
        ],
        _Model.PARSER: _PARSER,
    }
    builder = flatbuffers.Builder(1024)
    builder.Finish(_write(builder, described), b"M001")
    return with_files(_with_entry(content, bytes(builder.Output())), files)


def with_files(content: bytes, files: Mapping[str, str]) -> bytes:
    """Appends associated files to a file, including a checksum of `content`."""
    packed = io.BytesIO()
    packed.write(content)
    checksum = hashlib.sha256(content).hexdigest()
    with zipfile.ZipFile(packed, "a") as archive:
        for file, text in {**files, CHECKSUM: checksum}.items():
            archive.writestr(zipfile.ZipInfo(file), text)  # no timestamp, for reproducible bytes
    return packed.getvalue()


def read_metadata(content: bytes) -> tuple[list[TensorMetadata], list[TensorMetadata]]:
    """Returns the metadata of the inputs and the outputs; two empty lists without metadata."""
    model = schema.Model.GetRootAs(content, 0)
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        if entry.Name() == _ENTRY.encode():
            data = bytearray(model.Buffers(entry.Buffer()).DataAsNumpy())
            root = Table(data, flatbuffers.encode.Get(UOffsetTFlags.packer_type, data, 0))
            graph = next(iter(_tables(root, _Model.SUBGRAPHS)), None)
            if graph is not None:
                inputs, outputs = (
                    [_read_tensor(one) for one in _tables(graph, side)]
                    for side in (_Subgraph.INPUTS, _Subgraph.OUTPUTS)
                )
                return inputs, outputs
    return [], []


def label_files(name: str, labels: Sequence[str]) -> dict[str, str]:
    """Returns the label files: one label per line, as clients show them.

    Line breaks in labels are escaped. If a label has a line break, or the last one is empty (which
    many readers drop), a second file stores the labels as JSON.
    """
    lines = [on_one_line(label) for label in labels]
    files = {name: "\n".join(lines)}
    if lines != list(labels) or not lines[-1]:
        files[_exact(name)] = json.dumps(list(labels))
    return files


def on_one_line(text: str) -> str:
    """Escapes all Unicode line breaks in a text, for example as `\\n`."""
    return _LINE_END.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def read_labels(files: Mapping[str, str], name: str) -> list[str]:
    """Returns the labels of a label file, empty if it does not exist."""
    if _exact(name) in files:
        return json.loads(files[_exact(name)])
    return files[name].split("\n") if name in files else []


def _exact(name: str) -> str:
    return f"{name.removesuffix('.txt')}.json"


def associated_files(content: bytes) -> dict[str, str]:
    """Returns the texts of the associated files of a model, by name."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if name != CHECKSUM]
        return {name: archive.read(name).decode(errors="replace") for name in names}


def _tensor(one: TensorMetadata) -> dict[int, Any]:
    table: dict[int, Any] = {_Tensor.NAME: one.name}
    if one.description:
        table[_Tensor.DESCRIPTION] = one.description
    if one.channels is None:
        table[_Tensor.CONTENT] = {_Content.KIND: _Kind.FEATURES, _Content.PROPERTIES: {}}
    else:
        colors = _Colors.RGB if one.channels == 3 else _Colors.GREY
        table[_Tensor.CONTENT] = {
            _Content.KIND: _Kind.IMAGE,
            _Content.PROPERTIES: {_Image.COLORS: colors},
        }
    units: dict[int, dict[int, Any]] = {}
    if one.mean is not None:
        units[_UnitKind.NORMALIZATION] = {
            _Normalization.MEAN: np.array([one.mean], "float32"),
            _Normalization.STD: np.array([one.std], "float32"),
        }
    if one.calibration:  # scores below the minimum become 0, the default
        units[_UnitKind.CALIBRATION] = {
            _Calibration.TRANSFORMATION: _Transformation.INVERSE_LOGISTIC
        }
    if one.least_score is not None:
        units[_UnitKind.THRESHOLD] = {_Threshold.GLOBAL: float(one.least_score)}
    if units:
        table[_Tensor.UNITS] = [
            {_Unit.KIND: kind, _Unit.OPTIONS: options} for kind, options in units.items()
        ]
    files = [
        (one.labels, _FileKind.LABELS),
        (one.calibration, _FileKind.CALIBRATION),
        (one.vocabulary, _FileKind.VOCABULARY),
    ]
    listed = [{_File.NAME: name, _File.KIND: kind} for name, kind in files if name]
    return table | ({_Tensor.FILES: listed} if listed else {})


def _write(builder: flatbuffers.Builder, value: Any) -> int:
    """Writes a string, an array, a list or a table (a dict by slot); returns its offset."""
    if isinstance(value, str):
        return builder.CreateString(value)
    if isinstance(value, np.ndarray):
        return builder.CreateNumpyVector(value)
    if isinstance(value, list):
        items = [_write(builder, item) for item in value]
        builder.StartVector(4, len(items), 4)
        for offset in reversed(items):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()
    # A table comes after the objects that it refers to. All integers here are one-byte enums.
    numbers = {slot: item for slot, item in value.items() if isinstance(item, (int, float))}
    offsets = {slot: _write(builder, value[slot]) for slot in value if slot not in numbers}
    builder.StartObject(max(value, default=-1) + 1)
    for slot, offset in offsets.items():
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    for slot, number in numbers.items():
        if isinstance(number, float):
            builder.PrependFloat32Slot(slot, number, 0.0)
        else:
            builder.PrependUint8Slot(slot, number, 0)
    return builder.EndObject()


def _with_entry(content: bytes, metadata: bytes) -> bytes:
    model = read_model(content)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(metadata, "uint8")
    entry = schema.MetadataT()
    entry.name, entry.buffer = _ENTRY, len(model.buffers)
    model.buffers.append(buffer)
    others = [one for one in model.metadata or [] if one.name not in (_ENTRY, _ENTRY.encode())]
    model.metadata = [*others, entry]
    return write_model(model)


def _read_tensor(table: Table) -> TensorMetadata:
    files = {_number(one, _File.KIND): _text(one, _File.NAME) for one in _files(table)}
    content = next(iter(_tables(table, _Tensor.CONTENT, many=False)), None)
    channels = mean = std = least = None
    if content is not None and _number(content, _Content.KIND) == _Kind.IMAGE:
        (image,) = _tables(content, _Content.PROPERTIES, many=False)
        channels = 1 if _number(image, _Image.COLORS) == _Colors.GREY else 3
    for unit in _tables(table, _Tensor.UNITS):
        if _number(unit, _Unit.KIND) == _UnitKind.NORMALIZATION:
            (options,) = _tables(unit, _Unit.OPTIONS, many=False)
            mean, std = (_float(options, s) for s in (_Normalization.MEAN, _Normalization.STD))
        if _number(unit, _Unit.KIND) == _UnitKind.THRESHOLD:
            (options,) = _tables(unit, _Unit.OPTIONS, many=False)
            place = _at(options, _Threshold.GLOBAL)
            least = options.Get(Float32Flags, place) if place else 0.0
    return TensorMetadata(
        _text(table, _Tensor.NAME),
        _text(table, _Tensor.DESCRIPTION),
        channels,
        mean,
        std,
        files.get(_FileKind.LABELS, ""),
        files.get(_FileKind.VOCABULARY, ""),
        files.get(_FileKind.CALIBRATION, ""),
        least,
    )


def _files(table: Table) -> list[Table]:
    return _tables(table, _Tensor.FILES)


def _at(table: Table, slot: int) -> int:
    """Returns the position of the field in a slot, 0 if the field is absent."""
    offset = table.Offset(4 + 2 * slot)  # 4 bytes precede the list of fields of a table
    return offset and table.Pos + offset


def _tables(table: Table, slot: int, many: bool = True) -> list[Table]:
    if not (place := _at(table, slot)):
        return []
    if not many:
        return [Table(table.Bytes, table.Indirect(place))]
    start = table.Vector(place - table.Pos)
    count = table.VectorLen(place - table.Pos)
    return [Table(table.Bytes, table.Indirect(start + 4 * i)) for i in range(count)]


def _text(table: Table, slot: int) -> str:
    place = _at(table, slot)
    return table.String(place).decode() if place else ""


def _number(table: Table, slot: int) -> int:
    place = _at(table, slot)
    return table.Bytes[place] if place else 0


def _float(table: Table, slot: int) -> float:
    place = _at(table, slot)
    return table.Get(Float32Flags, table.Vector(place - table.Pos))
