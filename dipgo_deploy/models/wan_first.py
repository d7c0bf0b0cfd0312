"""Wan 2.2's model of 5B from a picture, which is the first frame of the latent (``first_frame``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dipgo_deploy.models.family import InputSpec
from dipgo_deploy.models.first_frame import FIRST, USE, by_token, predicted_behind, put_first, with_first
from dipgo_deploy.models.forward import replaced_forward
from dipgo_deploy.models.joined import variant_name
from dipgo_deploy.models.wan import FAMILY as TEXT_TO_VIDEO
from dipgo_deploy.models.wan import inputs as text_to_video

if TYPE_CHECKING:
    from torch import Tensor, nn


def inputs(
    config: Mapping[str, Any], batch: int, frames: int, height: int, width: int, text_length: int
) -> tuple[InputSpec, ...]:
    """Those of text to video, and ``image_latents`` (batch, C, 1, height, width)."""
    return with_first(text_to_video(config, batch, frames, height, width, text_length))


def call(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction (B, C, f, h, w), 0 in the first frame."""
    whole, others = put_first(latent, conditions)
    config: Any = model.config
    frames, height, width = (extent // patch for extent, patch in zip(latent.shape[2:], config.patch_size, strict=True))
    with _two_timesteps(model, timestep, frames, height * width):
        of_tokens = timestep[:, None].expand(-1, frames * height * width)
        return predicted_behind(TEXT_TO_VIDEO.call(model, whole, of_tokens, others))


@contextmanager
def _two_timesteps(model: nn.Module, timestep: Tensor, frames: int, tokens: int) -> Iterator[None]:
    """Inside the context the embeddings are of tokens, so many a frame; the text's is made once."""
    embed: Any = model.get_submodule("condition_embedder")

    def of_tokens(_: Tensor, text: Tensor, *others: Any, **named: Any) -> tuple[Any, ...]:
        noisy = type(embed).forward(embed, timestep, text)
        with replaced_forward(embed.text_embedder, lambda states: states):
            clean = type(embed).forward(embed, timestep * 0, text)
        return *(by_token(zero, own, frames, tokens) for zero, own in zip(clean[:2], noisy[:2], strict=True)), *noisy[
            2:
        ]

    with replaced_forward(embed, of_tokens):
        yield


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipeline hands to ``forward``: its latent's first frame is the condition."""
    latent, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
    return latent, kwargs["timestep"][:, -1], {"encoder_hidden_states": text, FIRST: latent[:, :, :1]}


FAMILY = replace(
    TEXT_TO_VIDEO,
    class_name=variant_name(TEXT_TO_VIDEO, "FirstFrame"),
    pipelines=("WanImageToVideoPipeline",),
    settings={"expand_timesteps": True},
    models="Wan 2.2 5B image to video",
    refused=("last_image",),
    inputs=inputs,
    call=call,
    given=given,
    pictures={FIRST: USE},
)
