"""The text-conditioned UNet of Stable Diffusion 1.x, 2.x and XL (diffusers ``UNet2DConditionModel``).

Which of them it is, its configuration says: with ``addition_embed_type`` ``text_time`` the UNet takes SDXL's pooled
text embedding and sizes besides; with ``time_cond_proj_dim`` it was distilled from guidance (latent consistency models,
arXiv 2310.04378) and takes the scale.

Granularity ``block``: every down block, the mid block and every up block; a down block's skip tensors belong to it
(9 units for SD-1.5, the SuperNet of DiP-GO, arXiv 2410.16942). Granularity ``layer``: every resnet with the attention
behind it, every downsampler, the mid block; an upsampler belongs to the last pair of its up block (24 units for
SD-1.5 and SD-2.1, 18 for SDXL, which has 7 whole blocks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import BlockSpec, Granularity, InputSpec, ModelFamily, TextScheme
from dipgo_deploy.models.image_start import rounded_up
from dipgo_deploy.models.joined import MASK, MASKED_LATENTS, Beside, variant_name, with_channels
from dipgo_deploy.models.unet_text import VAE_SCALE, one_clip, second_clip, two_clips
from dipgo_deploy.models.unet_units import unet_units

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "UNet2DConditionModel"

# Block types whose inside is known to `layer`, and whether they have attentions.
_ATTENTIONS: Mapping[str, bool] = {
    "CrossAttnDownBlock2D": True,
    "DownBlock2D": False,
    "CrossAttnUpBlock2D": True,
    "UpBlock2D": False,
}

# Settings that make forward need another input. Running without it would give wrong pictures, so: refused.
_EXTRA_INPUTS = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
)


# The condition that a model distilled from guidance takes the scale by.
SCALE = "guidance"
# What `time_ids` holds: original height and width, crop from top and left, target height and width.
_SIZES = 6
# Of the refiner's pipeline, as its defaults.
_SCORE, _NEGATIVE_SCORE = 6.0, 2.5


def blocks(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
    """The blocks of a UNet in order of execution, from its configuration (lists or tuples alike).

    Raises:
        UserError: as many up as down blocks are not there, or (``layer``) a block type whose
            inside is not known.
    """
    return unet_units(CLASS_NAME, config, _ATTENTIONS, granularity)


def _text_width(config: Mapping[str, Any]) -> int:
    width = config["cross_attention_dim"]
    widths = {width} if isinstance(width, int) else set(width)
    if len(widths) != 1:
        raise UserError(
            f"{CLASS_NAME}: cross_attention_dim differs between blocks ({width}): only one width is supported"
        )
    return int(widths.pop())


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latent. Raises UserError when the model takes more than the latent."""
    into, out = int(config["in_channels"]), int(config["out_channels"])
    if into not in (out, out // 2):
        raise UserError(
            f"{CLASS_NAME}: in_channels {into}, out_channels {out}: only models whose input is the latent work"
            " (and inpainting models with 9 channels, from a pipeline for inpainting)"
        )
    return into


def _is_sdxl(config: Mapping[str, Any]) -> bool:
    return config.get("addition_embed_type") == "text_time"


def _is_distilled(config: Mapping[str, Any]) -> bool:
    return config.get("time_cond_proj_dim") is not None


def _pooled_width(config: Mapping[str, Any]) -> int:
    """Width of SDXL's pooled text embedding: what its embedding layer takes besides the sizes."""
    total, each = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
    width = total - _SIZES * each if isinstance(total, int) and isinstance(each, int) else 0
    if width < 1:
        raise UserError(
            f"{CLASS_NAME}: projection_class_embeddings_input_dim = {total} and addition_time_embed_dim = {each} "
            f"leave no room for a text embedding beside {_SIZES} sizes; correct the configuration"
        )
    return int(width)


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Forward inputs: ``sample`` (batch, C, height, width), ``timestep`` (1,), ``encoder_hidden_states`` (batch, L, D).

    SDXL has ``text_embeds`` (batch, P), the pooled embedding, and ``time_ids`` (batch, 6) too: original height and
    width, crop from top and left, target height and width, all in pixels, with the exported size for both.

    A model distilled from guidance has ``guidance`` (batch,), the scale as users give it.

    ``batch`` counts both halves of guidance; ``text_length`` L is the number of text tokens.

    Raises:
        UserError: the model needs an input that is not supported.
    """
    extra = _EXTRA_INPUTS if _is_sdxl(config) else ("addition_embed_type", *_EXTRA_INPUTS)
    for key in extra:
        if config.get(key) is not None:
            raise UserError(
                f"{CLASS_NAME}: {key} = {config[key]!r} needs an input that is not supported; use another model"
            )
    specs = [
        InputSpec("sample", (batch, latent_channels(config), height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", (batch, text_length, _text_width(config)), "model", "condition", "text"),
    ]
    if _is_sdxl(config):
        size = (float(height * VAE_SCALE), float(width * VAE_SCALE))
        sizes = (*size, 0.0, 0.0, *size)
        specs += [
            InputSpec("text_embeds", (batch, _pooled_width(config)), "model", "condition", "text"),
            InputSpec("time_ids", (batch, _SIZES), "float32", "condition", "fixed", values=sizes),
        ]
    if _is_distilled(config):
        specs.append(InputSpec(SCALE, (batch,), "float32", "condition", "guidance"))
    return tuple(specs)


def call(
    model: nn.Module,
    latent: Tensor,
    timestep: Tensor,
    conditions: Mapping[str, Tensor],
    image_embeds: list[Tensor] | None = None,
) -> Tensor:
    """The prediction (B, C', h, w); SDXL's additional conditions and an IP-Adapter's embeddings go into
    ``added_cond_kwargs``."""
    # float32, as what the model joins them with: ONNX has no join of two types, which torch would promote to this one.
    added: dict[str, Any] = {
        name: conditions[name].float() for name in ("text_embeds", "time_ids") if name in conditions
    }
    if image_embeds is not None:
        added["image_embeds"] = image_embeds
    prediction: Tensor = model(
        latent,
        timestep=timestep,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        timestep_cond=_scale_embedding(model, conditions[SCALE]).to(latent.dtype) if SCALE in conditions else None,
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]
    return prediction


def _scale_embedding(model: nn.Module, scale: Tensor) -> Tensor:
    """Sines and cosines of 1000 times the scale less 1, float32 (B, time_cond_proj_dim), as the pipelines make them."""
    import torch

    config: Any = model.config
    width = int(config.time_cond_proj_dim)
    frequencies = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2))
    angle = (scale.float() - 1)[:, None] * 1000 * torch.from_numpy(frequencies.astype(np.float32)).to(scale.device)
    return torch.nn.functional.pad(torch.cat([torch.sin(angle), torch.cos(angle)], dim=1), (0, width % 2))


def refiner_inputs(
    config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int
) -> tuple[InputSpec, ...]:
    """SDXL's, but ``time_ids`` (batch, 5): original height and width, crop, and in place of the target size an
    aesthetic score, 6 and for the unconditional half 2.5."""
    specs = []
    for spec in inputs(_as_base(config), batch, height, width, text_length):
        if spec.name == "time_ids":
            shared = spec.values[: _SIZES - 2]
            own, null = (*shared, _SCORE), (*shared, _NEGATIVE_SCORE)
            spec = replace(spec, shape=(batch, _SIZES - 1), values=own, null_values=null)
        specs.append(spec)
    return tuple(specs)


def _as_base(config: Mapping[str, Any]) -> dict[str, Any]:
    """The refiner's configuration, with room for as many sizes as the base model has."""
    if not _is_sdxl(config):
        raise UserError(f"{CLASS_NAME}: no addition_embed_type text_time: only SDXL has a refiner")
    total, each = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
    return {**config, "projection_class_embeddings_input_dim": int(total or 0) + int(each or 0)}


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipelines hand to ``forward``; the scale is told from its embedding's slowest sine (below 16)."""
    import torch

    latent, rows = args[0], len(args[0])
    conditions = {"encoder_hidden_states": kwargs["encoder_hidden_states"], **(kwargs.get("added_cond_kwargs") or {})}
    embedded = kwargs.get("timestep_cond")
    if embedded is not None:
        slowest = embedded[:, embedded.shape[1] // 2 - 1].double()
        conditions[SCALE] = (1 + torch.asin(slowest) * 10).float()
    seen = {name: rows_of.expand(rows, *rows_of.shape[1:]) for name, rows_of in conditions.items()}
    return latent, torch.as_tensor(args[1]), seen


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """One CLIP text encoder, or the two of SDXL; raises UserError for a pipeline that does not fit."""
    return two_clips(_pooled_width(config), pipeline) if _is_sdxl(config) else one_clip(pipeline)


def size_multiple(config: Mapping[str, Any]) -> int:
    """Every level but the last halves the latent; with a rest its way back up would need sizes of its own."""
    return 2 ** (len(config["down_block_types"]) - 1)


FAMILY = ModelFamily(
    class_name=CLASS_NAME,
    pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
    models="Stable Diffusion 1.x, 2.x, XL, also distilled (LCM, Turbo, Lightning, SSD-1B)",
    component="unet",
    blocks=blocks,
    inputs=inputs,
    latent_channels=latent_channels,
    granularities=("block", "layer"),
    call=call,
    text=text,
    guidance=lambda config, index: not _is_distilled(config),
    given=given,
    image_to_image=rounded_up,
    size_multiple=size_multiple,
)

INPAINT = with_channels(
    FAMILY,
    "Inpaint",
    (
        Beside(MASK, PictureUse(argument="mask_image", form="mask"), 1),
        Beside(MASKED_LATENTS, PictureUse(argument="image", form="latents", masked=True, drawn="after")),
    ),
    pipelines=("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"),
    models="Stable Diffusion 1.x, 2.x, XL inpainting (9 channels)",
    refused=("inpainting with a U-Net of 4 channels", "padding_mask_crop"),
)

REFINER = replace(
    FAMILY,
    class_name=variant_name(FAMILY, "Refiner"),
    pipelines=("StableDiffusionXLImg2ImgPipeline",),
    models="Stable Diffusion XL refiner",
    refused=("denoising_start", "latents of the base model with noise left in them"),
    inputs=refiner_inputs,
    text=lambda config, pipeline: second_clip(_pooled_width(_as_base(config)), pipeline),
    index={"requires_aesthetics_score": True},
    starts=True,
    size_multiple=None,
)
