"""The nodes that make a graph's latent from the stack."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from dipgo_deploy.bundle.history import History, graph_coefficients, graph_latent
from dipgo_deploy.export.latent import latent_from_history

SHAPE = (2, 3, 4, 5)


def made(layout: History) -> ir.Model:
    """A graph whose output is its latent."""
    latent = ir.val("sample", dtype=ir.DataType.FLOAT, shape=ir.Shape(SHAPE))
    copy = ir.node("Identity", [latent])
    copy.outputs[0].name, copy.outputs[0].dtype, copy.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape(SHAPE)
    graph = ir.Graph([], copy.outputs, nodes=[copy], opset_imports={"": 20}, name="latent")
    graph.inputs.extend(latent_from_history(graph, latent, layout))
    graph.sort()
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("slots", "chain"), [(1, 1), (2, 2), (5, 5), (3, 1), (4, 2), (6, 4)])
def test_the_latent_is_the_weighted_sum(slots: int, chain: int) -> None:
    model = made(History(slots, chain))
    random = np.random.default_rng(0)
    room = np.zeros((1 + slots, *SHAPE), np.float32)
    room[1:] = random.normal(size=(slots, *SHAPE))
    coefficients = graph_coefficients(random.normal(size=slots).tolist(), chain)
    feeds = {"stack": room[1:], "stack_before": room[:-1], "coefficients": coefficients}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    assert names == {"stack", "coefficients"} | ({"stack_before"} if slots == chain > 1 else set())
    found = session.run(None, {name: feeds[name] for name in names})[0]
    np.testing.assert_allclose(found, graph_latent(room[1:], coefficients, chain), atol=1e-5)


def test_differences_are_one_node_where_all_slots_are_of_the_chain() -> None:
    """Each node costs a small graph about a hundredth of its time."""
    nodes = [node.op_type for node in made(History(5, 5)).graph]
    assert nodes == ["Sub", "Reshape", "MatMul", "Reshape", "Identity"]
