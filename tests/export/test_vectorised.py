"""A graph for all timesteps at once gives what it gives for each of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from dipgo_deploy.export.program import to_onnx
from dipgo_deploy.export.vectorised import for_all, vectorise

TIMESTEPS = [999.0, 500.25, 1.0]


class Many(nn.Module):
    """Operators that make modulations, of a timestep (1,) and a condition (2, 6)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 12, bias=False)
        self.norm = nn.LayerNorm(8)
        self.table = nn.Parameter(torch.randn(1, 3, 4))

    def forward(self, timestep: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        time = timestep.expand(2)[:, None] / 1000
        waves = torch.cat([time.sin(), time.cos(), time.exp(), condition[:, :3]], dim=1)
        hidden = self.norm(nn.functional.silu(self.first(waves)))
        made = self.second(hidden)
        parts = made.reshape(2, 3, 4) + self.table
        scale, shift, gate = parts.chunk(3, dim=1)
        turned = parts.transpose(1, 2).mean(dim=-1)
        chosen = torch.where(gate > 0, scale, shift.softmax(dim=-1)).squeeze(1)
        product = chosen @ condition[:, :4].transpose(0, 1)
        return made, chosen, turned, product, self.first(condition)


def exported(module: nn.Module) -> ir.Model:
    arguments = [torch.tensor([500.0]), torch.randn(2, 6)]
    names = [f"out{place}" for place in range(5)]
    return to_onnx(
        module.eval(), arguments, ["timestep", "condition"], lambda: names, dtype="fp32", prefix="", label="m"
    )


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})


def test_every_operator_gives_the_rows_of_every_timestep():
    condition = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    model = exported(Many())
    each = [run(model, timestep=np.array([time], np.float32), condition=condition) for time in TIMESTEPS]
    before = [node.op_type for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    vectorise(model.graph, {"timestep": np.array(TIMESTEPS, np.float32)[:, None]})
    assert [value.name for value in model.graph.inputs] == ["condition"]
    assert [node.op_type for node in model.graph if node.op_type in ("MatMul", "Gemm")] == before
    together = run(model, condition=condition)
    for place, values in enumerate(together[:-1]):
        np.testing.assert_allclose(values, np.stack([one[place] for one in each]), rtol=1e-5, atol=1e-6)
        assert list(model.graph.outputs[place].shape) == list(values.shape)
    np.testing.assert_array_equal(together[-1], each[0][-1])  # does not depend on the timestep


def test_what_has_no_rule_is_refused():
    value = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([2, 3]))
    out = ir.val("y", dtype=ir.DataType.FLOAT, shape=ir.Shape([2, 3]))
    node = ir.node("CumSum", [value, None], outputs=[out])
    assert not for_all(node, [0])
    graph = ir.Graph([value], [out], nodes=[node], name="g")
    with pytest.raises(ValueError, match="CumSum cannot be computed for all timesteps at once"):
        vectorise(graph, {"x": np.zeros((3, 2, 3), np.float32)})
