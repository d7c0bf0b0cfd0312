"""How diffusers' pipelines scale what a VAE takes and gives; the one place for it."""

from __future__ import annotations

from typing import Any

from dipgo_deploy.errors import UserError

# VAEs for videos that pipelines of pictures use, with one frame.
_ONE_FRAME = ("AutoencoderKLQwenImage",)


def scaling_and_shift(vae: Any) -> tuple[Any, Any]:
    """Factor and offset between what the VAE gives and the latents that a denoiser sees.

    Numbers, or where the VAE has statistics of each channel float32 tensors: (C, 1, 1, 1) of a VAE for videos, (C, 1,
    1) of channels that hold patches of its own latent (FLUX.2's).

    Raises:
        UserError: a VAE that has no such factor.
    """
    config = vae.config
    if config.get("timestep_conditioning"):
        raise UserError(
            f"vae: {type(vae).__name__} with timestep_conditioning draws noise as it decodes, which is not supported; "
            "use a VAE without (LTX-Video 0.9.0's), or --no-components"
        )
    norm = getattr(vae, "bn", None)
    if norm is not None:
        deviation = (norm.running_var.float() + config.batch_norm_eps).sqrt()
        return 1 / _by_channel(deviation, 2), _by_channel(norm.running_mean, 2)
    factor = config.get("scaling_factor")
    # The statistics are settings of one VAE and buffers of another.
    buffers = getattr(vae, "_buffers", {})
    means, deviations = (config.get(name, buffers.get(name)) for name in ("latents_mean", "latents_std"))
    if means is not None and deviations is not None:
        mean, deviation = _by_channel(means, 3), _by_channel(deviations, 3)
        return (factor or 1.0) / deviation, mean
    if not isinstance(factor, float | int) or not factor:
        raise UserError(
            f"vae: {type(vae).__name__} has no scaling_factor, which these pipelines divide latents by; use another "
            "VAE, or --no-components"
        )
    return float(factor), float(config.get("shift_factor") or 0.0)


def to_vae(vae: Any, latents: Any) -> Any:
    """What the VAE decodes, of latents (B, C, [f,] h, w), in its own channels and extents."""
    from torch.nn import functional

    scaling, shift = scaling_and_shift(vae)
    scaled = (latents.unsqueeze(2) if _one_frame(vae) else latents) / scaling + shift
    patch = _patch(vae)
    return scaled if patch == 1 else functional.pixel_shuffle(scaled, patch)


def from_vae(vae: Any, encoded: Any) -> Any:
    """Latents (B, C, [f,] h, w) of what the VAE encoded; the inverse of ``to_vae``."""
    return _latents(vae, encoded, scaling_and_shift(vae)[1])


def deviation_of(vae: Any, encoded: Any) -> Any:
    """The standard deviation of those latents, of that of what the VAE encoded."""
    return _latents(vae, encoded, 0.0)


def _latents(vae: Any, encoded: Any, shift: Any) -> Any:
    from torch.nn import functional

    patch = _patch(vae)
    latents = encoded if patch == 1 else functional.pixel_unshuffle(encoded, patch)
    scaled = (latents - shift) * scaling_and_shift(vae)[0]
    return scaled.squeeze(2) if _one_frame(vae) else scaled


def decoded(vae: Any, latents: Any) -> Any:
    """What the VAE makes of latents (B, C, [f,] h, w) in its dtype: (B, 3, [F,] H, W), about -1 to 1."""
    images = vae.decode(to_vae(vae, latents).to(vae.dtype), return_dict=False)[0]
    return images.squeeze(2) if _one_frame(vae) else images


def to_images(decoded: Any) -> Any:
    """Images float32 (B, [F,] H, W, 3) in [0, 1] of what a VAE made, (B, 3, [F,] H, W)."""
    return (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, *range(2, decoded.ndim), 1)


def from_images(vae: Any, images: Any) -> Any:
    """What the VAE encodes, (B, 3, [F,] H, W) in [-1, 1], of images (B, [F,] H, W, 3) in [0, 1]."""
    given = (2 * images - 1).permute(0, images.ndim - 1, *range(1, images.ndim - 1))
    return given.unsqueeze(2) if _one_frame(vae) else given


def _patch(vae: Any) -> int:
    """Pixels of the VAE's latent, of each side, that one of the denoiser's holds in its channels."""
    return 1 if getattr(vae, "bn", None) is None else int(vae.config.patch_size[0])


def _one_frame(vae: Any) -> bool:
    return type(vae).__name__ in _ONE_FRAME


def _by_channel(values: Any, axes: int) -> Any:
    """float32 (C, 1, ...) with so many axes behind the channels."""
    import torch

    return torch.as_tensor(values, dtype=torch.float32).reshape(-1, *(1,) * axes)
