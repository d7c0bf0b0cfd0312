"""Which parameter each weight of a traced graph holds, and how. Found by value, not by shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from dipgo_deploy.export.passes.names import parameter_of
from dipgo_deploy.export.stored import StoredParameter, note_parameter
from dipgo_deploy.reference.mapped import give_back, mapped_files

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NoteLayouts(ir.passes.InPlacePass):
    """Each initializer's tensor gets a note which parameter of ``module`` it holds; needs ``RestoreNames`` before.

    The exporter stores some matrices transposed, and of a square one the shape does not tell. Tensors that hold
    neither a parameter nor its transpose get no note.

    prefix: cut off the names of the module's parameters.
    """

    module: torch.nn.Module = field(repr=False)
    prefix: str

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        parameters = {
            name.removeprefix(self.prefix): value
            for name, value in self.module.named_parameters(remove_duplicate=False)
        }
        origins = {value: parameter_of(value) for value in model.graph.initializers.values()}
        present = set(origins.values())
        merged = {name: value for name, value in parameters.items() if name not in present}
        mapped = mapped_files()
        for value, origin in origins.items():
            tensor, parameter = value.const_value, parameters.get(origin or "")
            if origin is None or tensor is None or parameter is None:
                continue
            transposed = _transposed(_bits(tensor.numpy()), _torch_bits(parameter))
            if transposed is not None:
                equal = tuple(
                    other
                    for other, rival in merged.items()
                    if rival.shape == parameter.shape and np.array_equal(_torch_bits(rival), _torch_bits(parameter))
                )
                note_parameter(tensor, StoredParameter(origin, transposed, equal))
            # Else this alone would bring all weights of a mapped model into memory.
            give_back(parameter.data, mapped)
        return ir.passes.PassResult(model, True)


def _transposed(stored: np.ndarray, original: np.ndarray) -> bool | None:
    """Whether ``stored`` is the transpose of ``original``; None where it is neither that nor the same."""
    if np.array_equal(stored, original):
        return False
    return True if original.ndim == 2 and np.array_equal(stored, original.T) else None


def _bits(array: np.ndarray) -> np.ndarray:
    """The bit patterns: equal means equal, NaN included, whatever the type."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _torch_bits(parameter: Any) -> np.ndarray:
    import torch

    data = parameter.detach().cpu().contiguous()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    return _bits(data.view(integers).numpy())
