"""Safetensors files as numpy arrays, without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_TYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors by name, read-only, in their own dtype; bfloat16, which numpy lacks, as float32.

    Raises:
        OSError or safetensors.SafetensorError: the file cannot be read.
        ValueError: a tensor of another dtype; the message names it.
    """
    import safetensors

    found = {}
    for name, entry in safetensors.deserialize(path.read_bytes()):
        data, shape, dtype = entry["data"], entry["shape"], entry["dtype"]
        if dtype == "BF16":
            found[name] = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        elif dtype in _TYPES:
            found[name] = np.frombuffer(data, _TYPES[dtype]).reshape(shape)
        else:
            raise ValueError(f"{name} has type {dtype}")
    return found
