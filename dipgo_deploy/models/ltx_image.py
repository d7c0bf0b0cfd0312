"""LTX-Video from a picture: it is the first frame of the latent, at every evaluation.

The tokens of that frame are at timestep 0, all others at the evaluation's. Nothing is predicted for them: the sampler
leaves that frame alone, and at the end the picture's latents take its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.models import ltx
from dipgo_deploy.models.family import InputSpec
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.joined import variant_name

if TYPE_CHECKING:
    from torch import Tensor, nn

FIRST = "image_latents"


def inputs(
    config: Mapping[str, Any], batch: int, frames: int, height: int, width: int, text_length: int
) -> tuple[InputSpec, ...]:
    """Those of text to video, and ``image_latents`` (batch, C, 1, height, width)."""
    own = ltx.inputs(config, batch, frames, height, width, text_length)
    shape = (batch, ltx.latent_channels(config), 1, height, width)
    return (*own, InputSpec(FIRST, shape, "model", "condition", "image"))


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, f, h, w), 0 in the first frame."""
    import torch

    others = {name: tensor for name, tensor in conditions.items() if name != FIRST}
    first = conditions[FIRST].to(latent.dtype)
    pixels, frames = first[0, 0].numel(), latent.shape[2]
    with _two_timesteps(model, pixels, (frames - 1) * pixels):
        predicted = ltx.call(model, torch.cat([first, latent[:, :, 1:]], dim=2), timestep, others)
    return torch.cat([torch.zeros_like(first), predicted[:, :, 1:]], dim=2)


@contextmanager
def _two_timesteps(model: nn.Module, given: int, others: int) -> Iterator[None]:
    """Inside the context the embeddings are of tokens: so many at timestep 0, then others at the given one."""
    import torch

    embed: Any = model.get_submodule("time_embed")

    def of_tokens(timestep: Tensor, **named: Any) -> tuple[Tensor, ...]:
        clean, noisy = (type(embed).forward(embed, at, **named) for at in (timestep * 0, timestep))
        return tuple(
            torch.cat([zero[:, None].expand(-1, given, -1), own[:, None].expand(-1, others, -1)], dim=1)
            for zero, own in zip(clean, noisy, strict=True)
        )

    with replaced_forward(embed, of_tokens):
        yield


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipeline hands to ``forward``: its latent's first frame is the condition."""
    extents = [kwargs[name] for name in ("num_frames", "height", "width")]
    latent = kwargs["hidden_states"].transpose(1, 2).unflatten(2, extents)
    conditions = {name: kwargs[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    return latent, kwargs["timestep"][:, -1], {**conditions, FIRST: latent[:, :, :1]}


FAMILY = replace(
    ltx.FAMILY,
    class_name=variant_name(ltx.FAMILY, "ImageToVideo"),
    pipelines=("LTXImageToVideoPipeline",),
    models="LTX-Video 0.9.0 image to video",
    refused=("LTXConditionPipeline",),
    inputs=inputs,
    call=call,
    given=given,
    # Its pipeline encodes a picture without the factor, and decodes the video with it.
    vae_settings={"scaling_factor": 1.0},
    pictures={FIRST: PictureUse(argument="image", form="latents", drawn="before", kept=True)},
)
