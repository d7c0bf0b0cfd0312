from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dipgo_deploy.export.passes.metadata import StripMetadata
from dipgo_deploy.export.passes.names import RestoreNames, module_scope, parameter_of

FOLDED = "pkg.onnxscript.optimizer.folded_from"
SCOPES = "pkg.torch.onnx.name_scopes"


def weight(name: str, *, folded: list[str] | None = None) -> ir.Value:
    tensor = ir.tensor(np.zeros((2, 2), np.float32), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    if folded is not None:
        value.metadata_props[FOLDED] = repr(folded)
    return value


def add(one: ir.Value, other: ir.Value, output: str, scopes: list[str] | None = None) -> ir.Node:
    node = ir.node("Add", [one, other], name=f"node_{output}")
    node.outputs[0].name, node.outputs[0].dtype = output, ir.DataType.FLOAT
    node.outputs[0].metadata_props["pkg.torch.onnx.original_node_name"] = output
    if scopes is not None:
        node.metadata_props[SCOPES] = repr(scopes)
    return node


def model_of(weights: list[ir.Value]) -> ir.Model:
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape([2, 2]))
    first = add(x, weights[0], "stack", ["", "denoiser", "denoiser.block.0", "add"])
    last = add(first.outputs[0], weights[-1], "y", ["", "add_1"])
    graph = ir.Graph([x], last.outputs, nodes=[first, last], initializers=weights, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def test_weights_are_named_after_their_parameter() -> None:
    plain = weight("denoiser.proj.bias")
    stored = weight("val_7", folded=["val_3", "denoiser.proj.weight"])
    again = weight("val_8", folded=["denoiser.proj.weight"])
    constant, mixed = weight("val_9"), weight("val_10", folded=["denoiser.a.weight", "denoiser.b.weight"])
    weights = [plain, stored, again, constant, mixed]
    model = model_of(weights)
    RestoreNames("denoiser.")(model)
    assert [value.name for value in weights] == ["proj.bias", "proj.weight", "proj.weight.1", "val_9", "val_10"]
    assert set(model.graph.initializers) == {value.name for value in weights}
    assert [value.const_value.name for value in weights] == [value.name for value in weights]
    assert [parameter_of(value) for value in weights] == ["proj.bias", "proj.weight", "proj.weight", None, None]


def test_a_name_that_is_taken_is_not_given_again() -> None:
    one, other = weight("proj.weight"), weight("val_1", folded=["proj.weight"])
    RestoreNames("")(model_of([one, other]))
    assert (one.name, other.name) == ("proj.weight", "proj.weight.1")
    assert parameter_of(one) == parameter_of(other) == "proj.weight"


def test_nodes_are_named_after_their_module_and_outputs_keep_their_names() -> None:
    model = model_of([weight("denoiser.a.weight")])
    first, last = model.graph
    assert module_scope(first) == "denoiser.block.0" and module_scope(last) == ""
    RestoreNames("denoiser.")(model)
    assert [node.name for node in model.graph] == ["block.0/Add_0", "Add_1"]
    assert first.outputs[0].name == "block.0/Add_0:0"  # not "stack", which is an input of a variant
    assert [output.name for output in model.graph.outputs] == ["y"]


def test_nothing_of_the_exporting_machine_is_left() -> None:
    kept = weight("denoiser.a.weight", folded=["denoiser.a.weight"])
    model = model_of([kept])
    model.graph.inputs[0].metadata_props["a"] = model.metadata_props["b"] = "/home/somebody"
    model.graph.doc_string = "/home/somebody"
    RestoreNames("denoiser.")(model)
    StripMetadata()(model)
    proto = ir.to_proto(model)
    assert b"pkg." not in proto.SerializeToString() and b"somebody" not in proto.SerializeToString()
    assert parameter_of(kept) == "a.weight"  # a note for later passes, which is not written
