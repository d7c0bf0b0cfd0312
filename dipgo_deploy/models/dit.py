"""The class-conditioned diffusion transformer (diffusers ``DiTTransformer2DModel``).

Granularity ``block``: one transformer block is one unit. Default cache: ``residual`` (a removed block adds its last
computed change to its current input); on request ``output`` (a removed block's last computed output, whatever its
input is now).

Granularity ``layer``: self-attention (``transformer_blocks.i.attn1``) and feed-forward (``transformer_blocks.i.ff``)
of a block are a unit each, 56 for DiT-XL/2. A block computes ``x += gate_msa * attn1(modulate(norm1(x)))``, then
``x += gate_mlp * ff(modulate(norm3(x)))``. What is cached is the value of ``attn1(...)`` and ``ff(...)``, before the
adaLN gate; the gate of a reused output is that of the current step, and so is the hidden state it is added to. That is
what Learning-to-Cache stores (``att_out`` and ``mlp_out`` of its ``DiTBlock.forward``, which adds
``gate_msa * att_out`` in either case), and SmoothCache, whose helper replaces the forward of exactly these modules
(``attn`` and ``mlp`` in the original DiT code, ``attn1`` in diffusers' block).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.defaults import class_defaults
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily
from dipgo_deploy.models.sublayers import sublayers

CLASS_NAME = "DiTTransformer2DModel"

_DEFAULTS = class_defaults(CLASS_NAME)


def _get(config: Mapping[str, Any], key: str) -> int:
    return int(config.get(key, _DEFAULTS[key]))


def _modules(index: int) -> tuple[str, ...]:
    path = f"transformer_blocks.{index}"
    # The model's head reads the embedding inside block 0 (`norm1.emb`), so that one does not go when block 0 goes.
    first = (f"{path}.norm1.linear", f"{path}.norm1.norm", f"{path}.attn1", f"{path}.norm3", f"{path}.ff")
    return (path,) if index else first


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The blocks, or their attentions and feed-forwards, in order. Raises UserError for any other granularity."""
    if granularity == "layer":
        return sublayers("transformer_blocks", _get(config, "num_layers"), ("attn1", "ff"))
    if granularity != "block":
        raise UserError(f"{CLASS_NAME}: unknown granularity {granularity!r}: use 'block' or 'layer'")
    return tuple(
        BlockSpec(
            name=f"transformer_blocks.{index}",
            modules=_modules(index),
            caches=("residual", "output"),
            residual_inputs=("hidden_states",),
        )
        for index in range(_get(config, "num_layers"))
    )


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent; what the model returns beyond them is a learned variance."""
    return _get(config, "in_channels")


def inputs(
    config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int | None = None
) -> tuple[InputSpec, ...]:
    """Forward inputs: ``hidden_states`` (batch, C, height, width), ``timestep`` (1,), ``class_labels`` (batch,).

    ``batch`` counts both halves of guidance; ``text_length`` is not used. The null class is the last one.

    Raises:
        UserError: height and width are not equal multiples of the patch size (the model cuts its tokens into a square).
    """
    patch = _get(config, "patch_size")
    if height != width or height % patch:
        raise UserError(f"{CLASS_NAME}: latent of {height}x{width}: give a square whose side is a multiple of {patch}")
    return (
        InputSpec("hidden_states", (batch, latent_channels(config), height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("class_labels", (batch,), "int64", "condition", "class", _get(config, "num_embeds_ada_norm")),
    )


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("DiTPipeline",),
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
)
