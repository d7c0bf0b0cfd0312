"""Videos whose first frame of the latent is given: it takes the latent's place at every evaluation.

Its tokens are at timestep 0, all others at the evaluation's. Nothing is predicted for it: the sampler leaves that frame
alone, and at the end the picture's latents take its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.models.family import InputSpec

if TYPE_CHECKING:
    from torch import Tensor

FIRST = "image_latents"
USE = PictureUse(argument="image", form="latents", kept=True)


def with_first(specs: tuple[InputSpec, ...]) -> tuple[InputSpec, ...]:
    """Inputs of a model, of which the first is the latent, and ``image_latents`` (batch, C, 1, h, w)."""
    batch, channels, _, *extents = specs[0].shape
    return (*specs, InputSpec(FIRST, (batch, channels, 1, *extents), "model", "condition", "image"))


def put_first(latent: Tensor, conditions: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The latent (B, C, f, h, w) with its first frame, and the other conditions."""
    import torch

    first = conditions[FIRST].to(latent.dtype)
    others = {name: tensor for name, tensor in conditions.items() if name != FIRST}
    return torch.cat([first, latent[:, :, 1:]], dim=2), others


def predicted_behind(prediction: Tensor) -> Tensor:
    """A prediction (B, C, f, h, w) with 0 in the first frame."""
    import torch

    return torch.cat([torch.zeros_like(prediction[:, :, :1]), prediction[:, :, 1:]], dim=2)


def by_token(clean: Tensor, noisy: Tensor, frames: int, tokens: int) -> Tensor:
    """What is made of timestep 0 (B, D) for the tokens of the first frame, and of another (B, D) for those behind it:
    (B, frames * tokens, D)."""
    import torch

    parts = ((clean, tokens), (noisy, (frames - 1) * tokens))
    return torch.cat([rows[:, None].expand(-1, count, -1) for rows, count in parts], dim=1)
