from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from dipgo_deploy.export.passes.squeeze import IdleSqueezes
from dipgo_deploy.export.program import to_onnx


class Squeezes(torch.nn.Module):
    """What PixArt's forward does, in the middle and at the end, and a squeeze that does something."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = (x + 1).squeeze(1)
        return (hidden * 2).squeeze(1), hidden[:, :1].squeeze(1) * 3


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def test_a_squeeze_of_tokens_does_nothing() -> None:
    x = torch.randn(2, 5, 3)
    model = to_onnx(Squeezes(), [x], ["x"], lambda: ["y", "z"], dtype="fp32", prefix="", label="test")
    assert [output.name for output in model.graph.outputs] == ["y", "z"]
    for got, want in zip(run(model, x.numpy()), Squeezes()(x), strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


def model_of(shape: list[int | None], axes: list[int], out: list[int | None]) -> ir.Model:
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape(shape))
    constant = ir.val("axes", const_value=ir.tensor(np.array(axes, np.int64), name="axes"))
    node = ir.node("Squeeze", [x, constant])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape(out)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[constant], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    ("shape", "axes", "out", "changed", "ops"),
    [
        ([2, 5, 3], [1], [2, 5, 3], True, ["Identity"]),
        ([2, 1, 3], [1], [2, 3], False, ["Squeeze"]),
        ([2, 1, 3], [0, 1], [2, 3], True, ["Constant", "Squeeze"]),
        ([2, 5, 1], [1, -1], [2, 5], True, ["Constant", "Squeeze"]),
        ([2, None, 3], [1], [2, None, 3], True, ["Identity"]),
        ([2, None, 3], [1], [2, 3], False, ["Squeeze"]),
    ],
)
def test_only_dimensions_of_one_are_squeezed(shape, axes, out, changed, ops) -> None:
    model = model_of(shape, axes, out)
    assert IdleSqueezes()(model).modified == changed
    assert [node.op_type for node in model.graph] == ops
    if None not in shape:
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        (got,) = run(model, x)
        np.testing.assert_array_equal(got, x.reshape(out))
