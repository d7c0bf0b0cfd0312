"""Tiny random denoisers and the inputs to run them with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def _perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with every parameter moved at random: initial zeros and ones would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.fixture
def unet() -> torch.nn.Module:
    """SD-1.5's block types, small; latents (B, 4, 8, 8), text (B, 5, 16)."""
    return _perturbed(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 16, 32, 32),
            norm_num_groups=8,
            cross_attention_dim=16,
            attention_head_dim=2,
        )
    )


def _dit(out_channels: int) -> torch.nn.Module:
    return _perturbed(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=out_channels,
            num_layers=4,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
    )


@pytest.fixture
def dit() -> torch.nn.Module:
    """Four transformer blocks, ten classes; latents (B, 4, 8, 8)."""
    return _dit(4)


@pytest.fixture
def dit_with_variance() -> torch.nn.Module:
    """The same with a learned variance: twice as many output channels."""
    return _dit(8)
