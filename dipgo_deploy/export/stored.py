"""How each weight of an exported graph holds its parameter: as it is, transposed, rows of it, or in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dipgo_deploy.bundle.quantized import Quantized

if TYPE_CHECKING:
    import onnx_ir as ir

_META = "dipgo_deploy.stored"


@dataclass(frozen=True)
class StoredParameter:
    """The parameter that a tensor holds, and others of equal value that the exporter merged into it.

    rows: the tensor holds rows [first, last) of so many only, as (first, last, all). quantized: the tensor holds
    numbers in fewer bits, and how they make the values.
    """

    parameter: str
    transposed: bool
    equal: tuple[str, ...] = ()
    rows: tuple[int, int, int] | None = None
    quantized: Quantized | None = None


def note_parameter(tensor: ir.TensorProtocol, stored: StoredParameter) -> None:
    """Note on ``tensor`` what it holds; ``stored_parameter`` reads it."""
    tensor.meta[_META] = stored


def note_rows(part: ir.TensorProtocol, whole: ir.TensorProtocol, first: int, last: int) -> None:
    """Note on ``part`` that it holds these rows of ``whole``, where that holds a parameter as it is, or rows of one."""
    stored = stored_parameter(whole)
    if stored is not None and not stored.transposed:
        begin, _, count = stored.rows or (0, 0, int(whole.shape[0]))
        part.meta[_META] = replace(stored, rows=(begin + first, begin + last, count))


def stored_parameter(tensor: ir.TensorProtocol) -> StoredParameter | None:
    """What was noted; None for a tensor that holds neither a parameter nor its transpose."""
    found: StoredParameter | None = tensor.meta.get(_META)
    return found
