"""Tiny Stable Diffusion 3 and FLUX pipelines with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from family_checks import random_weights
from sd_pipelines import TOKENIZER, text_config
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

SAMPLE = 8  # latent pixels, 64 of the picture
T5_WIDTH = 24

# The schedulers of the published folders.
SD3_SCHEDULER = {"shift": 3.0}
DEV_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}
SCHNELL_SCHEDULER = {"shift": 1.0, "use_dynamic_shifting": False}

_SD3 = {
    "sample_size": SAMPLE,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": T5_WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8 + 12,
    "pos_embed_max_size": 12,
}


def vae(levels: int) -> AutoencoderKL:
    """Scale 8 with four levels. With the shift that SD3 and FLUX have, and no convolution beside the latent."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * (levels - 1) + (8,),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=SAMPLE * 2 ** (levels - 1),
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return random_weights(model)


def t5_tokenizer() -> T5Tokenizer:
    """Letters and a few words, with T5's special tokens."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁red", "▁shoe", "▁and"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    return T5Tokenizer(vocab=[*special, *((piece, -2.0 - len(piece) / 8) for piece in pieces)], extra_ids=0)


def t5(layers: int = 2) -> T5EncoderModel:
    """The gated form of T5 v1.1."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=layers,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return random_weights(T5EncoderModel(config))


def umt5(layers: int = 2) -> UMT5EncoderModel:
    """Unlike in T5 each layer has position biases of its own."""
    config = UMT5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=layers,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return random_weights(UMT5EncoderModel(config))


def sd3_transformer(**changes: Any) -> SD3Transformer2DModel:
    """Three joint blocks; latents (B, 4, 8, 8)."""
    torch.manual_seed(0)
    return random_weights(SD3Transformer2DModel(**{**_SD3, **changes}))


def sd35_transformer() -> SD3Transformer2DModel:
    """What SD3.5-medium has besides: a second attention in the first blocks, normalised queries and keys."""
    return sd3_transformer(dual_attention_layers=(0, 1), qk_norm="rms_norm")


def save_sd3(folder: Path, *, with_t5: bool = True, small: bool = False) -> Path:
    """SD3 with its two CLIP encoders, the second with another padding, and T5 or none.

    small: less of everything, for what needs a pipeline of its own; its VAE has scale 2.
    """
    torch.manual_seed(1)
    StableDiffusion3Pipeline(
        transformer=sd3_transformer(num_layers=2 if small else 3),
        scheduler=FlowMatchEulerDiscreteScheduler(**SD3_SCHEDULER),
        vae=vae(2 if small else 4),
        text_encoder=random_weights(CLIPTextModelWithProjection(text_config(8, hidden_act="quick_gelu"))),
        text_encoder_2=random_weights(CLIPTextModelWithProjection(text_config(12, hidden_act="gelu", pad_token_id=0))),
        text_encoder_3=t5(1 if small else 2) if with_t5 else None,
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=AutoTokenizer.from_pretrained(TOKENIZER, pad_token="!"),
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    ).save_pretrained(folder)
    return folder


def flux_transformer(*, guidance: bool = True, layers: int = 2, joined: int = 0) -> FluxTransformer2DModel:
    """As many double as single blocks; latents (B, 4, h, w) for tokens of 16 channels. joined: channels beside those
    4."""
    torch.manual_seed(2)
    model = FluxTransformer2DModel(
        in_channels=16 + 4 * joined,
        out_channels=16 if joined else None,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=8,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    return random_weights(model)


def save_flux(folder: Path, *, guidance: bool = True, small: bool = False) -> Path:
    """FLUX.1-dev, or with ``guidance`` False FLUX.1-schnell; ``small`` as in ``save_sd3``."""
    torch.manual_seed(3)
    FluxPipeline(
        transformer=flux_transformer(guidance=guidance, layers=1 if small else 2),
        scheduler=FlowMatchEulerDiscreteScheduler(**(DEV_SCHEDULER if guidance else SCHNELL_SCHEDULER)),
        vae=vae(2 if small else 4),
        text_encoder=random_weights(CLIPTextModel(text_config(8, hidden_act="quick_gelu"))),
        text_encoder_2=t5(1 if small else 2),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def save_flux_controlnet(folder: Path, plain: Path) -> Path:
    """The small pipeline in ``plain`` with a ControlNet of one block of each kind, whose projections are not zero."""
    parts = {name: part for name, part in FluxPipeline.from_pretrained(plain).components.items() if part is not None}
    net = FluxControlNetModel.from_transformer(parts["transformer"], 1, 1, 8, 2, load_weights_from_transformer=False)
    FluxControlNetPipeline(**parts, controlnet=random_weights(net)).save_pretrained(folder)
    return folder


def save_sd3_controlnet(folder: Path, plain: Path) -> Path:
    """The same of SD3: a ControlNet of one block."""
    loaded = StableDiffusion3Pipeline.from_pretrained(plain)
    parts = {name: part for name, part in loaded.components.items() if part is not None or "3" in name}
    net = SD3ControlNetModel(**{**_SD3, "num_layers": 1})
    StableDiffusion3ControlNetPipeline(**parts, controlnet=random_weights(net)).save_pretrained(folder)
    return folder


def save_flux_variant(folder: Path, plain: Path, pipeline: Any, *, joined: int = 0) -> Path:
    """Fill, Control or Kontext with the small parts of the pipeline in ``plain``."""
    parts = {name: part for name, part in FluxPipeline.from_pretrained(plain).components.items() if part is not None}
    pipeline(**{**parts, "transformer": flux_transformer(layers=1, joined=joined)}).save_pretrained(folder)
    return folder
