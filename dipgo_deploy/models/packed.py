"""Latents whose pixels, two by two, are the tokens of a transformer: the order of channels that FLUX began with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.shift import flow_options

if TYPE_CHECKING:
    from torch import Tensor

# Latent pixels of a token's side.
PACK = 2


def pack(latent: Tensor) -> Tensor:
    """Latent (B, C, h, w) -> tokens (B, h / 2 * w / 2, C * 4), row by row."""
    batch, channels, height, width = latent.shape
    rows, columns = height // PACK, width // PACK
    tokens = latent.reshape(batch, channels, rows, PACK, columns, PACK).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, rows * columns, channels * PACK**2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``pack``; rows and columns of tokens."""
    batch, _, features = tokens.shape
    channels = features // PACK**2
    latent = tokens.reshape(batch, rows, columns, channels, PACK, PACK).permute(0, 3, 1, 4, 2, 5)
    return latent.reshape(batch, channels, rows * PACK, columns * PACK)


def as_tokens(latent: Tensor, features: int) -> Tensor:
    """A latent (B, C, [f,] h, w) as the tokens (B, T, D) of a pipeline whose tokens have so many ``features``: each of
    its pixels where those are its channels, else two by two."""
    return latent.flatten(2).transpose(1, 2) if features == latent.shape[1] else pack(latent)


def as_latent(tokens: Tensor, extents: Sequence[int]) -> Tensor:
    """The inverse of ``as_tokens`` for tokens of a latent alone; extents: [f,] h, w."""
    count = 1
    for extent in extents:
        count *= extent
    if tokens.shape[1] == count:
        return tokens.transpose(1, 2).unflatten(2, tuple(extents))
    return unpack(tokens, extents[-2] // PACK, extents[-1] // PACK)


def channels_of_tokens(class_name: str, config: Mapping[str, Any]) -> int:
    """Channels of the latent, a quarter of a token's. Raises UserError when the model takes more than the latent."""
    into, patch = int(config["in_channels"]), config["patch_size"]
    out = int(config.get("out_channels") or into)
    if into != out or patch != 1 or into % PACK**2:
        raise UserError(
            f"{class_name}: in_channels {into}, out_channels {out}, patch_size {patch}: only models whose input is "
            "the latent packed 2x2 work"
        )
    return into // PACK**2


def check_even(class_name: str, height: int, width: int) -> None:
    """Refuse (UserError) a latent that two by two pixels do not fill."""
    if height % PACK or width % PACK:
        raise UserError(
            f"{class_name}: latent of {height}x{width}; give a height and width whose latent sides are even "
            "(multiples of 16 pixels with its VAE)"
        )


def set_timesteps(
    config: Mapping[str, Any], scheduler: Mapping[str, Any], height: int, width: int, steps: int
) -> Mapping[str, Any]:
    """The pipeline's ``sigmas``, and ``mu`` for the number of tokens for a scheduler with dynamic shifting."""
    return flow_options(scheduler, (height // PACK) * (width // PACK), steps)
