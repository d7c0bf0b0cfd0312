"""Sana, the linear diffusion transformer (diffusers ``SanaTransformer2DModel``; arXiv 2410.10629).

Granularity ``block``: one transformer block is one unit, 20 for Sana-1.6B. Default cache: ``residual`` (a removed block
adds its last computed change to its current input); on request ``output``.

Granularity ``layer``: linear self-attention (``attn1``), cross-attention (``attn2``) and convolutional feed-forward
(``ff``) of a block are a unit each, 60 for Sana-1.6B. A block computes
``x += gate_msa * attn1(modulate(norm1(x)))``, ``x += attn2(x, text)``, ``x += gate_mlp * ff(modulate(norm2(x)))``. What
is cached is what the three modules return, before the gate, which is always that of the current evaluation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

CLASS_NAME = "SanaTransformer2DModel"

# The default `max_sequence_length` of SanaPipeline.
_TEXT_LENGTH = 300


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The blocks, or their attentions and feed-forwards, in order."""
    count = int(config["num_layers"])
    if granularity == "layer":
        return sublayers("transformer_blocks", count, ("attn1", "attn2", "ff"))
    return whole_blocks("transformer_blocks", count)


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent."""
    return int(config["in_channels"])


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Forward inputs: ``hidden_states`` (batch, C, height, width), ``timestep`` (1,), ``encoder_hidden_states`` (batch,
    L, D), ``encoder_attention_mask`` int64 (batch, L) with 1 for a token.

    ``batch`` counts both halves of guidance; ``text_length`` L is the number of text tokens.

    Raises:
        UserError: a model that was distilled from guidance (Sana-Sprint), or height or width is no multiple of the
            patch size.
    """
    if config.get("guidance_embeds"):
        raise UserError(f"{CLASS_NAME}: guidance_embeds (Sana-Sprint) is not supported; use a Sana model without it")
    patch = int(config["patch_size"])
    if height % patch or width % patch:
        raise UserError(f"{CLASS_NAME}: latent of {height}x{width}; give multiples of {patch}")
    features = int(config["caption_channels"])
    return (
        InputSpec("hidden_states", (batch, latent_channels(config), height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", (batch, text_length, features), "model", "condition", "text"),
        InputSpec("encoder_attention_mask", (batch, text_length), "int64", "condition", "text"),
    )


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, h, w); the model may want its timesteps scaled."""
    config: Any = model.config
    with _any_size(model.get_submodule("patch_embed"), latent):
        return call_with_keywords(model, latent, timestep * config.timestep_scale, conditions)


@contextmanager
def _any_size(patches: Any, latent: Tensor) -> Iterator[None]:
    """Position embeddings computed at every size that a trace leaves open.

    The module has those of the native size ready, and a trace that asks whether the size is that one is good for no
    range that it is in.
    """
    native = patches.height, patches.width
    if not all(isinstance(extent, int) for extent in latent.shape[2:]):
        patches.height = patches.width = 0
    try:
        yield
    finally:
        patches.height, patches.width = native


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """The last hidden state of a language model (Gemma 2) and its mask; prompts are lowered and stripped.

    As in SanaPipeline, the "complex human instruction" (its default) is put before a prompt: the model reads both, and
    the denoiser gets the first token and the last ones. A negative prompt has none and is read from the start.
    """
    prefix = "" if pipeline is None else _instruction(pipeline)
    opening: list[int] = pipeline.tokenizer.encode(prefix) if prefix else []
    length = len(opening) + _TEXT_LENGTH - 2 if prefix else _TEXT_LENGTH

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        import torch

        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        states = pipeline.text_encoder(ids, attention_mask=mask, use_cache=False)[0]
        if prefix:
            # The instruction's last token may have merged with the prompt's first. No token sees what is behind it, so
            # that the padding of a negative prompt to the longer text changes nothing.
            instructed = (ids[:, : len(opening) - 2] == torch.tensor(opening[:-2])).all(dim=1)
            chosen = torch.tensor([0, *range(length - _TEXT_LENGTH + 1, length)])
            states = torch.where(instructed[:, None, None], states[:, chosen], states[:, :_TEXT_LENGTH])
            mask = torch.where(instructed[:, None], mask[:, chosen], mask[:, :_TEXT_LENGTH])
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    return TextScheme(
        length=_TEXT_LENGTH,
        encode=encode,
        tokenizers=(TokenizerSpec(length=length, mask="attention_mask"),),
        lowercase=True,
        prefix=prefix,
    )


def _instruction(pipeline: Any) -> str:
    """The default of the pipeline's own argument."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("complex_human_instruction")
    return "\n".join(parameter.default or ()) if parameter is not None else ""


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("SanaPipeline",),
    models="Sana",
    refused=("Sana-Sprint",),
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    call=call,
    text=text,
    # Gemma 2 and DC-AE are run in bfloat16 by those who run the rest in float16.
    float32_in_fp16=("text_encoder", "vae"),
    size_multiple=lambda config: int(config["patch_size"]),
)
