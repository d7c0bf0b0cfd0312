"""How each weight of an exported graph holds its parameter: as it is, or transposed. Found by value, not by shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.reference.mapped import give_back, mapped_files

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

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


def note_layouts(model: ir.Model, module: torch.nn.Module, origins: Mapping[str, str], prefix: str) -> None:
    """Note on each initializer's tensor which parameter of ``module`` it holds; ``layout_of`` reads it.

    The exporter stores some matrices transposed, and of a square one the shape does not tell. Tensors that hold
    neither a parameter nor its transpose get no note. ``origins``: initializer -> parameter (without ``prefix``).
    """
    parameters = {name.removeprefix(prefix): value for name, value in module.named_parameters(remove_duplicate=False)}
    present = set(origins.values())
    merged = {name: value for name, value in parameters.items() if name not in present}
    mapped = mapped_files()
    for name, origin in origins.items():
        tensor, parameter = model.graph.initializers[name].const_value, parameters.get(origin)
        if tensor is None or parameter is None:
            continue
        transposed = _transposed(_bits(tensor.numpy()), _torch_bits(parameter))
        if transposed is not None:
            equal = tuple(
                other
                for other, value in merged.items()
                if value.shape == parameter.shape and np.array_equal(_torch_bits(value), _torch_bits(parameter))
            )
            tensor.meta[_META] = Layout(origin, transposed, equal)
        # Else this alone would bring all weights of a mapped model into memory.
        give_back(parameter.data, mapped)


def _transposed(stored: np.ndarray, original: np.ndarray) -> bool | None:
    """Whether ``stored`` is the transpose of ``original``; None where it is neither that nor the same."""
    if np.array_equal(stored, original):
        return False
    return True if original.ndim == 2 and np.array_equal(stored, original.T) else None


def note_rows(part: ir.TensorProtocol, whole: ir.TensorProtocol, first: int, last: int) -> None:
    """Note on ``part`` that it holds these rows of ``whole``, where that holds a parameter as it is."""
    layout = layout_of(whole)
    if layout is not None and not layout.transposed:
        part.meta[_META] = replace(layout, rows=(first, last, int(whole.shape[0])))


def layout_of(tensor: ir.TensorProtocol) -> Layout | None:
    """What ``note_layouts`` noted."""
    found: Layout | None = tensor.meta.get(_META)
    return found


def _bits(array: np.ndarray) -> np.ndarray:
    """The bit patterns: equal means equal, NaN included, whatever the type."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _torch_bits(parameter: Any) -> np.ndarray:
    import torch

    data = parameter.detach().cpu().contiguous()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    return _bits(data.view(integers).numpy())
