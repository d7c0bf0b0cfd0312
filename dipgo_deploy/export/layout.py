"""How each weight of an exported graph holds its parameter: as it is, transposed, or rows of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_META = "dipgo_deploy.layout"


@dataclass(frozen=True)
class Layout:
    """The parameter that a tensor holds, and others of equal value that the exporter merged into it.

    rows: the tensor holds rows [first, last) of so many only, as (first, last, all).
    """

    parameter: str
    transposed: bool
    equal: tuple[str, ...] = ()
    rows: tuple[int, int, int] | None = None


def note_layout(tensor: ir.TensorProtocol, layout: Layout) -> None:
    """Note on ``tensor`` what it holds; ``layout_of`` reads it."""
    tensor.meta[_META] = layout


def note_rows(part: ir.TensorProtocol, whole: ir.TensorProtocol, first: int, last: int) -> None:
    """Note on ``part`` that it holds these rows of ``whole``, where that holds a parameter as it is."""
    layout = layout_of(whole)
    if layout is not None and not layout.transposed:
        part.meta[_META] = replace(layout, rows=(first, last, int(whole.shape[0])))


def layout_of(tensor: ir.TensorProtocol) -> Layout | None:
    """What was noted; None for a tensor that holds neither a parameter nor its transpose."""
    found: Layout | None = tensor.meta.get(_META)
    return found
