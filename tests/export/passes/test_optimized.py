from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir

from dipgo_deploy.export.passes import apply
from dipgo_deploy.export.passes.optimized import Optimized


class _Block(torch.nn.Module):
    """Something to fold, to collapse, to merge, to drop and to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(4).eval()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.linear = torch.nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.norm(self.conv(torch.nn.functional.pad(x, (1, 1, 1, 1)))) * 1.0
        x = x.reshape(2, 4, -1).reshape(2, -1, 6).transpose(1, 2).transpose(1, 2)
        left, right = self.linear(x).to(torch.float32).chunk(2, dim=-1)
        return left * torch.sigmoid(right), left + torch.arange(4).sum(), torch.nn.functional.silu(x).clamp(0, 3)


def _traced() -> ir.Model:
    torch.manual_seed(0)
    program = torch.onnx.export(_Block().eval(), (torch.randn(2, 4, 4, 4),), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    return program.model


def _computation(model: ir.Model) -> Sequence[tuple[str, tuple[str | None, ...], list[ir.Attr]]]:
    return [
        (node.op_type, tuple(value and value.name for value in node.inputs), list(node.attributes.values()))
        for node in model.graph
    ]


def test_graphs_are_those_of_onnxscripts_optimizer() -> None:
    expected, found = _traced(), _traced()
    before = len(list(found.graph))
    optimize_ir(expected)
    apply(found, Optimized())
    assert _computation(found) == _computation(expected)
    assert len(list(found.graph)) < before
    assert {*found.graph.initializers} == {*expected.graph.initializers}
