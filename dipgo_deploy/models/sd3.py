"""The multimodal transformer of Stable Diffusion 3 and 3.5 (diffusers ``SD3Transformer2DModel``, arXiv 2403.03206).

Two streams, text and picture, meet in the attention of each block.

Granularity ``block``: one joint block is one unit, with a cache for each stream (24 units for SD3-medium and
SD3.5-medium, 38 for SD3.5-large); the last block does not go on with the text and has one. Default cache:
``residual``; on request ``output``.

Granularity ``layer``: of each block the joint attention (``attn``, one unit with a cache for each stream), the second
attention of the picture alone where there is one (``attn2``, the first 13 blocks of SD3.5-medium), and the feed-forward
of the picture (``ff``) and of the text (``ff_context``, not in the last block): 71 units for SD3-medium, 84 for
SD3.5-medium, 113 for SD3.5-large. Cached is what these modules return, before the gate of the current evaluation, as
for the layers of DiT (see ``models/sublayers.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily, TextScheme, TokenizerSpec
from dipgo_deploy.models.image_start import rounded_down
from dipgo_deploy.models.shift import dynamic_shift
from dipgo_deploy.models.sublayers import whole_blocks

CLASS_NAME = "SD3Transformer2DModel"

_CLIP_TOKENS = 77
# `max_sequence_length` of the pipeline.
_T5_TOKENS = 256


def _sublayers(config: Mapping[str, Any]) -> tuple[BlockSpec, ...]:
    """The parts of each block in order of execution; not every block has all of them."""
    count, dual = int(config["num_layers"]), set(config["dual_attention_layers"])
    paths = []
    for index in range(count):
        parts = ["attn", *(["attn2"] if index in dual else []), "ff", *(["ff_context"] if index < count - 1 else [])]
        paths += [f"transformer_blocks.{index}.{part}" for part in parts]
    return tuple(BlockSpec(name=path, modules=(path,)) for path in paths)


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The blocks, or their attentions and feed-forwards, in order."""
    if granularity == "layer":
        return _sublayers(config)
    count = int(config["num_layers"])
    both = ("encoder_hidden_states", "hidden_states")
    whole = whole_blocks("transformer_blocks", count, both)
    return (*whole[:-1], *(replace(last, residual_inputs=both[1:]) for last in whole[-1:]))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent."""
    return int(config["in_channels"])


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Forward inputs: ``hidden_states`` (batch, C, height, width), ``timestep`` (1,), ``encoder_hidden_states``
    (batch, L, D) and ``pooled_projections`` (batch, P).

    ``batch`` counts both halves of guidance; ``text_length`` L is the number of text tokens of all encoders.

    Raises:
        UserError: a size that the patches do not divide or that has no position embedding.
    """
    patch, largest = int(config["patch_size"]), config["pos_embed_max_size"]
    if height % patch or width % patch:
        raise UserError(
            f"{CLASS_NAME}: latent of {height}x{width}; give a height and width whose latent sides are multiples of "
            f"{patch} (multiples of {8 * patch} pixels with the usual VAE)"
        )
    if largest and max(height, width) > largest * patch:
        raise UserError(
            f"{CLASS_NAME}: latent of {height}x{width}: position embeddings end at {largest * patch}; use a smaller "
            "picture"
        )
    text, pooled = int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])
    return (
        InputSpec("hidden_states", (batch, latent_channels(config), height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", (batch, text_length, text), "model", "condition", "text"),
        InputSpec("pooled_projections", (batch, pooled), "model", "condition", "text"),
    )


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """Two CLIP encoders with a projection and T5, as ``StableDiffusion3Pipeline.encode_prompt``.

    The last hidden states but one of the CLIP encoders stand beside each other in the channels, filled up with zeros to
    the width of T5's output, which follows them along the tokens. A pipeline without T5 gives zeros in its place.
    """
    clip_tokens = _CLIP_TOKENS if pipeline is None else int(pipeline.tokenizer_max_length)
    has_t5 = pipeline is not None and getattr(pipeline, "text_encoder_3", None) is not None
    width = int(config["joint_attention_dim"])

    def encode(pipeline: Any, tokens: Mapping[str, Any]) -> Mapping[str, Any]:
        import torch

        encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
        pairs = zip(encoders, (tokens["input_ids"], tokens["input_ids_2"]), strict=True)
        encoded = [encoder(ids, output_hidden_states=True) for encoder, ids in pairs]
        clip = torch.cat([result.hidden_states[-2] for result in encoded], dim=-1)
        clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
        if has_t5:
            t5 = pipeline.text_encoder_3(tokens["input_ids_3"])[0].to(clip.dtype)
        else:
            t5 = clip.new_zeros(clip.shape[0], _T5_TOKENS, width)
        pooled = torch.cat([result.text_embeds for result in encoded], dim=-1)
        return {"encoder_hidden_states": torch.cat([clip, t5], dim=-2), "pooled_projections": pooled}

    tokenizers = [
        TokenizerSpec("tokenizer", clip_tokens, "input_ids"),
        TokenizerSpec("tokenizer_2", clip_tokens, "input_ids_2"),
        TokenizerSpec("tokenizer_3", _T5_TOKENS, "input_ids_3"),
    ]
    names = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    count = 3 if has_t5 else 2
    return TextScheme(
        length=clip_tokens + _T5_TOKENS,
        encode=encode,
        tokenizers=tuple(tokenizers[:count]),
        encoders=tuple(names[:count]),
    )


def set_timesteps(
    config: Mapping[str, Any], scheduler: Mapping[str, Any], height: int, width: int, steps: int
) -> Mapping[str, Any]:
    """``mu`` for a scheduler with dynamic shifting, nothing for SD3's own, whose shift is fixed."""
    if not scheduler.get("use_dynamic_shifting"):
        return {}
    patch = int(config["patch_size"])
    return {"mu": dynamic_shift(scheduler, (height // patch) * (width // patch), max_shift=1.16)}


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("StableDiffusion3Pipeline",),
    models="Stable Diffusion 3, 3.5",
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    text=text,
    set_timesteps=set_timesteps,
    image_to_image=rounded_down,
    size_multiple=lambda config: int(config["patch_size"]),
)
