"""How diffusers' pipelines scale what a VAE takes and gives; the one place for it."""

from __future__ import annotations

from typing import Any

from dipgo_deploy.errors import UserError


def scaling_and_shift(vae: Any) -> tuple[Any, Any]:
    """Factor and offset between what the VAE gives and the latents that a denoiser sees.

    Numbers, or where the VAE has statistics of each channel float32 tensors (C, 1, 1, 1).

    Raises:
        UserError: a VAE that has no such factor.
    """
    config = vae.config
    factor = config.get("scaling_factor")
    # The statistics are settings of one VAE and buffers of another.
    buffers = getattr(vae, "_buffers", {})
    means, deviations = (config.get(name, buffers.get(name)) for name in ("latents_mean", "latents_std"))
    if means is not None and deviations is not None:
        mean, deviation = _by_channel(means), _by_channel(deviations)
        return (factor or 1.0) / deviation, mean
    if not isinstance(factor, float | int) or not factor:
        raise UserError(
            f"vae: {type(vae).__name__} has no scaling_factor, which these pipelines divide latents by; use another "
            "VAE, or --no-components"
        )
    return float(factor), float(config.get("shift_factor") or 0.0)


def to_vae(vae: Any, latents: Any) -> Any:
    """What the VAE decodes, of latents (B, C, [f,] h, w)."""
    scaling, shift = scaling_and_shift(vae)
    return latents / scaling + shift


def from_vae(vae: Any, encoded: Any) -> Any:
    """Latents (B, C, [f,] h, w) of what the VAE encoded; the inverse of ``to_vae``."""
    scaling, shift = scaling_and_shift(vae)
    return (encoded - shift) * scaling


def decoded(vae: Any, latents: Any) -> Any:
    """What the VAE makes of latents (B, C, [f,] h, w) in its dtype: (B, 3, [F,] H, W), about -1 to 1."""
    return vae.decode(to_vae(vae, latents).to(vae.dtype), return_dict=False)[0]


def to_images(decoded: Any) -> Any:
    """Images float32 (B, [F,] H, W, 3) in [0, 1] of what a VAE made, (B, 3, [F,] H, W)."""
    return (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, *range(2, decoded.ndim), 1)


def _by_channel(values: Any) -> Any:
    import torch

    return torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)
