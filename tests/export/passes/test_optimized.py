from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
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


class _Frequencies(torch.nn.Module):
    """Frequencies as timestep embeddings and rotary embeddings have them, and tables of angles."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        place = torch.arange(96, dtype=torch.float32)
        timed = torch.exp(-math.log(10000) * place / 95)
        rotary = 1.0 / (10000.0 ** (place / 96))
        angles = place[:, None] * rotary[None, ::4]
        return x * timed, x * rotary, x[:24] + torch.cos(angles), x[:24] + torch.sin(angles)


def test_constants_are_what_torch_gives_to_the_bit() -> None:
    model = _Frequencies().eval()
    program = torch.onnx.export(model, (torch.zeros(96),), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    apply(program.model, Optimized())
    assert {node.op_type for node in program.model.graph} <= {"Mul", "Add", "Slice"}
    folded = [value.const_value for value in program.model.graph.initializers.values()]
    for wanted in (*model(torch.ones(96))[:2], *model(torch.zeros(96))[2:]):  # times one, plus nothing
        assert any(tensor is not None and np.array_equal(tensor.numpy(), wanted.numpy()) for tensor in folded)
