"""Einsums that only permute dimensions, as the Transposes they are."""

from __future__ import annotations

import onnx_ir as ir


class PermutingEinsums(ir.passes.InPlacePass):
    """Each one-input Einsum that is a pure permutation (``nhwpqc->nchpwq``) becomes a Transpose.

    DiT's last reshape is written as such an Einsum, and ONNX's Einsum does not take bfloat16 (Transpose does).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        replaced = False
        for node in list(model.graph):
            permutation = _permutation(node)
            if permutation is None:
                continue
            old = node.outputs[0]
            transpose = ir.node("Transpose", node.inputs[:1], attributes={"perm": permutation}, name=node.name)
            transpose.metadata_props.update(node.metadata_props)
            transpose.outputs[0].dtype, transpose.outputs[0].shape = old.dtype, old.shape
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [transpose], [old], transpose.outputs)
            replaced = True
        return ir.passes.PassResult(model, replaced)


def _permutation(node: ir.Node) -> list[int] | None:
    if node.op_type != "Einsum" or node.domain or len(node.inputs) != 1:
        return None
    source, arrow, target = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    if not arrow or len(set(source)) != len(source) or sorted(source) != sorted(target) or "." in source:
        return None
    return [source.index(letter) for letter in target]
