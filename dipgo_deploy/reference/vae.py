"""How diffusers' pipelines scale what a VAE takes and gives; the one place for it."""

from __future__ import annotations

from typing import Any

from dipgo_deploy.errors import UserError


def scaling_and_shift(vae: Any) -> tuple[float, float]:
    """Factor and offset between what the VAE gives and the latents that a denoiser sees.

    Raises:
        UserError: a VAE that has no such factor.
    """
    factor = vae.config.get("scaling_factor")
    if not isinstance(factor, float | int) or not factor:
        raise UserError(
            f"vae: {type(vae).__name__} has no scaling_factor, which these pipelines divide latents by; use another "
            "VAE, or --no-components"
        )
    return float(factor), float(vae.config.get("shift_factor") or 0.0)


def to_vae(vae: Any, latents: Any) -> Any:
    """What the VAE decodes, of latents (B, C, h, w)."""
    scaling, shift = scaling_and_shift(vae)
    return latents / scaling + shift


def from_vae(vae: Any, encoded: Any) -> Any:
    """Latents (B, C, h, w) of what the VAE encoded; the inverse of ``to_vae``."""
    scaling, shift = scaling_and_shift(vae)
    return (encoded - shift) * scaling
