"""Host arrays to and from the bytes that a backend's memory holds; numpy has no bfloat16 of its own."""

from __future__ import annotations

import numpy as np

from dipgo_deploy.bundle.manifest import NUMPY_DTYPES, TensorDType, TensorSpec
from dipgo_deploy.plan.buffers import aligned


def to_storage(array: np.ndarray, dtype: TensorDType) -> np.ndarray:
    """C-ordered array of a manifest dtype; bfloat16 comes as its bit patterns, uint16, rounded to nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, dtype=NUMPY_DTYPES[dtype])
    values = np.ascontiguousarray(array, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN's payload over into infinity: keep it a (quiet) NaN.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def fits(array: np.ndarray, dtype: TensorDType) -> bool:
    """Are all values finite, as they are and as ``to_storage`` makes them (float16 ends at 65504)?"""
    if array.dtype.kind not in "fc":
        return True
    if dtype == "int64":
        return bool(np.isfinite(array).all())
    with np.errstate(over="ignore", invalid="ignore"):
        stored = to_storage(array, dtype)
    return finite(stored, dtype)


def finite(stored: np.ndarray, dtype: TensorDType) -> bool:
    """Are all values of what ``to_storage`` gives finite?"""
    if dtype == "bfloat16":
        return not bool(((stored & 0x7F80) == 0x7F80).any())  # an exponent of ones
    return bool(np.isfinite(stored).all())


def from_storage(raw: np.ndarray, spec: TensorSpec, *, copy: bool = True) -> np.ndarray:
    """An own array from raw bytes (uint8, at least ``spec.nbytes``); bfloat16 comes as float32. Without ``copy`` it may
    be the bytes themselves."""
    raw = np.ascontiguousarray(raw[: spec.nbytes])
    if spec.dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(spec.shape)
    array = raw.view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)
    return array.copy() if copy else array


def aligned_rows(rows: np.ndarray, dtype: TensorDType, alignment: int) -> np.ndarray:
    """The bytes of rows (n, ...) in a manifest dtype, uint8 (n, stride): each begins at a multiple of ``alignment``."""
    stored = as_bytes(to_storage(rows, dtype)).reshape(len(rows), -1)
    table = np.zeros((len(rows), aligned(stored.shape[1], alignment)), np.uint8)
    table[:, : stored.shape[1]] = stored
    return table


def as_bytes(array: np.ndarray) -> np.ndarray:
    """A C-ordered array as a flat uint8 view."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
