"""The class-conditioned diffusion transformer (diffusers ``DiTTransformer2DModel``).

Granularity ``block``: one transformer block is one unit. Default cache: ``residual`` (a removed block adds its last
computed change to its current input); on request ``output`` (a removed block's last computed output, whatever its
input is now).

Granularity ``layer``: self-attention (``transformer_blocks.i.attn1``) and feed-forward (``transformer_blocks.i.ff``)
of a block are a unit each, 56 for DiT-XL/2. A block computes ``x += gate_msa * attn1(modulate(norm1(x)))``, then
``x += gate_mlp * ff(modulate(norm3(x)))``. What is cached is the value of ``attn1(...)`` and ``ff(...)``, before the
adaLN gate; the gate of a reused output is that of the current evaluation, and so is the hidden state it is added to.
That is what Learning-to-Cache stores (``att_out`` and ``mlp_out`` of its ``DiTBlock.forward``, which adds
``gate_msa * att_out`` in either case), and SmoothCache, whose helper replaces the forward of exactly these modules
(``attn`` and ``mlp`` in the original DiT code, ``attn1`` in diffusers' block).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily
from dipgo_deploy.models.guidance import Guidance
from dipgo_deploy.models.sublayers import sublayers, whole_blocks

CLASS_NAME = "DiTTransformer2DModel"


# The model's head reads the embedding inside block 0 (`norm1.emb`), so that one does not go when block 0 goes.
_FIRST = tuple(f"transformer_blocks.0.{part}" for part in ("norm1.linear", "norm1.norm", "attn1", "norm3", "ff"))


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The blocks, or their attentions and feed-forwards, in order."""
    if granularity == "layer":
        return sublayers("transformer_blocks", int(config["num_layers"]), ("attn1", "ff"))
    whole = whole_blocks("transformer_blocks", int(config["num_layers"]))
    return (*(replace(first, modules=_FIRST) for first in whole[:1]), *whole[1:])


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent; what the model returns beyond them is a learned variance."""
    return int(config["in_channels"])


def inputs(
    config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int | None = None
) -> tuple[InputSpec, ...]:
    """Forward inputs: ``hidden_states`` (batch, C, height, width), ``timestep`` (1,), ``class_labels`` (batch,).

    ``batch`` counts both halves of guidance; ``text_length`` is not used. The null class is the last one.

    Raises:
        UserError: height and width are not equal multiples of the patch size (the model cuts its tokens into a square).
    """
    patch = int(config["patch_size"])
    if height != width or height % patch:
        raise UserError(f"{CLASS_NAME}: latent of {height}x{width}; give a square whose side is a multiple of {patch}")
    return (
        InputSpec("hidden_states", (batch, latent_channels(config), height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("class_labels", (batch,), "int64", "condition", "class", int(config["num_embeds_ada_norm"])),
    )


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("DiTPipeline",),
    guide=Guidance(order="conditional first"),
    models="DiT",
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
)
