"""Squeezes of a dimension that is not 1, which torch defines as doing nothing and ONNX refuses."""

from __future__ import annotations

import onnx_ir as ir


class IdleSqueezes(ir.passes.InPlacePass):
    """Each Squeeze loses the dimensions that are not 1, and a Squeeze without any left goes.

    PixArt writes ``hidden_states.squeeze(1)`` where dimension 1 are the tokens. ``tensor.squeeze(dim)`` leaves a
    dimension of more than one alone; the exporter emits a Squeeze of it, which ONNX Runtime and TensorRT reject.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        changed = False
        for node in list(model.graph):
            axes = _axes(node)
            source = node.inputs[0] if axes is not None else None
            if axes is None or source is None or source.shape is None:
                continue
            kept = _kept(axes, source.shape, node.outputs[0].shape)
            if len(kept) < len(axes):
                _replace(model.graph, node, source, kept)
                changed = True
        return ir.passes.PassResult(model, changed)


def _kept(axes: list[int], shape: ir.Shape, result: ir.Shape | None) -> list[int]:
    """Those of ``axes`` that are, or may be, of extent 1."""
    if result is not None and len(result) == len(shape):
        return []  # a dimension of open size that torch found not to be 1
    return [axis for axis in axes if not isinstance(shape[axis], int) or shape[axis] == 1]


def _replace(graph: ir.Graph, node: ir.Node, source: ir.Value, kept: list[int]) -> None:
    old = node.outputs[0]
    if kept:
        name = f"{node.name}_axes"
        constant = ir.node("Constant", [], attributes={"value_ints": kept}, name=name)
        constant.outputs[0].name = name
        constant.outputs[0].dtype, constant.outputs[0].shape = ir.DataType.INT64, ir.Shape([len(kept)])
        graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
    elif old.is_graph_output():
        # The output has a name of its own, which a caller is going to set.
        identity = ir.node("Identity", [source], name=node.name)
        identity.metadata_props.update(node.metadata_props)
        identity.outputs[0].dtype, identity.outputs[0].shape = old.dtype, old.shape
        ir.convenience.replace_nodes_and_values(graph, node, [node], [identity], [old], identity.outputs)
    else:
        ir.convenience.replace_all_uses_with(old, source)
        graph.remove(node, safe=True)


def _axes(node: ir.Node) -> list[int] | None:
    """The dimensions that a Squeeze names; None for another node, or one whose dimensions are not constant."""
    if node.op_type != "Squeeze" or node.domain or len(node.inputs) != 2 or node.inputs[1] is None:
        return None
    constant = ir.convenience.get_const_tensor(node.inputs[1])
    return None if constant is None else [int(axis) for axis in constant.numpy().reshape(-1)]
