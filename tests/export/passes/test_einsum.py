from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dipgo_deploy.export.passes.einsum import PermutingEinsums


def model_of(equation: str, shapes: list[list[int]]) -> ir.Model:
    inputs = [ir.val(f"x{i}", ir.DataType.FLOAT, ir.Shape(shape)) for i, shape in enumerate(shapes)]
    node = ir.node("Einsum", inputs, attributes={"equation": equation})
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("equation", ["nhwpqc->nchpwq", "abc -> cab", "ab->ab"])
def test_a_permutation_becomes_a_transpose(equation):
    source, target = equation.replace(" ", "").split("->")
    x = np.random.default_rng(0).normal(size=range(2, 2 + len(source))).astype(np.float32)
    model = model_of(equation, [list(x.shape)])
    assert PermutingEinsums()(model).modified
    (node,) = model.graph
    assert node.op_type == "Transpose"
    assert [output.name for output in model.graph.outputs] == ["y"] and model.graph.outputs[0].producer() is node
    want = np.einsum(equation, x)
    np.testing.assert_array_equal(x.transpose(node.attributes["perm"].as_ints()), want)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ab,bc->ac", [[2, 3], [3, 4]]),
        ("aa->a", [[2, 2]]),
        ("ab->a", [[2, 3]]),
        ("ab", [[2, 3]]),
        ("a...->...a", [[2]]),
    ],
)
def test_any_other_einsum_stays(equation, shapes):
    model = model_of(equation, shapes)
    assert not PermutingEinsums()(model).modified
    assert [node.op_type for node in model.graph] == ["Einsum"]
