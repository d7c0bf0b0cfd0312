from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from dipgo_deploy.export.program import to_onnx


class Masked(torch.nn.Module):
    """A mask of a mask, as HunyuanVideo makes it, in the middle and at the end; and a choice between numbers."""

    def forward(self, x: torch.Tensor, used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        behind = torch.arange(x.shape[1])[None] >= used[:, None]
        seen = (x > 0).masked_fill(behind, False)
        return torch.where(seen, x, torch.zeros_like(x)), seen.masked_fill(x > 1, True)


def test_choices_between_truth_values_are_logic() -> None:
    arguments = (torch.randn(2, 6) * 2, torch.tensor([2, 5]))
    model = to_onnx(Masked(), arguments, ["x", "used"], lambda: ["y", "z"], dtype="fp32", prefix="", label="test")
    kinds = {node.outputs[0].dtype for node in model.graph if node.op_type == "Where"}
    assert kinds == {ir.DataType.FLOAT}
    assert [output.name for output in model.graph.outputs] == ["y", "z"]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    given = dict(zip(("x", "used"), (argument.numpy() for argument in arguments), strict=True))
    for got, want in zip(session.run(None, given), Masked()(*arguments), strict=True):
        np.testing.assert_array_equal(got, want.numpy())
