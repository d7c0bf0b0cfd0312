"""Wan 2.1 image to video: the first frame of the video is given.

At every evaluation the latent is joined with a mask of the given frame and with the latents of a video that begins with
the picture and is grey behind it. The model of 2.1 also sees CLIP's states of the picture, beside the text's in its
cross-attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.denoisers import with_second
from dipgo_deploy.models.family import InputSpec
from dipgo_deploy.models.image_encoder import states_of
from dipgo_deploy.models.joined import MASK, Beside, with_channels
from dipgo_deploy.models.wan import CLASS_NAME
from dipgo_deploy.models.wan import FAMILY as TEXT_TO_VIDEO

LATENTS, STATES = "image_latents", "encoder_hidden_states_image"
_ENCODER = "image_encoder"

_JOINED = with_channels(
    TEXT_TO_VIDEO,
    "ImageToVideo",
    (
        Beside(MASK, PictureUse(argument="image", form="first_frame"), -1),
        Beside(LATENTS, PictureUse(argument="image", form="latents")),
    ),
    alone={"image_dim": None, "added_kv_proj_dim": None},
    pipelines=("WanImageToVideoPipeline",),
)


def inputs(config: Mapping[str, Any], batch: int, *size_and_text: int) -> tuple[InputSpec, ...]:
    """Those of text to video, ``mask`` (batch, frames to one of the latent, f, h, w), ``image_latents`` (batch, C, f,
    h, w) and, with ``image_dim``, ``encoder_hidden_states_image`` (batch, T, D).

    Raises:
        UserError: as text to video; an image encoder that is missing or another one; a model of two pictures.
    """
    own = _JOINED.inputs(config, batch, *size_and_text)
    width = config.get("image_dim")
    if width is None:
        return own
    if config.get("pos_embed_seq_len") is not None:
        raise UserError(
            f"{CLASS_NAME}: pos_embed_seq_len {config['pos_embed_seq_len']}: models that are given the last frame, "
            "too, are not supported; use one that starts from a picture"
        )
    if _ENCODER not in config:
        raise UserError(f"{CLASS_NAME}: image_dim {width}, but its pipeline has no {_ENCODER}; use the whole folder")
    tokens, made = states_of(config[_ENCODER])
    if made != width:
        raise UserError(f"{CLASS_NAME}: image_dim {width}, its {_ENCODER} makes states of {made}; use its own")
    return (*own, InputSpec(STATES, (batch, tokens, int(width)), "model", "condition", "image"))


FAMILY = replace(
    _JOINED,
    models="Wan 2.1 image to video",
    refused=("last_image", "first and last frame"),
    inputs=inputs,
    pictures={**_JOINED.pictures, STATES: PictureUse(argument="image", form="states")},
    image_encoder=(_ENCODER, "image_processor"),
    float32_in_fp16=(*TEXT_TO_VIDEO.float32_in_fp16, _ENCODER),
)
# Without CLIP's states.
TWO = with_second(FAMILY, models="Wan 2.2 image to video (two experts)")
