"""Squeezes of a dimension that is not 1, which torch defines as doing nothing and ONNX refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def drop_idle_squeezes(model: ir.Model) -> int:
    """Take such dimensions out of each Squeeze, and a Squeeze without any left out of the graph; returns how many.

    PixArt writes ``hidden_states.squeeze(1)`` where dimension 1 are the tokens. ``tensor.squeeze(dim)`` leaves a
    dimension of more than one alone; the exporter emits a Squeeze of it, which ONNX Runtime and TensorRT reject.
    """
    import onnx_ir as ir

    changed = 0
    for node in list(model.graph):
        axes = _axes(node)
        shape = node.inputs[0].shape if axes is not None and node.inputs[0] is not None else None
        if axes is None or shape is None:
            continue
        old, source = node.outputs[0], node.inputs[0]
        assert source is not None
        kept = [axis for axis in axes if not isinstance(shape[axis], int) or shape[axis] == 1]
        if old.shape is not None and len(old.shape) == len(shape):
            kept = []  # a dimension of open size that torch found not to be 1
        if len(kept) == len(axes):
            continue
        changed += 1
        if kept:
            name = f"{node.name}_axes"
            constant = ir.node("Constant", [], attributes={"value_ints": kept}, name=name)
            constant.outputs[0].name = name
            constant.outputs[0].dtype, constant.outputs[0].shape = ir.DataType.INT64, ir.Shape([len(kept)])
            model.graph.insert_before(node, constant)
            node.replace_input_with(1, constant.outputs[0])
        elif old.is_graph_output():
            # The output has a name of its own, which a caller is going to set.
            identity = ir.node("Identity", [source], name=node.name)
            identity.metadata_props.update(node.metadata_props)
            identity.outputs[0].dtype, identity.outputs[0].shape = old.dtype, old.shape
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [identity], [old], identity.outputs)
        else:
            ir.convenience.replace_all_uses_with(old, source)
            model.graph.remove(node, safe=True)
    return changed


def _axes(node: ir.Node) -> list[int] | None:
    """The dimensions that a Squeeze names; None for another node, or one whose dimensions are not constant."""
    if node.op_type != "Squeeze" or node.domain or len(node.inputs) != 2 or node.inputs[1] is None:
        return None
    import onnx_ir as ir

    constant = ir.convenience.get_const_tensor(node.inputs[1])
    return None if constant is None else [int(axis) for axis in constant.numpy().reshape(-1)]
