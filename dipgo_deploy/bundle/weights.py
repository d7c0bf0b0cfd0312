"""Where each stored weight lies and which parameter of the model it is: an index beside a weights file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic

from dipgo_deploy.bundle.manifest import EXPORT_AGAIN
from dipgo_deploy.bundle.quantized import Quantized
from dipgo_deploy.documents import read_document
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.validation import one_line

WEIGHTS_INDEX = "weights.json"
WEIGHTS_NAME = "weights.bin"
ONNX_TYPES = {
    "float": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "double": 11,
    "bfloat16": 16,
    "float8e4m3fn": 17,
    "int4": 22,
}
"""ONNX's numbers of the types that an index has."""
# Field 8 of a protobuf message, a text of at most 16383 bytes: where a graph has the name of a tensor.
_NAME = re.compile(rb"(?=\x42(?:[\0-\x7f]|[\x80-\xff][\1-\x7f]))")
MAX_INDEX_BYTES = 16 * 2**20


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class StoredWeight(_Frozen):
    """One tensor of a weights file. ``shape`` is as stored; ``dtype`` is ONNX's name in lower case."""

    parameter: str | None = pydantic.Field(description="the parameter whose values it holds; None for other constants")
    transposed: bool = pydantic.Field(default=False, description="the parameter (rows, columns) is stored as its .T")
    equal: tuple[str, ...] = pydantic.Field(
        default=(), description="parameters of equal value that the export keeps in this tensor too"
    )
    rows: tuple[int, int, int] | None = pydantic.Field(
        default=None, description="it holds only rows [first, last) of the parameter's, as (first, last, all)"
    )
    quantized: Quantized | None = pydantic.Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="it holds numbers in fewer bits, and this makes the parameter's values of them",
    )
    shape: tuple[int, ...]
    dtype: str
    offset: int
    length: int

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return shape if self.rows is None else (self.rows[2], *shape[1:])


class WeightsIndex(_Frozen):
    """``weights.json``: the tensors of the ``weights.bin`` beside it, by the name they have in the graphs."""

    format_version: Literal[1] = 1
    tensors: dict[str, StoredWeight]
    tabled: tuple[str, ...] = pydantic.Field(
        default=(),
        exclude_if=lambda value: not value,
        description="parameters that no graph holds: tables of timesteps were made of them",
    )

    @classmethod
    def load(cls, folder: Path) -> WeightsIndex:
        """Read the index of a folder of graphs.

        Raises:
            UserError: there is none (an older export), or it is not one.
        """
        path = folder / WEIGHTS_INDEX
        if not path.is_file():
            raise UserError(
                f"{path}: missing, so it is not known how this directory stores its weights;"
                " export the engine directory again"
            )
        data = read_document(path, "index of weights", EXPORT_AGAIN, limit=MAX_INDEX_BYTES)
        try:
            return cls.model_validate(data)
        except pydantic.ValidationError as error:
            raise UserError(f"{path}: not an index of weights ({one_line(error)}); {EXPORT_AGAIN}") from None


def holds_type(folder: Path, dtype: str) -> bool:
    """Whether a weight of a folder of graphs is of this type (ONNX's name); by the index's text, which is quick."""
    path = folder / WEIGHTS_INDEX
    return path.is_file() and f'"{dtype}"' in path.read_text(encoding="utf-8", errors="replace")


def weights_of(graph: Path, index: WeightsIndex | None = None) -> Mapping[str, StoredWeight]:
    """The weights that a graph takes from the weights file beside it, in the graph's order.

    Args:
        graph: an ONNX file.
        index: of its folder; None reads it.

    Raises:
        UserError: the graph or the index cannot be read.
    """
    tensors = (index or WeightsIndex.load(graph.parent)).tensors
    try:
        data = graph.read_bytes()
    except OSError as error:
        raise UserError(f"{graph}: cannot be read ({error.strerror}); export the engine directory again") from None
    names = {name.encode(): name for name in tensors}
    longest = max(map(len, names), default=0)
    found = {}
    for match in _NAME.finditer(data):
        at = match.start() + 1
        size = data[at]
        if size > 0x7F:
            size += (data[at + 1] - 1) << 7
            at += 1
        if size <= longest and (name := names.get(data[at + 1 : at + 1 + size])) is not None:
            found[name] = tensors[name]
    return found


def different_weight(folder: Path, other: Path) -> str | None:
    """The first parameter that two folders of graphs have under one name with different values; None where there is
    none. Other constants may depend on the timesteps.

    Raises:
        UserError: an index cannot be read.
    """
    indices = WeightsIndex.load(folder).tensors, WeightsIndex.load(other).tensors
    mapped = [np.memmap(one / WEIGHTS_NAME, mode="r") for one in (folder, other)]
    for name in sorted(indices[0].keys() & indices[1].keys()):
        if indices[0][name].parameter is None:
            continue
        first, second = (
            file[index[name].offset :][: index[name].length] for file, index in zip(mapped, indices, strict=True)
        )
        if not np.array_equal(first, second):
            return name
    return None
