from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from dipgo_deploy.export.program import to_onnx


class Guarded(torch.nn.Module):
    """Sums of ReLUs divided by their sum, as in linear attention; nothing is left of a negative row."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.relu(x)
        total = rows.sum(-1, keepdim=True)
        return rows / (total + 1e-15), rows.sum(-1)[:, :1] / (rows.sum(-1)[:, :1] - -1e-9)


def test_a_tiny_addend_still_guards_a_division() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0], [-1.0, -2.0, -3.0]]).expand(2, 2, 3) * 1
    model = to_onnx(Guarded(), [x], ["x"], lambda: ["y", "z"], dtype="fp32", prefix="", label="test")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": x.flip(1).contiguous().numpy()})
    for mine, want in zip(got, Guarded()(x.flip(1)), strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, want.numpy(), rtol=1e-6)
