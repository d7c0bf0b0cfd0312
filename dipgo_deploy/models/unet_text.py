"""How the prompts of Stable Diffusion's UNets are encoded: one CLIP text encoder, or the two of SDXL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import TextScheme, TokenizerSpec

if TYPE_CHECKING:
    from torch import Tensor

CLIP_LENGTH = 77
# SDXL tells its UNet sizes in pixels; its VAE, and with it the pipeline's native size, has this scale.
VAE_SCALE = 8


def _length(tokenizer: Any) -> int:
    return CLIP_LENGTH if tokenizer is None else int(tokenizer.model_max_length)


def one_clip(pipeline: Any) -> TextScheme:
    """``encoder_hidden_states``: the last hidden state of one CLIP text encoder (SD 1.x; OpenCLIP's for SD 2.x, whose
    published encoder has one layer less than it was trained with).

    Raises:
        UserError: an encoder that hides its padding, which no published one does.
    """
    length = _length(getattr(pipeline, "tokenizer", None))
    config = getattr(getattr(pipeline, "text_encoder", None), "config", None)
    if getattr(config, "use_attention_mask", None):
        raise UserError("text_encoder: use_attention_mask is not supported; use another model, or export its denoiser")

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"encoder_hidden_states": pipeline.text_encoder(tokens["input_ids"])[0]}

    return TextScheme(length=length, encode=encode, tokenizers=(TokenizerSpec(length=length),))


def two_clips(pooled_width: int, pipeline: Any) -> TextScheme:
    """SDXL (arXiv 2307.01952): ``encoder_hidden_states`` are the states before the last layer of both encoders, side by
    side; ``text_embeds`` the second one's pooled and projected embedding.

    pooled_width: what the UNet takes of the latter.

    Raises:
        UserError: the pipeline's second encoder or its VAE is not what the UNet was made for.
    """
    if pipeline is not None:
        _check(pooled_width, pipeline)
    lengths = [_length(getattr(pipeline, name, None)) for name in ("tokenizer", "tokenizer_2")]
    if lengths[0] != lengths[1]:
        raise UserError(f"tokenizer, tokenizer_2: {lengths[0]} and {lengths[1]} tokens: they must be as many")
    zeros = pipeline is not None and bool(pipeline.config.get("force_zeros_for_empty_prompt"))

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        import torch

        first = pipeline.text_encoder(tokens["input_ids"], output_hidden_states=True)
        second = pipeline.text_encoder_2(tokens["input_ids_2"], output_hidden_states=True)
        states = [encoded.hidden_states[-2] for encoded in (first, second)]
        return {"encoder_hidden_states": torch.cat(states, dim=-1), "text_embeds": second[0]}

    return TextScheme(
        length=lengths[0],
        encode=encode,
        tokenizers=(
            TokenizerSpec(length=lengths[0]),
            TokenizerSpec("tokenizer_2", length=lengths[1], ids="input_ids_2"),
        ),
        encoders=("text_encoder", "text_encoder_2"),
        zeros_without_negative=zeros,
    )


def second_clip(pooled_width: int, pipeline: Any) -> TextScheme:
    """SDXL's refiner: the states before the last layer of the second encoder alone, and its pooled embedding. Raises as
    ``two_clips``."""
    if pipeline is not None:
        _check(pooled_width, pipeline)
    length = _length(getattr(pipeline, "tokenizer_2", None))

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        encoded = pipeline.text_encoder_2(tokens["input_ids"], output_hidden_states=True)
        return {"encoder_hidden_states": encoded.hidden_states[-2], "text_embeds": encoded[0]}

    return TextScheme(
        length=length,
        encode=encode,
        tokenizers=(TokenizerSpec("tokenizer_2", length=length),),
        encoders=("text_encoder_2",),
        zeros_without_negative=pipeline is not None and bool(pipeline.config.get("force_zeros_for_empty_prompt")),
    )


def _check(pooled_width: int, pipeline: Any) -> None:
    scale = int(getattr(pipeline, "vae_scale_factor", VAE_SCALE))
    if scale != VAE_SCALE:
        raise UserError(f"vae: its scale is {scale}, SDXL's sizes are given to the UNet for {VAE_SCALE}; use that VAE")
    vae = getattr(pipeline, "vae", None)
    if vae is not None and vae.config.get("latents_mean") is not None:
        raise UserError("vae: latents_mean is not supported; use another VAE")
    encoder = getattr(pipeline, "text_encoder_2", None)
    if encoder is not None and encoder.config.projection_dim != pooled_width:
        raise UserError(
            f"text_encoder_2: projection_dim {encoder.config.projection_dim}, but the UNet takes {pooled_width}; "
            "use the encoder it was trained with"
        )
