"""The transformer of FLUX.1 (diffusers ``FluxTransformer2DModel``).

The pipeline hands the model a latent packed 2x2 into tokens, position ids and a timestep in [0, 1]; here that happens
inside ``call``, so that the latent is (B, 16, h, w) as the VAE wants it. Picture and text go through the ``double``
blocks as two streams and through the ``single`` blocks as one sequence, which diffusers cuts in two again behind
every block: all blocks return two tensors.

Granularity ``block``: 19 double blocks (``transformer_blocks.i``), then 38 single ones
(``single_transformer_blocks.i``): 57 units for FLUX.1-dev and FLUX.1-schnell. Default cache: ``residual``; on request
``output``.

Granularity ``layer``: of a double block the joint attention (``attn``, a cache for each stream) and the feed-forwards
of picture (``ff``) and text (``ff_context``); of a single block, whose feed-forward and attention run side by side
and end in one projection, both by themselves (``proj_mlp``, before its activation, and ``attn``) and the projection
(``proj_out``): 171 units. Where the projection is removed, what leads to it is computed for nobody but their own
caches. Cached is what these modules return, before the gate of the current evaluation. ECAD (arXiv 2506.15682) caches
a FLUX block at these places, TaylorSeer (2503.06923) at these but the two within.

FLUX.1-dev is distilled from guidance: the scale is a condition, and there is no second half of the batch.

Fill (a picture with a mask) and Control (edges, depth) are given more channels. Kontext is given the tokens of a
picture behind those of the latent, at position 1 of the axis on which those are at 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily, TextScheme, TokenizerSpec
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.image_start import rounded_down
from dipgo_deploy.models.joined import (
    CONTROL_LATENTS,
    FOLLOWED,
    MASK,
    MASKED_LATENTS,
    Beside,
    variant_name,
    with_channels,
)
from dipgo_deploy.models.packed import PACK, channels_of_tokens, check_even, pack, unpack
from dipgo_deploy.models.rotary import along
from dipgo_deploy.models.shift import dynamic_shift
from dipgo_deploy.models.sublayers import sublayers, whole_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "FluxTransformer2DModel"

_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
_CLIP_TOKENS = 77
# `max_sequence_length` of the pipeline.
_T5_TOKENS = 512
# Timesteps of the scheduler a unit of the model's.
_TIMESTEPS = 1000


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The double blocks and then the single ones, or their parts, in order of execution."""
    doubles, singles = int(config["num_layers"]), int(config["num_single_layers"])
    if granularity == "layer":
        return (*sublayers(_DOUBLE, doubles, ("attn", "ff", "ff_context")), *chain(*map(single_units, range(singles))))
    both = ("encoder_hidden_states", "hidden_states")
    return (*whole_blocks(_DOUBLE, doubles, both), *whole_blocks(_SINGLE, singles, both))


def single_units(index: int) -> tuple[BlockSpec, ...]:
    """The units of a single block: feed-forward and attention, which run side by side, and the projection of both."""
    path = f"{_SINGLE}.{index}"
    inner = (BlockSpec(name=f"{path}.{part}", modules=(f"{path}.{part}",)) for part in ("proj_mlp", "attn"))
    return (*inner, BlockSpec(name=f"{path}.proj_out", modules=(f"{path}.act_mlp", f"{path}.proj_out")))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent, a quarter of a token's. Raises UserError when the model takes more than the latent."""
    return channels_of_tokens(CLASS_NAME, config)


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Inputs: ``hidden_states`` (batch, C, height, width), ``timestep`` (1,), ``encoder_hidden_states`` (batch, L, D),
    ``pooled_projections`` (batch, P) and, with ``guidance_embeds``, ``guidance`` (batch,), the scale as users give it.

    ``text_length`` L is the number of T5's tokens.

    Raises:
        UserError: an odd height or width, or another input than the latent.
    """
    channels = latent_channels(config)
    check_even(CLASS_NAME, height, width)
    text, pooled = int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])
    guidance = InputSpec("guidance", (batch,), "float32", "condition", "guidance")
    return (
        InputSpec("hidden_states", (batch, channels, height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", (batch, text_length, text), "model", "condition", "text"),
        InputSpec("pooled_projections", (batch, pooled), "model", "condition", "text"),
        *((guidance,) if config["guidance_embeds"] else ()),
    )


def call(
    model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor], **further: Any
) -> Tensor:
    """The prediction (B, C, h, w) from the latent (B, C, h, w), packed on the way in and unpacked on the way out."""
    rows, columns = latent.shape[2] // PACK, latent.shape[3] // PACK
    own = {name: tensor for name, tensor in conditions.items() if name != FOLLOWED}
    tokens, pictures = pack(latent), 1
    if FOLLOWED in conditions:
        import torch

        tokens, pictures = torch.cat([tokens, pack(conditions[FOLLOWED].to(latent.dtype))], dim=1), 2
    with prepared(model, timestep, own, rows, columns, pictures) as keywords:
        predicted = model(hidden_states=tokens, return_dict=False, **keywords, **further)[0]
    return unpack(predicted if pictures == 1 else predicted[:, : rows * columns], rows, columns)


@contextmanager
def prepared(
    model: nn.Module,
    timestep: Tensor,
    conditions: Mapping[str, Tensor | None],
    rows: int,
    columns: int,
    pictures: int = 1,
) -> Iterator[dict[str, Any]]:
    """The keywords of ``forward`` besides the tokens, and inside the context exact positions and numbers for it."""
    states = conditions["encoder_hidden_states"]
    assert states is not None
    length = states.shape[1]
    timestep = timestep / _TIMESTEPS
    with rotary_table(model, length, rows, columns, pictures), _unrounded(model, timestep, conditions.get("guidance")):
        yield {
            "timestep": timestep,
            "txt_ids": states.new_zeros(length, 3),
            "img_ids": states.new_zeros(pictures * rows * columns, 3),
            **conditions,
        }


@contextmanager
def _unrounded(model: nn.Module, timestep: Tensor, guidance: Tensor | None) -> Iterator[None]:
    """Inside the context the embedding of timestep (and guidance) gets them in float32.

    The model casts both to its own dtype before it takes their sinusoids, of 1000 times the value: in float16 that is
    up to a quarter of a radian of the fastest one, in bfloat16 two radians.
    """
    numbers = [value.float() * _TIMESTEPS for value in (timestep, guidance) if value is not None]

    def given(module: nn.Module, rounded: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*numbers, *rounded[len(numbers) :])

    embed: Any = model.time_text_embed
    hook = embed.register_forward_pre_hook(given)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def rotary_table(model: nn.Module, length: int, rows: int, columns: int, pictures: int = 1) -> Iterator[None]:
    """``model.pos_embed`` inside the context gives the table for ``length`` text tokens and rows x columns of picture,
    of so many pictures one behind the other.

    The model computes it in float64 from the ids of all tokens; here it is put together from constants, one for each
    axis.
    """
    import torch

    embed: Any = model.pos_embed
    place, vertical, horizontal = embed.axes_dim

    def table(positions: Tensor) -> tuple[Tensor, ...]:
        angles = []
        for function, at_origin in ((np.cos, 1.0), (np.sin, 0.0)):
            # Position (picture, row, column) for pictures; the text is at the origin.
            down = along(function, embed.theta, vertical, rows)[:, None].expand(rows, columns, vertical)
            across = along(function, embed.theta, horizontal, columns)[None].expand(rows, columns, horizontal)
            parts = [torch.full((length, place + vertical + horizontal), at_origin)]
            for at in along(function, embed.theta, place, pictures):
                parts.append(torch.cat([at.expand(rows, columns, place), down, across], dim=2).flatten(0, 1))
            angles.append(torch.cat(parts).to(positions.device))
        return tuple(angles)

    with replaced_forward(embed, table):
        yield


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """CLIP's pooled output and T5's hidden states, as ``FluxPipeline.encode_prompt``.

    T5 gets 512 tokens, the pipeline's default, for FLUX.1-schnell too.
    """
    clip_tokens = _CLIP_TOKENS if pipeline is None else int(pipeline.tokenizer_max_length)

    def encode(pipeline: Any, tokens: Mapping[str, Any]) -> Mapping[str, Any]:
        pooled = pipeline.text_encoder(tokens["input_ids"]).pooler_output
        hidden = pipeline.text_encoder_2(tokens["input_ids_2"])[0]
        return {"encoder_hidden_states": hidden.to(pooled.dtype), "pooled_projections": pooled}

    return TextScheme(
        length=_T5_TOKENS,
        encode=encode,
        tokenizers=(
            TokenizerSpec("tokenizer", clip_tokens, "input_ids"),
            TokenizerSpec("tokenizer_2", _T5_TOKENS, "input_ids_2"),
        ),
        encoders=("text_encoder", "text_encoder_2"),
    )


def set_timesteps(
    config: Mapping[str, Any], scheduler: Mapping[str, Any], height: int, width: int, steps: int
) -> Mapping[str, Any]:
    """FLUX's own ``sigmas`` unless the scheduler makes flow sigmas itself, and ``mu`` for the number of tokens.

    The pipeline gives ``mu`` to every scheduler; here it is left out where it does nothing, because a value that
    depends on the size means that an engine directory is for one size.
    """
    options: dict[str, Any] = {}
    if not scheduler.get("use_flow_sigmas"):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps).tolist()
    if scheduler.get("use_dynamic_shifting"):
        tokens = (height // PACK) * (width // PACK)
        options["mu"] = dynamic_shift(scheduler, tokens, max_shift=1.15)
    return options


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipelines hand to ``forward``: the latents of all pictures, unpacked, those behind the first as the
    conditions that they are."""
    places = kwargs["img_ids"]
    pictures, rows, columns = (int(place) + 1 for place in places.amax(dim=0))
    tokens = kwargs["hidden_states"].chunk(pictures, dim=1)
    latent, *others = (unpack(part, rows, columns) for part in tokens)
    names = ("encoder_hidden_states", "pooled_projections", "guidance")
    conditions = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    return latent, kwargs["timestep"] * _TIMESTEPS, conditions | dict(zip((FOLLOWED,), others, strict=False))


def _kontext_inputs(
    config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int
) -> tuple[InputSpec, ...]:
    """Those of FLUX.1-dev, and ``image_latents`` (batch, C, height, width) of the picture to follow."""
    own = inputs(config, batch, height, width, text_length)
    return (*own, InputSpec(FOLLOWED, own[0].shape, "model", "condition", "image"))


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("FluxPipeline",),
    models="FLUX.1 dev, schnell, Krea",
    refused=("Redux", "true_cfg_scale"),
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    kind="flow",
    call=call,
    text=text,
    guidance=False,
    set_timesteps=set_timesteps,
    image_to_image=rounded_down,
    size_multiple=lambda config: PACK,
)

FILL = with_channels(
    FAMILY,
    "Fill",
    (
        # Fill's pipeline encodes the whole picture first, for runs that start from it, and draws its latents.
        Beside(
            MASKED_LATENTS, PictureUse(argument="image", form="latents", masked=True, drawn="after", start_drawn=True)
        ),
        Beside(MASK, PictureUse(argument="mask_image", form="mask"), -1),
    ),
    pipelines=("FluxFillPipeline",),
    models="FLUX.1 Fill",
    refused=(),
    given=given,
)
CONTROL = with_channels(
    FAMILY,
    "Control",
    (Beside(CONTROL_LATENTS, PictureUse(argument="control_image", form="latents", drawn="before", each=True)),),
    pipelines=("FluxControlPipeline",),
    models="FLUX.1 Canny, Depth (Control)",
    refused=(),
    image_to_image=None,
    given=given,
)
KONTEXT = replace(
    FAMILY,
    class_name=variant_name(FAMILY, "Kontext"),
    pipelines=("FluxKontextPipeline",),
    models="FLUX.1 Kontext",
    refused=("several pictures", "pictures of another size than is drawn", "true_cfg_scale"),
    inputs=_kontext_inputs,
    pictures={FOLLOWED: PictureUse(argument="image", form="latents")},
    given=given,
    image_to_image=None,
)
