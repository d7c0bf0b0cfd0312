"""Tiny denoisers with random weights of families whose pipelines are built in one test file only."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SanaTransformer2DModel, UNet2DConditionModel, UNet2DModel, WanTransformer3DModel
from family_checks import random_weights

UNET2D_SAMPLE = 16  # pixels


def sana_transformer(**changes: Any) -> SanaTransformer2DModel:
    """Two blocks; queries and keys as Sana 1.5 normalises them where ``qk_norm`` says so."""
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 24,
        "sample_size": 8,
    }
    return random_weights(SanaTransformer2DModel(**{**settings, **changes}))


def wan_transformer(**changes: Any) -> WanTransformer3DModel:
    """Two blocks; latents (B, 4, f, h, w)."""
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "ffn_dim": 32,
        "freq_dim": 16,
        "text_dim": 24,
    }
    torch.manual_seed(0)
    return random_weights(WanTransformer3DModel(**{**settings, **changes}))


def unet2d(**changes: Any) -> UNet2DModel:
    """Both kinds of published blocks, three levels."""
    settings: dict[str, Any] = {
        "sample_size": UNET2D_SAMPLE,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    return random_weights(UNet2DModel(**{**settings, **changes}))


def two_level_unet() -> UNet2DConditionModel:
    """A text-conditioned UNet of two levels: an open side is a multiple of 2 latent pixels."""
    torch.manual_seed(0)
    return random_weights(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
        )
    )
