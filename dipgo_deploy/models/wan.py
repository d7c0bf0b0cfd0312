"""Wan, a video diffusion transformer (diffusers ``WanTransformer3DModel``; arXiv 2503.20314): text to video.

``TWO``: Wan 2.2's two experts, one for high and one for low noise (``models/denoisers.py``).

The latent has a time axis, (B, C, f, h, w). Granularity ``block``: one transformer block is one unit, 30 for the model
of 1.3B, 40 for that of 14B. Default cache: ``residual`` (a removed block adds its last computed change to its current
input); on request ``output``. MagCache and TeaCache skip all blocks of an evaluation at once.

Granularity ``layer``: self-attention over all frames (``attn1``), cross-attention (``attn2``) and feed-forward
(``ffn``) of a block are a unit each, 90 for the model of 1.3B. Cached is what these modules return, before the gate of
the current evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.denoisers import with_second
from dipgo_deploy.models.family import (
    BlockSpec,
    Granularity,
    InputSpec,
    ModelFamily,
    TextScheme,
    TokenizerSpec,
)
from dipgo_deploy.models.guidance import Guidance
from dipgo_deploy.models.sublayers import sublayers, whole_blocks
from dipgo_deploy.models.wan_time import time_embeddings

if TYPE_CHECKING:
    from torch import Tensor

CLASS_NAME = "WanTransformer3DModel"

# The default `max_sequence_length` of WanPipeline's call.
_TEXT_LENGTH = 512


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The blocks, or their attentions and feed-forwards, in order."""
    count = int(config["num_layers"])
    if granularity == "layer":
        return sublayers("blocks", count, ("attn1", "attn2", "ffn"))
    return whole_blocks("blocks", count)


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent. Raises UserError for a model that takes more than the latent (image to video)."""
    into, out = int(config["in_channels"]), int(config["out_channels"] or config["in_channels"])
    if into != out or config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise UserError(
            f"{CLASS_NAME}: in_channels {into}, out_channels {out}, image_dim {config.get('image_dim')}: starts from a "
            "picture; give the folder of its pipeline, WanImageToVideoPipeline"
        )
    return into


def inputs(
    config: Mapping[str, Any], batch: int, frames: int, height: int, width: int, text_length: int
) -> tuple[InputSpec, ...]:
    """Forward inputs: ``hidden_states`` (batch, C, frames, height, width), ``timestep`` (1,), ``encoder_hidden_states``
    (batch, L, D).

    ``batch`` counts both halves of guidance; ``text_length`` L is the number of text tokens.

    Raises:
        UserError: a size that the patches do not divide, or more patches along one axis than there are positions.
    """
    size, patches = (frames, height, width), config["patch_size"]
    if any(extent % patch for extent, patch in zip(size, patches, strict=True)):
        raise UserError(f"{CLASS_NAME}: latent of {_times(size)}; give multiples of {_times(patches)}")
    most = int(config["rope_max_seq_len"])
    if any(extent // patch > most for extent, patch in zip(size, patches, strict=True)):
        raise UserError(f"{CLASS_NAME}: latent of {_times(size)}; has positions for {most} patches along an axis")
    return (
        InputSpec("hidden_states", (batch, latent_channels(config), *size), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", (batch, text_length, int(config["text_dim"])), "model", "condition", "text"),
    )


def _times(extents: Any) -> str:
    return "x".join(map(str, extents))


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """The last hidden state of UMT5, with zeros in the place of padding.

    As in WanPipeline prompts are unescaped; what its optional package ftfy repairs stays as it is.
    """

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        mask = tokens["attention_mask"]
        states = pipeline.text_encoder(tokens["input_ids"], mask).last_hidden_state
        return {"encoder_hidden_states": states * mask[..., None].to(states.dtype)}

    return TextScheme(
        length=_TEXT_LENGTH,
        encode=encode,
        tokenizers=(TokenizerSpec(length=_TEXT_LENGTH, mask="attention_mask"),),
        unescape=True,
    )


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("WanPipeline",),
    models="Wan 2.1, and 2.2 5B, text to video",
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    text=text,
    guide=Guidance(order="separate"),
    # Those who run the rest in float16 run UMT5 in bfloat16 and the VAE in float32.
    float32_in_fp16=("text_encoder", "vae"),
    frames_per_latent=4,
    fps=16,
    time_embeddings=time_embeddings,
)
TWO = with_second(FAMILY, models="Wan 2.2 text to video (two experts)")
