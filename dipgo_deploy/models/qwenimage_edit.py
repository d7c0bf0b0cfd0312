"""Qwen-Image-Edit: the tokens of a picture stand behind those of the latent, at position 1 of the axis of frames.

The pipeline's prompt encoder, Qwen 2.5 VL, sees the picture, too. It is not exported: calls take its states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.models import qwenimage
from dipgo_deploy.models.family import InputSpec, TextScheme
from dipgo_deploy.models.joined import FOLLOWED, variant_name
from dipgo_deploy.models.packed import unpack

if TYPE_CHECKING:
    from torch import Tensor

# Tokens of the text: the picture's, each of 28 x 28 pixels of 1024 x 1024, the prompt's, of Qwen-Image 512, and room
# for the instruction around it and for sides that are rounded up.
_TOKENS = 2048


def inputs(config: Mapping[str, Any], batch: int, height: int, width: int, text_length: int) -> tuple[InputSpec, ...]:
    """Those of Qwen-Image, and ``image_latents`` (batch, C, height, width) of the picture to follow."""
    own = qwenimage.inputs(config, batch, height, width, text_length)
    return (*own, InputSpec(FOLLOWED, own[0].shape, "model", "condition", "image"))


def text(config: Mapping[str, Any], pipeline: Any) -> TextScheme:
    """States of picture and prompt together, given with every call."""
    return TextScheme(length=_TOKENS, encode=_not_exported, tokenizers=(), given=True)


def _not_exported(pipeline: Any, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise NotImplementedError("states of picture and prompt are given")


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """What the pipelines hand to ``forward``: the latents of both pictures, the second as the condition that it is."""
    (_, rows, columns), *others = kwargs["img_shapes"][0]
    latent, followed = kwargs["hidden_states"].chunk(1 + len(others), dim=1)
    conditions = qwenimage.filled(kwargs, _TOKENS)
    return latent, kwargs["timestep"], {**conditions, FOLLOWED: unpack(followed, rows, columns)}


FAMILY = replace(
    qwenimage.FAMILY,
    class_name=variant_name(qwenimage.FAMILY, "Edit"),
    pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    models="Qwen-Image-Edit, 2509",
    refused=("prompts (their encoder sees the picture: give `prompt_embeds`)", "several pictures", "Edit 2511"),
    inputs=inputs,
    text=text,
    given=given,
    pictures={FOLLOWED: PictureUse(argument="image", form="latents")},
)
