"""Choices between truth values, as the logic that they are."""

from __future__ import annotations

import onnx_ir as ir


class BooleanChoices(ir.passes.InPlacePass):
    """Each Where of two boolean tensors becomes ``(condition and one) or (not condition and other)``.

    HunyuanVideo masks a mask (``mask.masked_fill(padding, False)``). ONNX Runtime has no such Where.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        changed = False
        for node in list(model.graph):
            old = node.outputs[0] if node.op_type == "Where" and not node.domain else None
            if old is None or old.dtype != ir.DataType.BOOL:
                continue
            condition, one, other = node.inputs
            nodes: list[ir.Node] = []

            def add(
                op: str, *inputs: ir.Value | None, part: str = "", node: ir.Node = node, nodes: list[ir.Node] = nodes
            ) -> ir.Value:
                made = ir.node(op, inputs, name=f"{node.name}{part}")
                made.metadata_props.update(node.metadata_props)
                made.outputs[0].dtype, made.outputs[0].shape = ir.DataType.BOOL, node.outputs[0].shape
                if part:
                    made.outputs[0].name = made.name
                nodes.append(made)
                return made.outputs[0]

            opposite = add("Not", condition, part="/not")
            opposite.shape = None if condition is None else condition.shape
            kept, replaced = add("And", condition, one, part="/one"), add("And", opposite, other, part="/other")
            result = add("Or", kept, replaced)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, [old], [result])
            changed = True
        return ir.passes.PassResult(model, changed)
