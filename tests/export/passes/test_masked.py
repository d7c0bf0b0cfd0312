from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from dipgo_deploy.export.program import to_onnx


class Attention(torch.nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask != 0)


def test_a_token_that_attends_to_nothing_gets_zeros() -> None:
    x, mask = torch.randn(1, 2, 4, 8), torch.ones(4, 4, dtype=torch.int64).tril()[None, None].clone()
    mask[..., :2] = 0  # padded on the left: the first two tokens see nothing
    want = Attention()(x, mask)
    assert not want[:, :, :2].any()
    model = to_onnx(Attention(), [x, mask], ["x", "mask"], lambda: ["y"], dtype="fp32", prefix="", label="test")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-6)
