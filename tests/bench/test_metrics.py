"""Which metrics are measured, with the weights that are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learned_weights import clip_weights, lpips_weights

from dipgo_deploy.bench.metrics import learned, to_the_full_run
from dipgo_deploy.errors import UserError
from dipgo_deploy.quality.learned import clip_model
from dipgo_deploy.quality.similarity import has_flip

PICTURES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog"]


def test_likeness_is_best_to_the_same_picture() -> None:
    metrics, notes = to_the_full_run()
    assert [metric.name for metric in metrics] == ["ssim", "psnr", "haarpsi", "gmsd", *(["flip"] if has_flip() else [])]
    assert len(notes) == (not has_flip())
    other = PICTURES.flip(3)
    for metric in metrics:
        same, different = metric.measure(PICTURES, PICTURES, PROMPTS), metric.measure(other, PICTURES, PROMPTS)
        assert ((same > different) if metric.higher else (same < different)).all()


def test_judges_are_those_whose_weights_are_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no folder lpips, clip, hps, image-reward"):
        learned(tmp_path, prompts=True)
    for name in ("lpips", "clip", "hps"):
        (tmp_path / name).mkdir()
        lpips_weights(tmp_path / name, "alex") if name == "lpips" else clip_weights(tmp_path / name)
    metrics, left_out = learned(tmp_path, prompts=True)
    assert [metric.name for metric in metrics] == ["lpips", "clip", "hps"] and not left_out
    lpips, clip, hps = (metric.measure(PICTURES, PICTURES, PROMPTS) for metric in metrics)
    assert lpips.tolist() == [0, 0]
    torch.testing.assert_close(hps, clip_model(tmp_path / "hps")(PICTURES, PROMPTS))
    torch.testing.assert_close(clip, 100 * hps)
    metrics, left_out = learned(tmp_path, prompts=False)
    assert [metric.name for metric in metrics] == ["lpips"]
    assert left_out == [f"{name} is not measured: it needs prompts, and the model has none" for name in ("clip", "hps")]
