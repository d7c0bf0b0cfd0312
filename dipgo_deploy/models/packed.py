"""Latents whose pixels, two by two, are the tokens of a transformer: the order of channels that FLUX began with."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
