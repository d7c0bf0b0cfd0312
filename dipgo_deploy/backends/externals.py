"""Which tensors of an ONNX file live in which external data file: read without the onnx package.

Only the few protobuf fields that name external initializers are decoded (ModelProto.graph, GraphProto.initializer,
TensorProto dims/data_type/name/external_data); everything else is skipped over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dipgo_deploy.errors import UserError

_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_TENSOR_DIMS, _TENSOR_DTYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer outside the ONNX file: ``dtype`` is ONNX's number, offset and length are bytes of ``file``."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int


def external_tensors(path: Path) -> tuple[ExternalTensor, ...]:
    """The external initializers of the main graph of an ONNX file.

    Raises:
        UserError: the file is cut short or not an ONNX model, or a tensor lies outside the file's own folder.
    """
    try:
        model = memoryview(path.read_bytes())
        return tuple(
            tensor
            for field, graph in _fields(model)
            if field == _MODEL_GRAPH and isinstance(graph, memoryview)
            for number, message in _fields(graph)
            if number == _GRAPH_INITIALIZER and isinstance(message, memoryview)
            if (tensor := _tensor(message, path)) is not None
        )
    except (IndexError, ValueError) as error:
        raise UserError(f"{path}: not a whole ONNX file ({error}); export the engine directory again") from None


def _tensor(message: memoryview, path: Path) -> ExternalTensor | None:
    dims: list[int] = []
    dtype, name, entries = 0, "", {}
    for field, value in _fields(message):
        if field == _TENSOR_DIMS:
            dims.extend([value] if isinstance(value, int) else _varints(value))
        elif field == _TENSOR_DTYPE and isinstance(value, int):
            dtype = value
        elif field == _TENSOR_NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif field == _TENSOR_EXTERNAL and isinstance(value, memoryview):
            pair = {number: str(text, "utf-8") for number, text in _fields(value) if isinstance(text, memoryview)}
            entries[pair.get(1, "")] = pair.get(2, "")
    if "location" not in entries:
        return None
    # By the document's own words: links in a folder are somebody's own doing, a path out of it is not.
    location = PurePosixPath(entries["location"])
    if location.is_absolute() or ".." in location.parts:
        raise UserError(f"{path}: tensor {name} lies outside its folder ({location}); do not use this directory")
    return ExternalTensor(
        name=name,
        dtype=dtype,
        shape=tuple(dims),
        file=path.parent / location,
        offset=int(entries.get("offset", "0")),
        length=int(entries.get("length", "0")),
    )


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number longer than 64 bits")


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protobuf message; fixed-width fields come as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[at : at + size]
        at += size
