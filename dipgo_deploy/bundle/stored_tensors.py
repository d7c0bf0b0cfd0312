"""Tensors of an engine directory that lie in a safetensors file, held to what the manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dipgo_deploy.bundle.manifest import EXPORT_AGAIN, TensorSpec
from dipgo_deploy.bundle.safetensors_file import TensorFile
from dipgo_deploy.errors import UserError

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


def open_tensors(path: Path) -> TensorFile:
    """Open a file of an engine directory. Raises UserError for one that cannot be read or is no safetensors file."""
    try:
        return TensorFile(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {EXPORT_AGAIN}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; {EXPORT_AGAIN}") from None


def read_tensors(file: TensorFile, specs: Mapping[str, TensorSpec], taker: str) -> dict[str, np.ndarray]:
    """The tensors of ``specs`` by name, bfloat16 as float32; all are checked before one is read.

    taker: what needs them so, for the message.

    Raises:
        UserError: a tensor is missing, has another shape or type, or cannot be read.
    """
    check_tensors(file, specs, taker)
    try:
        return {name: file.tensors[name].read() for name in specs}
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror or error}); {EXPORT_AGAIN}") from None


def check_tensors(file: TensorFile, specs: Mapping[str, TensorSpec], taker: str) -> None:
    """Refuse (UserError) a file that has not the tensors of ``specs``; taker: what needs them so, for the message."""
    for name, spec in specs.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            raise UserError(f"{file.path}: has no tensor {name}; {EXPORT_AGAIN}")
        if (tensor.shape, tensor.dtype) != (spec.shape, _DTYPES[spec.dtype]):
            raise UserError(
                f"{file.path}: {name} is {tensor.dtype} {tensor.shape}, {taker} {spec.dtype} {spec.shape}; "
                f"{EXPORT_AGAIN}"
            )
