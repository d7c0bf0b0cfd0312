"""LTX-Video from a picture, which is the first frame of the latent (``first_frame``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dipgo_deploy.models import ltx
from dipgo_deploy.models.family import InputSpec
from dipgo_deploy.models.first_frame import FIRST, USE, by_token, predicted_behind, put_first, with_first
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.joined import variant_name

if TYPE_CHECKING:
    from torch import Tensor, nn


def inputs(
    config: Mapping[str, Any], batch: int, frames: int, height: int, width: int, text_length: int
) -> tuple[InputSpec, ...]:
    """Those of text to video, and ``image_latents`` (batch, C, 1, height, width)."""
    return with_first(ltx.inputs(config, batch, frames, height, width, text_length))


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, f, h, w), 0 in the first frame."""
    whole, others = put_first(latent, conditions)
    with _two_timesteps(model, latent.shape[2], latent[0, 0, 0].numel()):
        return predicted_behind(ltx.call(model, whole, timestep, others))


@contextmanager
def _two_timesteps(model: nn.Module, frames: int, tokens: int) -> Iterator[None]:
    """Inside the context the embeddings are of tokens, so many a frame."""
    embed: Any = model.get_submodule("time_embed")

    def of_tokens(timestep: Tensor, **named: Any) -> tuple[Tensor, ...]:
        clean, noisy = (type(embed).forward(embed, at, **named) for at in (timestep * 0, timestep))
        return tuple(by_token(zero, own, frames, tokens) for zero, own in zip(clean, noisy, strict=True))

    with replaced_forward(embed, of_tokens):
        yield


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipeline hands to ``forward``: its latent's first frame is the condition."""
    extents = [kwargs[name] for name in ("num_frames", "height", "width")]
    latent = kwargs["hidden_states"].transpose(1, 2).unflatten(2, extents)
    return latent, kwargs["timestep"][:, -1], {**ltx.given_text(kwargs), FIRST: latent[:, :, :1]}


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
    pictures={FIRST: USE.model_copy(update={"drawn": "before"})},
)
