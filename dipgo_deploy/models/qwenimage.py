"""The transformer of Qwen-Image (diffusers ``QwenImageTransformer2DModel``; arXiv 2508.02324).

Picture and text go through all blocks as two streams, as in FLUX's double blocks; the latent is packed 2x2 into tokens.

Granularity ``block``: one block is one unit with a cache for each stream, 60 for Qwen-Image. Default cache:
``residual``; on request ``output``.

Granularity ``layer``: of each block the joint attention (``attn``, a cache for each stream) and the feed-forwards of
picture (``img_mlp``) and text (``txt_mlp``), 180 for Qwen-Image. Cached is what these modules return, before the gate
of the current evaluation.

Its guidance keeps the norm that each token of the conditional prediction has (``models/guidance.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily, TextScheme, TokenizerSpec
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.guidance import Guidance, renormalised
from dipgo_deploy.models.joined import FOLLOWED
from dipgo_deploy.models.packed import PACK, check_even, pack, set_timesteps, unpack
from dipgo_deploy.models.rotary import rotate, turns
from dipgo_deploy.models.sublayers import sublayers, whole_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "QwenImageTransformer2DModel"

_STATES, _MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
# The default `max_sequence_length` of the pipeline's call.
_TOKENS = 512
# Timesteps of the scheduler a unit of the model's.
_TIMESTEPS = 1000
# Settings of Edit 2511, Layered and of models distilled from guidance, whose further inputs are not there.
_OTHERS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The blocks, or their attentions and feed-forwards, in order."""
    count = int(config["num_layers"])
    if granularity == "layer":
        return sublayers("transformer_blocks", count, ("attn", "img_mlp", "txt_mlp"))
    return whole_blocks("transformer_blocks", count, ("encoder_hidden_states", "hidden_states"))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent. Raises UserError when the model takes more than the latent."""
    into, patch = int(config["in_channels"]), int(config["patch_size"])
    out = int(config.get("out_channels") or into)
    if patch != PACK or into != out * PACK**2:
        raise UserError(
            f"{CLASS_NAME}: in_channels {into}, out_channels {out}, patch_size {patch}: only models whose input is "
            "the latent packed 2x2 work"
        )
    return out


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Inputs: ``hidden_states`` (batch, C, height, width), ``timestep`` (1,), ``encoder_hidden_states`` (batch, L, D)
    and ``encoder_hidden_states_mask`` int64 (batch, L) with 1 for a token.

    Raises:
        UserError: an odd height or width, or a model that needs another input.
    """
    channels = latent_channels(config)
    for name in _OTHERS:
        if config[name]:
            raise UserError(f"{CLASS_NAME}: {name} = {config[name]} is not supported; use a model from text alone")
    check_even(CLASS_NAME, height, width)
    features = int(config["joint_attention_dim"])
    return (
        InputSpec("hidden_states", (batch, channels, height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec(_STATES, (batch, text_length, features), "model", "condition", "text"),
        InputSpec(_MASK, (batch, text_length), "int64", "condition", "text"),
    )


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, h, w) from the latent (B, C, h, w), packed on the way in and unpacked on the way out."""
    rows, columns = latent.shape[2] // PACK, latent.shape[3] // PACK
    others = dict(conditions)
    tokens, followed = pack(latent), others.pop(FOLLOWED, None)
    if followed is not None:
        import torch

        tokens = torch.cat([tokens, pack(followed.to(latent.dtype))], dim=1)
    shapes = [(1, rows, columns)] * (1 if followed is None else 2)
    timestep = timestep / _TIMESTEPS
    with _real_rotations(model, others[_STATES].shape[1], rows, columns, len(shapes)), _unrounded(model, timestep):
        predicted = model(
            hidden_states=tokens,
            timestep=timestep,
            img_shapes=[shapes] * latent.shape[0],
            return_dict=False,
            **others,
        )[0]
    return unpack(predicted if followed is None else predicted[:, : rows * columns], rows, columns)


@contextmanager
def _unrounded(model: nn.Module, timestep: Tensor) -> Iterator[None]:
    """Inside the context the sinusoids are those of the timestep in float32; the model rounds it, and the frequencies,
    to its own dtype first."""
    embed = model.get_submodule("time_text_embed.time_proj")
    hook = embed.register_forward_pre_hook(lambda *_: (timestep.float(),))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _real_rotations(model: nn.Module, length: int, rows: int, columns: int, pictures: int = 1) -> Iterator[None]:
    """Inside the context the rotary tables are constants, and products of complex numbers are written out: no graph
    knows complex numbers.

    The tokens of each picture are counted from its middle, those of the text from behind it, along all axes alike.
    """
    from diffusers.models.transformers import transformer_qwenimage

    embed: Any = model.pos_embed
    down, right = np.meshgrid(_from_middle(rows), _from_middle(columns), indexing="ij")
    picture = np.concatenate(
        [np.stack([np.full(rows * columns, place), down.flat, right.flat], axis=1) for place in range(pictures)]
    )
    text = np.repeat(max(rows // 2, columns // 2) + np.arange(length)[:, None], 3, axis=1)

    def tables(*_: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return turns(picture, embed.axes_dim, embed.theta), turns(text, embed.axes_dim, embed.theta)

    def rotated(features: Tensor, table: Tensor, use_real: bool = True) -> Tensor:
        return rotate(features, table.to(features.device))

    with replaced_forward(embed, tables), mock.patch.object(transformer_qwenimage, "apply_rotary_emb_qwen", rotated):
        yield


def _from_middle(count: int) -> np.ndarray:
    return np.arange(count) - (count - count // 2)


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """The last hidden state of Qwen 2.5 VL for the pipeline's instruction around a prompt, without the tokens that come
    before the prompt: at most 512 tokens, and their mask."""
    around, skipped = ("", ""), 0
    if pipeline is not None:
        before, _, after = str(pipeline.prompt_template_encode).partition("{}")
        around, skipped = (before, after), int(pipeline.prompt_template_encode_start_idx)

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        model = pipeline.text_encoder.model.language_model
        states = model(ids, attention_mask=mask, use_cache=False).last_hidden_state[:, skipped:]
        seen = mask[:, skipped:]
        return {_STATES: states * seen[..., None].to(states.dtype), _MASK: seen}

    return TextScheme(
        length=_TOKENS,
        encode=encode,
        tokenizers=(TokenizerSpec(length=_TOKENS + skipped, mask="attention_mask"),),
        around=around,
    )


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipeline hands to ``forward``, whose text is as long as the longest prompt, filled up to 512 tokens."""
    return kwargs["hidden_states"], kwargs["timestep"], filled(kwargs, _TOKENS)


def filled(kwargs: Mapping[str, Any], tokens: int) -> dict[str, Tensor]:
    """States and mask of a text that the pipeline hands to ``forward``, filled up to so many tokens."""
    import torch

    states, mask = kwargs[_STATES], kwargs[_MASK]
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.int64)
    missing = tokens - states.shape[1]
    return {
        _STATES: torch.nn.functional.pad(states, (0, 0, 0, missing)),
        _MASK: torch.nn.functional.pad(mask.to(torch.int64), (0, missing)),
    }


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("QwenImagePipeline",),
    models="Qwen-Image",
    refused=("Layered",),
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    call=call,
    text=text,
    guide=Guidance(combine=renormalised, argument="true_cfg_scale", order="separate", only_with_negative=True),
    given=given,
    set_timesteps=set_timesteps,
    # Run in bfloat16 by those who run the rest in float16: Qwen 2.5 has activations beyond it.
    float32_in_fp16=("text_encoder", "vae"),
)
