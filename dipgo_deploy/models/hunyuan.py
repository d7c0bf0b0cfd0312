"""HunyuanVideo's transformer (diffusers ``HunyuanVideoTransformer3DModel``; arXiv 2412.03603): text to video.

Video and text go through the ``double`` blocks as two streams and through the ``single`` blocks as one sequence,
which diffusers cuts in two again behind every block: all blocks return two tensors, the video's first. What refines
the text in front of them is computed whenever it is needed: it depends on the timestep.

Granularity ``block``: 20 double blocks (``transformer_blocks.i``), then 40 single ones
(``single_transformer_blocks.i``): 60 units. Default cache: ``residual``; on request ``output``.

Granularity ``layer``: of a double block the joint attention (``attn``, a cache for each stream) and the feed-forwards
of video (``ff``) and text (``ff_context``); of a single block its feed-forward (``proj_mlp``), its attention
(``attn``) and the projection in which both end (``proj_out``): 180 units. Cached is what these modules return, before
the gate of the current evaluation.

The model is distilled from guidance: the scale is a condition, and there is no second half of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

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
from dipgo_deploy.models.flux import single_units
from dipgo_deploy.models.rotary import precomputed
from dipgo_deploy.models.sublayers import sublayers, whole_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "HunyuanVideoTransformer3DModel"

_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
# The default `max_sequence_length` of the pipeline, and what of Llama's states the prompt's template takes.
_TEXT_LENGTH = 256
_CLIP_TOKENS = 77
# Llama's layers whose work is not used: the states are those in front of them.
_SKIPPED_LAYERS = 2
# The pipeline hands the model its guidance scale times this.
_GUIDANCE = 1000.0


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The double blocks and then the single ones, or their parts, in order of execution."""
    doubles, singles = int(config["num_layers"]), int(config["num_single_layers"])
    if granularity == "layer":
        return (*sublayers(_DOUBLE, doubles, ("attn", "ff", "ff_context")), *chain(*map(single_units, range(singles))))
    both = ("hidden_states", "encoder_hidden_states")
    return (*whole_blocks(_DOUBLE, doubles, both), *whole_blocks(_SINGLE, singles, both))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent. Raises UserError for a model that starts from a picture."""
    into, out = int(config["in_channels"]), int(config["out_channels"] or config["in_channels"])
    if into != out or config.get("image_condition_type") is not None:
        raise UserError(
            f"{CLASS_NAME}: in_channels {into}, out_channels {out}, image_condition_type "
            f"{config.get('image_condition_type')}: models that start from a picture are not supported; use a "
            "text-to-video model"
        )
    return into


def inputs(
    config: Mapping[str, Any], batch: int, frames: int, height: int, width: int, text_length: int
) -> tuple[InputSpec, ...]:
    """Inputs: ``hidden_states`` (batch, C, frames, height, width), ``timestep`` (1,), ``encoder_hidden_states`` (batch,
    L, D), ``encoder_attention_mask`` int64 (batch, L), ``pooled_projections`` (batch, P) and, with ``guidance_embeds``,
    ``guidance`` (batch,), the scale as users give it.

    Raises:
        UserError: a size that the patches do not divide.
    """
    size, patch = (frames, height, width), int(config["patch_size"])
    patches = (int(config["patch_size_t"]), patch, patch)
    if any(extent % each for extent, each in zip(size, patches, strict=True)):
        whole, parts = ("x".join(map(str, extents)) for extents in (size, patches))
        raise UserError(f"{CLASS_NAME}: latent of {whole}; give multiples of {parts}")
    text, pooled = int(config["text_embed_dim"]), int(config["pooled_projection_dim"])
    guidance = InputSpec("guidance", (batch,), "float32", "condition", "guidance")
    return (
        InputSpec("hidden_states", (batch, latent_channels(config), *size), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", (batch, text_length, text), "model", "condition", "text"),
        InputSpec("encoder_attention_mask", (batch, text_length), "int64", "condition", "text"),
        InputSpec("pooled_projections", (batch, pooled), "model", "condition", "text"),
        *((guidance,) if config["guidance_embeds"] else ()),
    )


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, f, h, w) from the latent (B, C, f, h, w)."""
    import torch

    given = dict(conditions)
    if "guidance" in given:
        given["guidance"] = given["guidance"] * _GUIDANCE
    shape = tuple(latent.shape)
    with precomputed(model.get_submodule("rope"), lambda: (torch.empty(()).expand(shape),)):
        return call_with_keywords(model, latent, timestep, given)


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipeline hands to ``forward``, with the guidance scale as users give it."""
    names = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance")
    conditions = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    if "guidance" in conditions:
        conditions["guidance"] = conditions["guidance"] / _GUIDANCE
    return kwargs["hidden_states"], kwargs["timestep"], conditions


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """Llama's states of the prompt in the pipeline's template, the template's own cut off, and CLIP's pooled output."""
    template = {} if pipeline is None else _template(pipeline)
    before, _, after = template.get("template", "").partition("{}")
    cut = int(template.get("crop_start") or 0)

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        found = pipeline.text_encoder(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return {
            "encoder_hidden_states": found.hidden_states[-(_SKIPPED_LAYERS + 1)][:, cut:],
            "encoder_attention_mask": mask[:, cut:],
            "pooled_projections": pipeline.text_encoder_2(tokens["input_ids_2"]).pooler_output,
        }

    return TextScheme(
        length=_TEXT_LENGTH,
        encode=encode,
        tokenizers=(
            TokenizerSpec("tokenizer", _TEXT_LENGTH + cut, "input_ids", "attention_mask"),
            TokenizerSpec("tokenizer_2", _CLIP_TOKENS, "input_ids_2", plain=True),
        ),
        encoders=("text_encoder", "text_encoder_2"),
        around=(before, after),
    )


def _template(pipeline: Any) -> Mapping[str, Any]:
    """The default of the pipeline's own argument.

    Raises:
        UserError: one that does not say how much of it is cut off.
    """
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("prompt_template")
    template: Mapping[str, Any] = {} if parameter is None else parameter.default
    if template and not template.get("crop_start"):
        raise UserError(f"{type(pipeline).__name__}: its prompt_template has no crop_start; use another diffusers")
    return template


def set_timesteps(
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    frames: int,
    height: int,
    width: int,
    steps: int,
) -> Mapping[str, Any]:
    """The pipeline's own ``sigmas``; DPM-Solver takes none, and the pipeline cannot be run with it."""
    return {} if "algorithm_type" in scheduler else {"sigmas": np.linspace(1.0, 0.0, steps + 1)[:-1].tolist()}


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("HunyuanVideoPipeline",),
    models="HunyuanVideo text to video",
    refused=("HunyuanVideo image to video",),
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    call=call,
    given=given,
    text=text,
    guidance=False,
    set_timesteps=set_timesteps,
    frames_per_latent=4,
    fps=24,
)
