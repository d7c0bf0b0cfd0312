"""Safetensors files made and changed by hand, and read by the letter of their format."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from tools.campaign.kinds.schedules import strict_json
from tools.campaign.mutate import Changed, change_bytes, change_json

_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64}


def parts(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> tuple[dict[str, Any], bytes]:
    """Header and data of float32 or float16 tensors."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        dtype = {"float32": "F32", "float16": "F16", "int64": "I64"}[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def assemble(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """The file; ``length``: what it says of its header's, if not the truth."""
    return struct.pack("<Q", (len(header) if length is None else length) % 2**64) + header + data


def change(header: Mapping[str, Any], data: bytes, random: np.random.Generator) -> Changed:
    """One change: of the header (most), of the length it says, or of any bytes."""
    plain = json.dumps(header).encode()
    dice = random.random()
    if dice < 0.7:
        label, text = change_json(dict(header), random, bytes_share=0.1)
        return f"header: {label}", assemble(text, data)
    if dice < 0.8:
        length = int(random.choice(np.array([0, 1, len(plain) - 1, len(plain) + 1, 2**31, 2**40, 2**63 - 1])))
        return f"header length {length} for {len(plain)}", assemble(plain, data, length)
    return change_bytes(assemble(plain, data), random)


def read_strictly(content: bytes) -> dict[str, np.ndarray]:
    """The tensors of a file that is right in every point of the format; float types as float64.

    Raises:
        ValueError: any point is wrong: header, types, shapes, offsets with holes or overlaps.
    """
    if len(content) < 8:
        raise ValueError("no header")
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content) - 8:
        raise ValueError("the header is cut off")
    header = strict_json(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    header.pop("__metadata__", None)
    data, found, at = content[8 + length :], {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, start, end]
        if not all(type(number) is int and number >= 0 for number in whole) or start != at:
            raise ValueError("wrong shapes or offsets")
        if end - start != math.prod(shape) * _SIZES[dtype]:
            raise ValueError("another size than its shape")
        at, raw = end, data[start:end]
        if dtype == "BF16":
            found[name] = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        elif dtype in _NUMPY:
            found[name] = np.frombuffer(raw, _NUMPY[dtype]).reshape(shape)
        else:
            found[name] = np.frombuffer(raw, np.uint8)
    if at != len(data):
        raise ValueError("bytes that belong to no tensor")
    return {name: array.astype(np.float64) for name, array in found.items()}
