"""AuraFlow, and Pony V7 on top of it (diffusers ``AuraFlowTransformer2DModel``).

Text and picture are two streams in the first blocks and one sequence in the rest.

Granularity ``block``: 4 joint blocks (``joint_transformer_blocks.i``, with a cache for each stream), then 32 single
ones (``single_transformer_blocks.i``): 36 units. Default cache: ``residual``; on request ``output``.

Granularity ``layer``: of a joint block the attention of both streams (``attn``, one unit with a cache for each) and the
feed-forwards of picture (``ff``) and text (``ff_context``), of a single one its attention (``attn``) and feed-forward
(``ff``): 76 units. A block computes ``x += gate_mlp * ff(modulate(norm2(x + gate_msa * attn(modulate(norm1(x))))))``:
what the attention gives goes through the feed-forward only. Cached is what these modules return, before the gate, which
is always that of the current evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import (
    BlockSpec,
    Granularity,
    InputSpec,
    ModelFamily,
    TextScheme,
    TokenizerSpec,
    call_with_keywords,
)
from dipgo_deploy.models.sublayers import sublayers, whole_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "AuraFlowTransformer2DModel"

_JOINT, _SINGLE = "joint_transformer_blocks", "single_transformer_blocks"
# `max_sequence_length` of the pipeline.
_TOKENS = 256
# Timesteps of the scheduler a unit of the model's.
_TIMESTEPS = 1000


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The joint blocks and then the single ones, or their parts, in order of execution."""
    joint, single = int(config["num_mmdit_layers"]), int(config["num_single_dit_layers"])
    if granularity == "layer":
        return (*sublayers(_JOINT, joint, ("attn", "ff", "ff_context")), *sublayers(_SINGLE, single, ("attn", "ff")))
    both = ("encoder_hidden_states", "hidden_states")
    return (*whole_blocks(_JOINT, joint, both), *whole_blocks(_SINGLE, single))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent."""
    return int(config["in_channels"])


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Forward inputs: ``hidden_states`` (batch, C, height, width), ``timestep`` (1,) and ``encoder_hidden_states``
    (batch, L, D).

    ``batch`` counts both halves of guidance; ``text_length`` L is the number of text tokens.

    Raises:
        UserError: height or width is no multiple of the patch size, or has no position embedding.
    """
    patch, largest = int(config["patch_size"]), isqrt(int(config["pos_embed_max_size"]))
    if height % patch or width % patch:
        raise UserError(f"{CLASS_NAME}: latent of {height}x{width}; give multiples of {patch}")
    if max(height, width) > largest * patch:
        raise UserError(
            f"{CLASS_NAME}: latent of {height}x{width}: position embeddings end at {largest * patch}; use a smaller "
            "picture"
        )
    features = int(config["joint_attention_dim"])
    return (
        InputSpec("hidden_states", (batch, latent_channels(config), height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", (batch, text_length, features), "model", "condition", "text"),
    )


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, h, w); the model's timesteps go from 0 to 1."""
    return call_with_keywords(model, latent, timestep / _TIMESTEPS, conditions)


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """The last hidden state of a T5 encoder, zero where there is no token."""

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        mask = tokens["attention_mask"]
        states = pipeline.text_encoder(tokens["input_ids"], attention_mask=mask)[0]
        return {"encoder_hidden_states": states * mask.unsqueeze(-1)}

    return TextScheme(length=_TOKENS, encode=encode, tokenizers=(TokenizerSpec(length=_TOKENS, mask="attention_mask"),))


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("AuraFlowPipeline",),
    models="AuraFlow, Pony V7",
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    call=call,
    text=text,
    float32_in_fp16=("text_encoder", "vae"),
    size_multiple=lambda config: int(config["patch_size"]),
)
