"""The transformer of FLUX.2 (diffusers ``Flux2Transformer2DModel``), dev and klein.

The denoiser's latent is the VAE's with two by two of its pixels in the channels, (B, 128, h, w), normalised channel by
channel with the VAE's own statistics; a pixel of it is a token. Picture and text go through the ``double`` blocks as
two streams and through the ``single`` blocks as one sequence.

Granularity ``block``: the double blocks (``transformer_blocks.i``) and then the single ones
(``single_transformer_blocks.i``), 8 and 48 for FLUX.2-dev. Default cache: ``residual``; on request ``output``.

Granularity ``layer``: of a double block the joint attention (``attn``, a cache for each stream) and the feed-forwards
of picture (``ff``) and text (``ff_context``); of a single block its one layer (``attn``), in which attention and
feed-forward run side by side: 72 units for FLUX.2-dev. Cached is what these modules return, before the gate of the
current evaluation.

FLUX.2-dev is distilled from guidance: the scale is a condition, and there is no second half of the batch. FLUX.2-klein
is guided, unless its pipeline says that it was distilled to few steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.chat import MARK, around_prompt
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily, Side, TextScheme, TokenizerSpec
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.guidance import Guidance
from dipgo_deploy.models.rotary import along
from dipgo_deploy.models.sublayers import sublayers, whole_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "Flux2Transformer2DModel"

_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
# `max_sequence_length` of the pipelines.
_TOKENS = 512
# Timesteps of the scheduler a unit of the model's.
_TIMESTEPS = 1000


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The double blocks and then the single ones, or their parts, in order of execution."""
    doubles, singles = int(config["num_layers"]), int(config["num_single_layers"])
    if granularity == "layer":
        return (*sublayers(_DOUBLE, doubles, ("attn", "ff", "ff_context")), *sublayers(_SINGLE, singles, ("attn",)))
    both = ("encoder_hidden_states", "hidden_states")
    return (*whole_blocks(_DOUBLE, doubles, both), *whole_blocks(_SINGLE, singles))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent. Raises UserError when the model takes more than the latent."""
    into, patch = int(config["in_channels"]), config["patch_size"]
    out = int(config.get("out_channels") or into)
    if into != out or patch != 1:
        raise UserError(
            f"{CLASS_NAME}: in_channels {into}, out_channels {out}, patch_size {patch}: only models whose input is "
            "the latent work"
        )
    return into


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Inputs: ``hidden_states`` (batch, C, height, width), ``timestep`` (1,), ``encoder_hidden_states`` (batch, L, D)
    and, with ``guidance_embeds``, ``guidance`` (batch,), the scale as users give it.

    Raises:
        UserError: another input than the latent, or position embeddings without four axes.
    """
    axes = list(config["axes_dims_rope"])
    if len(axes) != 4 or any(extent % 2 for extent in axes):
        raise UserError(f"{CLASS_NAME}: axes_dims_rope {axes}: only models of four axes, each even, work")
    guidance = InputSpec("guidance", (batch,), "float32", "condition", "guidance")
    text = int(config["joint_attention_dim"])
    return (
        InputSpec("hidden_states", (batch, latent_channels(config), height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", (batch, text_length, text), "model", "condition", "text"),
        *((guidance,) if config["guidance_embeds"] else ()),
    )


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, h, w) from the latent (B, C, h, w)."""
    batch, channels, height, width = latent.shape
    tokens = latent.reshape(batch, channels, height * width).permute(0, 2, 1)
    length = conditions["encoder_hidden_states"].shape[1]
    places = tokens.new_zeros(length, 4), tokens.new_zeros(height * width, 4)
    timestep = timestep / _TIMESTEPS
    numbers = [value for value in (timestep, conditions.get("guidance")) if value is not None]
    with _rotary_tables(model, places, height, width), _unrounded(model, numbers):
        predicted = model(
            hidden_states=tokens,
            timestep=timestep,
            txt_ids=places[0],
            img_ids=places[1],
            return_dict=False,
            **conditions,
        )[0]
    return predicted.permute(0, 2, 1).reshape(batch, channels, height, width)


@contextmanager
def _unrounded(model: nn.Module, numbers: list[Tensor]) -> Iterator[None]:
    """Inside the context the sinusoids are those of timestep and guidance in float32, times 1000; the model rounds them
    to its own dtype first."""
    left = [value.float() * _TIMESTEPS for value in numbers]
    hook = model.get_submodule("time_guidance_embed.time_proj").register_forward_pre_hook(lambda *_: (left.pop(0),))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _rotary_tables(model: nn.Module, places: tuple[Tensor, Tensor], rows: int, columns: int) -> Iterator[None]:
    """``model.pos_embed`` inside the context gives the tables of text and picture for the ids ``places``: text at
    (0, 0, 0, token), picture at (0, row, column, 0)."""
    import torch

    embed: Any = model.pos_embed
    text, picture = places
    time, vertical, horizontal, last = embed.axes_dim

    def tables(positions: Tensor) -> tuple[Tensor, ...]:
        found = []
        for function, at_origin in ((np.cos, 1.0), (np.sin, 0.0)):
            if positions is text:
                count = len(text)
                still = torch.full((count, time + vertical + horizontal), at_origin)
                table = torch.cat([still, along(function, embed.theta, last, count)], dim=1)
            else:
                axes = [
                    torch.full((rows, columns, time), at_origin),
                    along(function, embed.theta, vertical, rows)[:, None].expand(rows, columns, vertical),
                    along(function, embed.theta, horizontal, columns)[None].expand(rows, columns, horizontal),
                    torch.full((rows, columns, last), at_origin),
                ]
                table = torch.cat(axes, dim=2).flatten(0, 1)
            found.append(table.to(picture.device))
        return tuple(found)

    with replaced_forward(embed, tables):
        yield


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """Hidden states of some layers of a language model, one beside the other, for all of 512 tokens: of Mistral 3 with
    the pipeline's system message (dev), or of Qwen 3 (klein)."""
    known = pipeline is not None and getattr(pipeline, "tokenizer", None) is not None
    around, special, padding = _template(pipeline) if known else (("", ""), True, "right")
    layers = () if pipeline is None else _layers(pipeline)

    def encode(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        import torch

        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        states = pipeline.text_encoder.model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return {"encoder_hidden_states": torch.cat([states.hidden_states[layer] for layer in layers], dim=-1)}

    return TextScheme(
        length=_TOKENS,
        encode=encode,
        tokenizers=(TokenizerSpec(length=_TOKENS, mask="attention_mask", special=special, padding=padding),),
        around=around,
        removed=("[IMG]",) if hasattr(pipeline, "system_message") else (),
    )


def _template(pipeline: Any) -> tuple[tuple[str, str], bool, Side]:
    """What is around a prompt, whether the tokenizer adds its own tokens to that, and the side it pads."""
    processor = pipeline.tokenizer
    tokenizer = getattr(processor, "tokenizer", processor)
    system = getattr(pipeline, "system_message", None)
    if system is None:
        messages: list[Any] = [{"role": "user", "content": MARK}]
        around = around_prompt(processor, messages, add_generation_prompt=True, enable_thinking=False)
        return around, True, tokenizer.padding_side
    said = (("system", system), ("user", MARK))
    messages = [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in said]
    around = around_prompt(processor, messages, add_generation_prompt=False)
    # A tokenizer adds nothing to its template, a processor where that has not written the first token itself.
    first = tokenizer.bos_token
    special = tokenizer is not processor and not (first and around[0].startswith(first))
    return around, special, tokenizer.padding_side


def _layers(pipeline: Any) -> tuple[int, ...]:
    """The default of the pipeline's own argument."""
    return tuple(inspect.signature(type(pipeline).__call__).parameters["text_encoder_out_layers"].default)


def set_timesteps(
    config: Mapping[str, Any], scheduler: Mapping[str, Any], height: int, width: int, steps: int
) -> Mapping[str, Any]:
    """FLUX.2's ``sigmas`` unless the scheduler makes flow sigmas itself, and with dynamic shifting its makers' ``mu``.

    That depends on the number of tokens and of steps.
    """
    options: dict[str, Any] = {}
    if not scheduler.get("use_flow_sigmas"):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps).tolist()
    if scheduler.get("use_dynamic_shifting"):
        options["mu"] = _fitted_shift(height * width, steps)
    return options


def _fitted_shift(tokens: int, steps: int) -> float:
    """Linear in the tokens at 10 and at 200 steps, and in the steps between; beyond 4300 tokens as at 200 steps."""
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    slope = (many - few) / 190.0
    return slope * steps + (many - 200.0 * slope)


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    models="FLUX.2 dev, klein",
    refused=("pictures to follow", "klein KV"),
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    call=call,
    text=text,
    packing=2,
    guidance=lambda config, index: not (config["guidance_embeds"] or index.get("is_distilled")),
    guide=Guidance(order="separate"),
    set_timesteps=set_timesteps,
)
