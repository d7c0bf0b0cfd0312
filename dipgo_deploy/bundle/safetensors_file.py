"""Safetensors files as numpy arrays, without torch. Sizes are checked before anything of that size is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy import documents

# Far above what trainers write: some thousands of tensors, and metadata of a few MiB.
HEADER_BYTES = 16 * 2**20
TENSORS = 20_000
NAME_LENGTH = 512
_CHUNK_ITEMS = 2**22


def _float8_e4m3() -> np.ndarray:
    """Values of all 256 bytes: four bits of exponent, three of fraction, no infinity, NaN where all seven are set."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    size[bits & 127 == 127] = np.nan
    return np.where(bits & 128, -size, size).astype(np.float32)


_E4M3 = _float8_e4m3()
# How each type is stored, and what makes numbers of it where numpy has no such type.
_TYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "I64": "<i8",
        "I32": "<i4",
        "BF16": "<u2",
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
    }.items()
}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def _numbers(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return _E4M3[stored]
    if dtype == "F8_E5M2":  # the upper byte of a float16
        return (stored.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    return stored


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of an open file: what its header says, and its values when they are asked for.

    dtype: safetensors' name, such as ``BF16``. offset: of its first byte in the file.
    """

    file: TensorFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def items(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype in _FLOATS

    def read(self) -> np.ndarray:
        """All values in their own dtype; bfloat16 and the float8 types, which numpy lacks, as float32.

        Raises:
            OSError: the file cannot be read, or was cut since it was opened.
            ValueError: a type that is not known here.
        """
        return self._read(0, self.items).reshape(self.shape)

    def chunks(self) -> Iterator[np.ndarray]:
        """All values in order as ``read`` gives them, flat, at most 4 million at a time."""
        for first in range(0, self.items, _CHUNK_ITEMS):
            yield self._read(first, min(_CHUNK_ITEMS, self.items - first))

    def _read(self, first: int, count: int) -> np.ndarray:
        if self.dtype not in _TYPES:
            raise ValueError(f"{self.name} has type {self.dtype}")
        kind = _TYPES[self.dtype]
        stored = self.file.read_at(self.offset + first * kind.itemsize, count * kind.itemsize).view(kind)
        return _numbers(stored, self.dtype)


class TensorFile:
    """An open safetensors file; only its header is in memory. It stays the same file if another takes its name.

    tensors: by name, in the file's order. metadata: the header's own texts.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            OSError: the file cannot be read.
            ValueError: not a safetensors file, or one with a header above the limits of this module.
        """
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        header, start = self._header()
        self.metadata: Mapping[str, str] = header.pop("__metadata__", None) or {}
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(self, name, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for name, entry in header.items()
        }

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def _header(self) -> tuple[dict[str, Any], int]:
        """The header, which the safetensors package has checked, and the offset of the first byte after it."""
        import safetensors

        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > size - 8:
            raise ValueError("not a safetensors file, or cut short")
        if length > HEADER_BYTES:
            raise ValueError(f"its header takes {length} bytes, more than {HEADER_BYTES}")
        try:
            with safetensors.safe_open(str(self.path), framework="numpy"):
                pass  # types, shapes and offsets agree with each other and with the file's length
            header = documents.parse(self.read_at(8, length).tobytes())
        except safetensors.SafetensorError as error:
            raise ValueError(f"not a safetensors file ({str(error)[:200]})") from None
        if len(header) > TENSORS:
            raise ValueError(f"it holds {len(header)} tensors, more than {TENSORS}")
        for name in header:
            if len(name) > NAME_LENGTH or not name.isprintable():
                raise ValueError(f"a tensor's name is not a name ({name[:40]!a}...)")
        return header, 8 + length

    def read_at(self, offset: int, size: int) -> np.ndarray:
        """Bytes of the file.

        Raises:
            OSError: they are not there.
        """
        buffer = np.empty(size, np.uint8)
        done = 0
        while done < size:
            got = os.preadv(self._descriptor, [buffer[done:].data], offset + done)
            if not got:
                raise OSError(f"{self.path}: was cut while it was read")
            done += got
        return buffer
