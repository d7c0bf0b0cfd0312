"""``upcast_attention`` in half precision: scores that float16 cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

from dipgo_deploy.export.program import to_onnx
from dipgo_deploy.export.upcast import keep_upcast_attention

torch.set_num_threads(1)


def _attention(*, upcast: bool, dtype: torch.dtype) -> Attention:
    """Channel 0 of queries and keys is 512 where that of the states is 1, so every score has 512 * 512 / sqrt(4)."""
    torch.manual_seed(0)
    attention = Attention(8, heads=2, dim_head=4, upcast_attention=upcast)
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k):
            layer.weight[::4] = 0
            layer.weight[::4, 0] = 512
    return attention.to(dtype).eval()


def _states() -> torch.Tensor:
    states = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1)).half().float()
    states[..., 0] = 1
    return states


def _exported(attention: Attention, folder: Path) -> tuple[np.ndarray, list[str]]:
    """The output in the graph's own types (ONNX Runtime's CPU computes float16 in float32), and the types of what the
    softmaxes take."""
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    keep_upcast_attention(attention)
    model = to_onnx(attention, [_states().half()], ["x"], lambda: ["y"], dtype="fp16", prefix="", label="attention")
    types = [node.inputs[0].dtype.name for node in model.graph if node.op_type == "Softmax"]
    ir.save(model, folder / "attention.onnx")
    evaluator = ReferenceEvaluator(str(folder / "attention.onnx"))
    return np.asarray(evaluator.run(["y"], {"x": _states().half().numpy()})[0], np.float32), types


def test_scores_beyond_float16_are_kept(tmp_path: Path) -> None:
    with torch.no_grad():
        want = _attention(upcast=True, dtype=torch.float32)(_states()).numpy()
    got, types = _exported(_attention(upcast=True, dtype=torch.float16), tmp_path)
    assert types == ["FLOAT"]
    assert np.abs(got - want).max() <= 2e-2 * np.abs(want).max()


@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_without_the_setting_they_overflow(tmp_path: Path) -> None:
    got, types = _exported(_attention(upcast=False, dtype=torch.float16), tmp_path)
    assert types == ["FLOAT16"]
    assert not np.isfinite(got).all()


@pytest.mark.parametrize("masked", [False, True])
def test_equals_diffusers_own_processor(masked: bool) -> None:
    attention = Attention(8, heads=2, dim_head=4, upcast_attention=True).eval()
    mask = torch.randn(1, 1, 16) if masked else None
    with torch.no_grad():
        want = attention(_states(), attention_mask=mask)
        assert keep_upcast_attention(attention) == 1
        assert keep_upcast_attention(attention) == 0
        torch.testing.assert_close(attention(_states(), attention_mask=mask), want, rtol=1e-5, atol=1e-6)
