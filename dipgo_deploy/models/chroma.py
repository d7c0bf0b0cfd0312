"""The transformer of Chroma (diffusers ``ChromaTransformer2DModel``), FLUX.1 whose modulation one small network makes.

Granularity ``block``: 19 double blocks and then 38 single ones, as FLUX.1; granularity ``layer``: their parts, 171
units. It is guided, takes the states of T5 alone, and tells padding from text by a mask, of which the first token of
padding is a part. diffusers' model adds that mask to the scores of attention, 1 for a pair of tokens that are both
seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily, TextScheme, TokenizerSpec
from dipgo_deploy.models.flux import rotary_table, single_units
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.guidance import Guidance
from dipgo_deploy.models.packed import PACK, channels_of_tokens, check_even, pack, set_timesteps, unpack
from dipgo_deploy.models.sublayers import sublayers, whole_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "ChromaTransformer2DModel"

_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
_STATES, _MASK = "encoder_hidden_states", "attention_mask"
# `max_sequence_length` of the pipeline.
_TOKENS = 512
# Timesteps of the scheduler a unit of the model's.
_TIMESTEPS = 1000


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The double blocks and then the single ones, or their parts, in order of execution."""
    doubles, singles = int(config["num_layers"]), int(config["num_single_layers"])
    if granularity == "layer":
        return (*sublayers(_DOUBLE, doubles, ("attn", "ff", "ff_context")), *chain(*map(single_units, range(singles))))
    both = ("encoder_hidden_states", "hidden_states")
    return (*whole_blocks(_DOUBLE, doubles, both), *whole_blocks(_SINGLE, singles))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent, a quarter of a token's. Raises UserError when the model takes more than the latent."""
    return channels_of_tokens(CLASS_NAME, config)


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Inputs: ``hidden_states`` (batch, C, height, width), ``timestep`` (1,), ``encoder_hidden_states`` (batch, L, D)
    and ``attention_mask`` (batch, L), 1 for a token of text and the first of padding.

    Raises:
        UserError: an odd height or width, or another input than the latent.
    """
    channels = latent_channels(config)
    check_even(CLASS_NAME, height, width)
    features = int(config["joint_attention_dim"])
    return (
        InputSpec("hidden_states", (batch, channels, height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec(_STATES, (batch, text_length, features), "model", "condition", "text"),
        InputSpec(_MASK, (batch, text_length), "model", "condition", "text"),
    )


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, h, w) from the latent (B, C, h, w), packed on the way in and unpacked on the way out."""
    import torch

    rows, columns = latent.shape[2] // PACK, latent.shape[3] // PACK
    tokens, states, seen = pack(latent), conditions[_STATES], conditions[_MASK]
    length = states.shape[1]
    timestep = timestep / _TIMESTEPS
    with rotary_table(model, length, rows, columns), _embedded(model, timestep):
        predicted = model(
            hidden_states=tokens,
            timestep=timestep,
            encoder_hidden_states=states,
            txt_ids=tokens.new_zeros(length, 3),
            img_ids=tokens.new_zeros(rows * columns, 3),
            attention_mask=torch.cat([seen, torch.ones_like(tokens[..., 0])], dim=1),
            return_dict=False,
        )[0]
    return unpack(predicted, rows, columns)


@contextmanager
def _embedded(model: nn.Module, timestep: Tensor) -> Iterator[None]:
    """Inside the context the modulation's inputs are made of the timestep in float32, which the model rounds first, and
    for a batch of any size, where the model makes a list as long as the batch."""
    import torch

    embed: Any = model.time_text_embed

    def joined(rounded: Tensor) -> Tensor:
        whole = timestep.float() * _TIMESTEPS
        moment = torch.cat([embed.time_proj(whole), embed.guidance_proj(torch.zeros_like(whole))], dim=1)
        rows, places = whole.shape[0], embed.mod_proj
        parts = moment[:, None].expand(rows, len(places), -1), places[None].expand(rows, -1, -1)
        return torch.cat([part.to(rounded.dtype) for part in parts], dim=-1)

    with replaced_forward(embed, joined):
        yield


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """The last hidden state of T5, which sees no padding, for 512 tokens, and the mask."""

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        import torch

        ids, mask = tokens["input_ids"], tokens["token_mask"]
        states = pipeline.text_encoder(ids, attention_mask=mask)[0]
        seen = torch.arange(ids.shape[1])[None] <= mask.sum(dim=1, keepdim=True)
        return {_STATES: states, _MASK: seen.to(states.dtype)}

    return TextScheme(length=_TOKENS, encode=encode, tokenizers=(TokenizerSpec(length=_TOKENS, mask="token_mask"),))


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipeline hands to ``forward``; its mask goes on over the tokens of the picture."""
    states = kwargs[_STATES]
    conditions = {_STATES: states, _MASK: kwargs[_MASK][:, : states.shape[1]]}
    return kwargs["hidden_states"], kwargs["timestep"], conditions


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("ChromaPipeline",),
    models="Chroma",
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    call=call,
    text=text,
    guide=Guidance(order="separate"),
    given=given,
    set_timesteps=set_timesteps,
    size_multiple=lambda config: PACK,
)
