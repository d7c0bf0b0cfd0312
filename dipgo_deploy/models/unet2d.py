"""The UNet of DDPM and DDIM (diffusers ``UNet2DModel``; arXiv 2006.11239, 2010.02502), which works on pixels.

The latent is the picture itself, in [-1, 1]: there is no VAE. There is no guidance either; most of these models take no
condition at all, one with ``num_class_embeds`` takes class ids.

Granularity ``block``: every down block, the mid block and every up block (13 units for the published 256-pixel models,
9 for ``ddpm-cifar10-32``). Granularity ``layer``: every resnet with the attention behind it, every downsampler, the mid
block; an upsampler belongs to the last pair of its up block (36 and 24 units).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily
from dipgo_deploy.models.unet_units import unet_units

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "UNet2DModel"
PIPELINES = ("DDPMPipeline", "DDIMPipeline")

# Block types whose inside is known to `layer`, and whether they have attentions.
_ATTENTIONS: Mapping[str, bool] = {
    "AttnDownBlock2D": True,
    "DownBlock2D": False,
    "AttnUpBlock2D": True,
    "UpBlock2D": False,
}


# Their last down block hands on the picture that it was given: one tensor would be the output of two blocks.
_REFUSED = ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The blocks of a UNet in order of execution, from its configuration (lists or tuples alike).

    Raises:
        UserError: as many up as down blocks are not there, a block type that cannot be cut, or
            (``layer``) one whose inside is not known.
    """
    for block_type in (*config["down_block_types"], *config["up_block_types"]):
        if block_type in _REFUSED:
            raise UserError(f"{CLASS_NAME}: {block_type} is not supported; use a model without skip blocks")
    return unet_units(CLASS_NAME, config, _ATTENTIONS, granularity)


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the picture. Raises UserError when the model takes more than the picture (super-resolution)."""
    into, out = int(config["in_channels"]), int(config["out_channels"])
    if out not in (into, 2 * into):
        raise UserError(
            f"{CLASS_NAME}: in_channels {into}, out_channels {out}: only models whose input is the picture work"
        )
    return into


def inputs(
    config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int | None = None
) -> tuple[InputSpec, ...]:
    """Forward inputs: ``sample`` (batch, C, height, width) in pixels, ``timestep`` (1,) and, for a model with
    ``num_class_embeds``, ``class_labels`` int64 (batch,). ``text_length`` is not used.

    Raises:
        UserError: a size that the down blocks cannot halve, or a class embedding that takes no class ids.
    """
    if config["class_embed_type"] is not None:
        raise UserError(
            f"{CLASS_NAME}: class_embed_type = {config['class_embed_type']!r} needs an input that is not supported; "
            "use another model"
        )
    factor = size_multiple(config)
    if height % factor or width % factor:
        raise UserError(f"{CLASS_NAME}: picture of {height}x{width}; give multiples of {factor}")
    specs = [
        InputSpec("sample", (batch, latent_channels(config), height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
    ]
    if config["num_class_embeds"] is not None:
        specs.append(InputSpec("class_labels", (batch,), "int64", "condition", "class"))
    return tuple(specs)


def size_multiple(config: Mapping[str, Any]) -> int:
    """Every level but the last halves the picture."""
    return 2 ** (len(config["down_block_types"]) - 1)


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C', h, w); a learned embedding of the timestep is a table that takes whole numbers."""
    config: Any = model.config
    if config.time_embedding_type == "learned":
        timestep = timestep.long()
    prediction: Tensor = model(latent, timestep=timestep, return_dict=False, **conditions)[0]
    return prediction


def text(config: Mapping[str, Any], pipeline: Any) -> None:
    """None: there are no prompts. Raises UserError for a pipeline that does more than denoise a picture (a VQ-VAE
    behind it, corrector steps of its own)."""
    name = type(pipeline).__name__
    if pipeline is not None and name not in PIPELINES:
        raise UserError(f"{CLASS_NAME}: {name} is not supported; use a model of {' or '.join(PIPELINES)}")


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=PIPELINES,
    models="DDPM, DDIM",
    component="unet",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    call=call,
    text=text,
    guidance=False,
    size_multiple=size_multiple,
    pixels=True,
)
