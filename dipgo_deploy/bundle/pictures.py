"""What a condition of the denoiser has of a picture that a call is given."""

from __future__ import annotations

from typing import Literal, get_args

import pydantic

Argument = Literal["image", "mask_image", "control_image", "ip_adapter_image"]
ARGUMENTS: tuple[Argument, ...] = get_args(Argument)


class PictureUse(pydantic.BaseModel):
    """How a condition is made of a picture."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    argument: Argument = pydantic.Field(default="control_image", description="of the call, that gives the picture")
    form: Literal["pixels", "latents", "mask", "first_frame", "embeds", "states"] = pydantic.Field(
        default="pixels",
        description="pixels: (batch, 3, H, W) in [0, 1]; latents: what the VAE's encoder makes of it (batch, C, h, w), "
        "of a video that begins with it and is grey behind it (batch, C, f, h, w), or as many of its frames; "
        "mask: 1 where to draw and 0 elsewhere, of each latent pixel the first of its pixels (batch, 1, h, w), or all "
        "of them as channels (batch, scale**2, h, w); first_frame: 1 in the first frame, which is the picture, and 0 "
        "in the others (batch, frames of the video to one of the latent, f, h, w); embeds: what the image encoder "
        "makes of it, (batch, 1, [T,] D), and of nothing for the unconditional half; states: what its last layer but "
        "one gives (batch, T, D), in both halves",
    )
    place: int = pydantic.Field(
        default=0, ge=0, le=7, description="of the pictures of this argument, where it has several"
    )
    masked: bool = pydantic.Field(default=False, description="grey where the call's mask_image is white")
    drawn: Literal["no", "before", "after", "apart"] = pydantic.Field(
        default="no",
        description="whether latents are drawn from the encoder's distribution, before or after the initial noise, or "
        "for each row of both halves of guidance from a stream apart of the same seed, or are its mean",
    )
    shifted: bool = pydantic.Field(default=True, description="latents have the VAE's shift, as the denoiser's own have")
    offset: float = pydantic.Field(default=0.0, description="added to latents: that shift again, where they have none")
    each: bool = pydantic.Field(
        default=False, description="one draw for each image of the call, not for each picture that it is given"
    )
    kept: bool = pydantic.Field(
        default=False,
        description="latents are the first frames of the video: the denoiser takes them in the place of the latent's, "
        "and so does what it is decoded from",
    )
    start_drawn: bool = pydantic.Field(
        default=False,
        description="the picture's own latents are drawn first of all from the seed, also where nothing starts from it",
    )
