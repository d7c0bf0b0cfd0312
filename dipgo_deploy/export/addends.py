"""Tiny addends that guard a division, kept from the exporter's clean-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# onnxscript's rule for "x + 0" takes every scalar up to its absolute tolerance for zero.
_TAKEN_FOR_ZERO = 1e-8


def keep_tiny_addends(program: ExportedProgram) -> int:
    """Give each scalar of at most 1e-8 that is added to a tensor the size of one of its dimensions; returns how many.

    Sana's linear attention divides by a sum of ReLUs plus 1e-15. The exporter's optimizer takes that for zero and drops
    it, so that a token whose ReLUs are all zero becomes NaN; a tensor of several equal elements it leaves alone.
    """
    import torch

    addition = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)
    changed = 0
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node.target not in addition or len(node.args) != 2 or node.kwargs:
            continue
        tensor, addend = node.args
        if not isinstance(addend, float) or not 0 < abs(addend) <= _TAKEN_FOR_ZERO:
            continue
        value = tensor.meta["val"]
        axis = next((axis for axis in range(-1, -value.ndim - 1, -1) if _is_several(value.shape[axis])), None)
        if axis is None or not value.is_floating_point():
            continue
        shape = [value.shape[axis]] + [1] * (-axis - 1)
        with program.graph.inserting_before(node):
            spread = program.graph.call_function(torch.ops.aten.full.default, (shape, addend), {"dtype": value.dtype})
        spread.meta["val"] = value.new_full(shape, addend)
        node.args = (tensor, spread)
        changed += 1
    if changed:
        program.graph_module.recompile()
    return changed


def _is_several(extent: object) -> bool:
    """A fixed extent of more than one; sizes that are left open are symbols."""
    return isinstance(extent, int) and extent > 1
