"""Tokens that may attend to nothing, for which torch gives zeros."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class EmptyAttention(ir.passes.InPlacePass):
    """Masks of attention are minus infinity, not the lowest number.

    A prompt that is padded on the left begins with tokens that a causal mask leaves nothing to attend to. torch gives
    zeros for them. The exporter replaces NaN behind the softmax by zero, for that case, but writes the mask with the
    lowest number of its type, so that none comes and the average of everything is taken.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        masks = [mask for node in model.graph if (mask := _mask_of(node)) is not None]
        for mask in dict.fromkeys(masks):
            _fill(model.graph, mask)
        return ir.passes.PassResult(model, bool(masks))


def _mask_of(node: ir.Node) -> ir.Node | None:
    """The Where that masks what a softmax takes, of an IsNaN behind that softmax."""
    steps = ("IsNaN", "Softmax", "Add")
    current: ir.Node | None = node
    for step in steps:
        if current is None or current.op_type != step or current.domain:
            return None
        inputs = [value for value in current.inputs if value is not None]
        before = [value.producer() for value in inputs]
        current = before[-1] if step == "Add" else before[0]
    return current if current is not None and current.op_type == "Where" and _lowest(current.inputs[2]) else None


def _lowest(value: ir.Value | None) -> bool:
    """Whether a value is a constant of the lowest finite number of its type."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point():
        return False
    number = float(tensor.numpy().reshape(-1)[0])
    return number == float(tensor.dtype.min)


def _fill(graph: ir.Graph, mask: ir.Node) -> None:
    value = mask.inputs[2]
    assert value is not None and value.dtype is not None
    name = f"{mask.name}_fill"
    number = np.array(-np.inf, value.dtype.numpy())
    constant = ir.node("Constant", [], attributes={"value": ir.tensor(number, dtype=value.dtype, name=name)}, name=name)
    constant.outputs[0].name = name
    constant.outputs[0].dtype, constant.outputs[0].shape = value.dtype, ir.Shape([])
    graph.insert_before(mask, constant)
    mask.replace_input_with(2, constant.outputs[0])
