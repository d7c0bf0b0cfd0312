from __future__ import annotations

import torch

from dipgo_deploy.export.interleaved import stack_interleaved


class Rotated(torch.nn.Module):
    """A rotary embedding as Wan writes it; ``start`` and ``step`` of the second assignment."""

    def __init__(self, start: int = 1, step: int = 2) -> None:
        super().__init__()
        self.start, self.step = start, step

    def forward(self, states: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        one, two = states.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(states)
        out[..., 0::2] = one * angle
        out[..., self.start :: self.step] = two + angle
        return out.type_as(states) * 2


def exported(module: torch.nn.Module) -> tuple[torch.export.ExportedProgram, tuple[torch.Tensor, ...]]:
    arguments = (torch.randn(2, 3, 8), torch.randn(4))
    with torch.no_grad():
        return torch.export.export(module, arguments, strict=False), arguments


def test_the_assignments_become_one_stack() -> None:
    program, arguments = exported(Rotated())
    assert stack_interleaved(program) == 1
    names = [str(node.target) for node in program.graph.nodes]
    assert not [name for name in names if "copy_" in name or "empty" in name]
    assert torch.equal(program.module()(*arguments), Rotated()(*arguments))


def test_what_is_not_filled_is_left_alone() -> None:
    program, _ = exported(Rotated(start=0))  # the odd elements stay empty
    assert stack_interleaved(program) == 0
