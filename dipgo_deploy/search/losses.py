"""How far pruned results are from full ones, and the price of kept gates. All functions are differentiable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

WINDOW = 11
SIGMA = 1.5


def ssim(left: Tensor, right: Tensor, window: int = WINDOW, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each image pair (Wang et al., IEEE TIP 2004): Gaussian window, sigma 1.5, inside only.

    Args:
        left, right: (B, C, H, W), values spanning ``data_range``; H and W at least ``window``.
        window: side of the window in pixels, odd.

    Returns:
        (B,) in [-1, 1], the mean over all windows and channels; 1 for equal images.

    Raises:
        ValueError: shapes differ, or the window does not fit.
    """
    if left.shape != right.shape or left.ndim != 4:
        raise ValueError(f"images of {tuple(left.shape)} and {tuple(right.shape)} cannot be compared")
    if min(left.shape[-2:]) < window:
        raise ValueError(f"images of {left.shape[-2]}x{left.shape[-1]} are smaller than the window of {window}")
    channels = left.shape[1]
    offsets = torch.arange(window, dtype=left.dtype, device=left.device) - (window - 1) / 2
    line = torch.exp(-offsets.square() / (2 * SIGMA**2))
    line = line / line.sum()
    stacked = torch.cat([left, right, left * left, right * right, left * right], dim=1)
    rows = line.reshape(1, 1, 1, -1).expand(5 * channels, 1, 1, window)
    columns = line.reshape(1, 1, -1, 1).expand(5 * channels, 1, window, 1)
    means = torch.nn.functional.conv2d(stacked, rows, groups=5 * channels)
    means = torch.nn.functional.conv2d(means, columns, groups=5 * channels)
    mean_l, mean_r, square_l, square_r, product = means.chunk(5, dim=1)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    variance = square_l - mean_l.square() + square_r - mean_r.square()
    covariance = product - mean_l * mean_r
    luminance = (2 * mean_l * mean_r + c1) / (mean_l.square() + mean_r.square() + c1)
    return (luminance * (2 * covariance + c2) / (variance + c2)).mean(dim=(1, 2, 3))


def psnr(left: Tensor, right: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image pair in decibels: (B, C, H, W) twice -> (B,); at most 100."""
    error = (left - right).square().mean(dim=(1, 2, 3)).clamp_min(1e-10 * data_range**2)
    return 10 * torch.log10(data_range**2 / error)


def _l1(pruned: Tensor, full: Tensor) -> Tensor:
    return (pruned - full).abs().mean(dim=(1, 2, 3))


def _l2(pruned: Tensor, full: Tensor) -> Tensor:
    return (pruned - full).square().mean(dim=(1, 2, 3))


def _one_minus_ssim(pruned: Tensor, full: Tensor) -> Tensor:
    return 1 - ssim(pruned, full)


def _ssim_and_l1(pruned: Tensor, full: Tensor) -> Tensor:
    return _one_minus_ssim(pruned, full) + _l1(pruned, full)


Distance = Callable[[Tensor, Tensor], Tensor]

IMAGE_LOSSES: Mapping[str, Distance] = MappingProxyType(
    {"ssim": _one_minus_ssim, "l1": _l1, "l2": _l2, "ssim+l1": _ssim_and_l1}
)
"""Name -> distance (B,) of decoded images (B, 3, H, W) with values in [0, 1]."""

LATENT_LOSSES: Mapping[str, Distance] = MappingProxyType({"latent-l1": _l1, "latent-l2": _l2})
"""Name -> distance (B,) of final latents (B, C, h, w)."""


def sparsity(gates: Tensor, gamma: Sequence[float]) -> Tensor:
    """The price of kept gates, ``sum(gamma_k * g_tk) / (T * N)`` (DiP-GO, arXiv 2410.16942): (T, N), N -> scalar."""
    weights = torch.tensor(gamma, dtype=gates.dtype, device=gates.device)
    return (gates * weights).mean()
