"""Tiny denoisers with random weights of families whose pipelines are built in one test file only."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from family_checks import random_weights
from flow_pipelines import T5_WIDTH
from language_models import WIDTH

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


def chroma_transformer(layers: int = 1) -> ChromaTransformer2DModel:
    """One block of each kind; latents (B, 4, h, w)."""
    torch.manual_seed(1)
    model = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return random_weights(model, scale=0.1)


def flux2_transformer(*, guidance: bool = True, layers: int = 1, text: int = 2 * WIDTH) -> Flux2Transformer2DModel:
    """As many double as single blocks; latents (B, 8, h, w)."""
    torch.manual_seed(1)
    model = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=text,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )
    return random_weights(model, scale=0.15)


def qwenimage_transformer(layers: int = 1, **changes: Any) -> QwenImageTransformer2DModel:
    """Latents (B, 2, h, w)."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 2,
        "num_layers": layers,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (2, 2, 4),
    }
    return random_weights(QwenImageTransformer2DModel(**{**settings, **changes}), scale=0.15)


def zimage_transformer(layers: int = 1, **changes: Any) -> ZImageTransformer2DModel:
    """One block of each kind; latents (B, 4, h, w)."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "in_channels": 4,
        "dim": 16,
        "n_layers": layers,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": WIDTH,
        "axes_dims": [2, 2, 4],
        "axes_lens": [544, 64, 64],
    }
    return random_weights(ZImageTransformer2DModel(**{**settings, **changes}), scale=0.08)


def ltx_transformer() -> LTXVideoTransformer3DModel:
    """Two blocks; the width is no multiple of 6, as the real one's, so that some features are not turned."""
    return random_weights(
        LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            cross_attention_dim=20,
            num_layers=2,
            caption_channels=T5_WIDTH,
        )
    )


def hunyuan_transformer(**changes: Any) -> HunyuanVideoTransformer3DModel:
    """A double block, a single one, and one that refines the text."""
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        # TensorRT-RTX 1.7's compiler fails in half precision where masked heads are of 12.
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 4, 8),
    }
    return random_weights(HunyuanVideoTransformer3DModel(**{**settings, **changes}))


def auraflow_transformer(layers: int = 1) -> AuraFlowTransformer2DModel:
    """As many joint as single blocks; latents (B, 4, h, w)."""
    torch.manual_seed(1)
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=layers,
        num_single_dit_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return random_weights(model, scale=0.15)
