"""LTX-Video, a video diffusion transformer (diffusers ``LTXVideoTransformer3DModel``; arXiv 2501.00103): text to video.

The pipeline hands the model a latent whose pixels are tokens, its extents, and how far apart they are in time and
space; here that happens inside ``call``, so that the latent is (B, 128, f, h, w) as the VAE wants it.

Granularity ``block``: one transformer block is one unit, 28 for the model of 2B. Default cache: ``residual`` (a removed
block adds its last computed change to its current input); on request ``output``.

Granularity ``layer``: self-attention over all frames (``attn1``), cross-attention (``attn2``) and feed-forward (``ff``)
of a block are a unit each, 84 for the model of 2B. Cached is what these modules return, before the gate of the current
evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily, TextScheme, TokenizerSpec
from dipgo_deploy.models.rotary import precomputed
from dipgo_deploy.models.shift import dynamic_shift
from dipgo_deploy.models.sublayers import sublayers, whole_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "LTXVideoTransformer3DModel"

# The default `max_sequence_length` of LTXPipeline's call, and its `frame_rate`.
_TEXT_LENGTH = 128
_FRAME_RATE = 25
# Of the VAE: frames and pixels to one of the latent.
_TIME_SCALE, _SCALE = 8, 32
# How far pixels of the latent are apart: seconds and pixels.
_APART = (_TIME_SCALE / _FRAME_RATE, _SCALE, _SCALE)


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The blocks, or their attentions and feed-forwards, in order."""
    count = int(config["num_layers"])
    if granularity == "layer":
        return sublayers("transformer_blocks", count, ("attn1", "attn2", "ff"))
    return whole_blocks("transformer_blocks", count)


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent. Raises UserError for a model that takes more than one pixel of the latent as a token."""
    into, out = int(config["in_channels"]), int(config["out_channels"] or config["in_channels"])
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    if into != out or (patch, patch_t) != (1, 1):
        raise UserError(
            f"{CLASS_NAME}: in_channels {into}, out_channels {out}, patch_size {patch}, patch_size_t {patch_t}: only"
            "  models whose tokens are the latent's pixels work"
        )
    return into


def inputs(
    config: Mapping[str, Any], batch: int, frames: int, height: int, width: int, text_length: int
) -> tuple[InputSpec, ...]:
    """Inputs: ``hidden_states`` (batch, C, frames, height, width), ``timestep`` (1,), ``encoder_hidden_states`` (batch,
    L, D), ``encoder_attention_mask`` int64 (batch, L) with 1 for a token.

    ``batch`` counts both halves of guidance; ``text_length`` L is the number of text tokens.
    """
    features = int(config["caption_channels"])
    return (
        InputSpec("hidden_states", (batch, latent_channels(config), frames, height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", (batch, text_length, features), "model", "condition", "text"),
        InputSpec("encoder_attention_mask", (batch, text_length), "int64", "condition", "text"),
    )


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, f, h, w) from the latent (B, C, f, h, w), whose pixels become tokens and pixels again."""
    import torch

    extents = tuple(latent.shape[2:])
    # Made for one row of the batch.
    with precomputed(model.get_submodule("rope"), lambda: (torch.empty(1), *extents, _APART)):
        predicted: Tensor = model(
            hidden_states=latent.flatten(2).transpose(1, 2), timestep=timestep, return_dict=False, **conditions
        )[0]
    return predicted.transpose(1, 2).unflatten(2, extents)


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipeline hands to ``forward``, whose latent is tokens (B, T, C)."""
    return kwargs["hidden_states"], kwargs["timestep"], given_text(kwargs)


def given_text(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of these arguments the conditions of a text. Raises UserError for positions of another frame rate."""
    apart = kwargs.get("rope_interpolation_scale") or _APART
    if tuple(apart) != _APART:
        raise UserError(f"frame_rate {_TIME_SCALE / apart[0]:g}: {CLASS_NAME} is told {_FRAME_RATE}; leave it out")
    return {name: kwargs[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """T5's hidden states of all tokens, padding too, and the mask."""

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        states = pipeline.text_encoder(tokens["input_ids"])[0]
        return {"encoder_hidden_states": states, "encoder_attention_mask": tokens["attention_mask"]}

    return TextScheme(
        length=_TEXT_LENGTH,
        encode=encode,
        tokenizers=(TokenizerSpec(length=_TEXT_LENGTH, mask="attention_mask"),),
    )


def set_timesteps(
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    frames: int,
    height: int,
    width: int,
    steps: int,
) -> Mapping[str, Any]:
    """The pipeline's own ``sigmas`` unless the scheduler makes flow sigmas itself, and ``mu`` for the number of tokens
    where it does anything."""
    options: dict[str, Any] = {}
    if not scheduler.get("use_flow_sigmas"):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps).tolist()
    if scheduler.get("use_dynamic_shifting"):
        options["mu"] = dynamic_shift(scheduler, frames * height * width, max_shift=1.15)
    return options


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("LTXPipeline",),
    models="LTX-Video 0.9.0 text to video",
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    call=call,
    given=given,
    text=text,
    set_timesteps=set_timesteps,
    float32_in_fp16=("text_encoder", "vae"),
    frames_per_latent=_TIME_SCALE,
    fps=_FRAME_RATE,
    pixels_per_latent=_SCALE,
    scales_fixed=True,
)
