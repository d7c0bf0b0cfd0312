from __future__ import annotations

import onnx_ir as ir
import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.passes import apply
from dipgo_deploy.export.passes.outputs import NameOutputs


def model_of(*, same: bool) -> ir.Model:
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape([2]))
    nodes = [ir.node(op, [x], name=op) for op in ("Neg", "Abs")]
    outputs = [nodes[0].outputs[0], nodes[0 if same else 1].outputs[0]]
    return ir.Model(ir.Graph([x], outputs, nodes=nodes, opset_imports={"": 20}, name="g"), ir_version=10)


def test_outputs_are_named_in_order() -> None:
    model = model_of(same=False)
    apply(model, NameOutputs(("a/out0", "b/out0"), "DiT"))
    assert [output.name for output in model.graph.outputs] == ["a/out0", "b/out0"]


@pytest.mark.parametrize(("same", "names"), [(True, ("a", "b")), (False, ("a",)), (False, ("a", "b", "c"))])
def test_boundary_tensors_that_are_one_tensor_are_refused(same: bool, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="^DiT: two boundary tensors are one tensor .*; choose another granularity"):
        apply(model_of(same=same), NameOutputs(names, "DiT"))
