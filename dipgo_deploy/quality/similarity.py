"""How alike two pictures are: one number a picture, for measuring (the losses of a search are in ``search.losses``).

Imports torch: import it inside functions.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

# Rows: Y, I, Q (FCC NTSC, as the papers of HaarPSI and GMSD use them) of red, green, blue.
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
HAAR_C, HAAR_ALPHA = 30.0, 4.2
GMSD_C = 170.0


def haarpsi(left: Tensor, right: Tensor) -> Tensor:
    """Haar wavelet perceptual similarity of each pair (Reisenhofer et al., 2018): 1 for equal pictures, 0 at worst.

    left, right: (B, 3, H, W), values 0 to 1, H and W at least 16; half of that is looked at, as the paper does.

    Returns:
        (B,) in [0, 1].

    Raises:
        ValueError: shapes differ, or are too small.
    """
    _check(left, right)
    pictures = [_halved(_yiq(picture)) for picture in (left, right)]
    details = [[_haar(picture[:, :1], scale) for scale in (1, 2, 3)] for picture in pictures]
    similar = torch.stack(
        [_alike(one, other, HAAR_C) for one, other in zip(details[0][:2], details[1][:2], strict=True)]
    )
    weights = torch.maximum(details[0][2], details[1][2])
    chroma = [avg_pool2d(pad(picture[:, 1:], (0, 1, 0, 1)), 2, stride=1).abs() for picture in pictures]
    coloured = _alike(chroma[0], chroma[1], HAAR_C).mean(1, keepdim=True)
    similar = torch.cat([similar.mean(0), coloured], 1)
    weights = torch.cat([weights, weights.mean(1, keepdim=True)], 1)
    squashed = (torch.sigmoid(HAAR_ALPHA * similar) * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3)).clamp_min(1e-12)
    empty = weights.sum((1, 2, 3)) == 0  # two pictures of one colour each: nothing weighs anything
    found = (torch.logit(squashed.clamp(1e-12, 1 - 1e-12)) / HAAR_ALPHA) ** 2
    return torch.where(empty, similar.mean((1, 2, 3)), found)


def gmsd(left: Tensor, right: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation of each pair (Xue et al., 2014): 0 for equal pictures, larger is worse.

    left, right: (B, 3, H, W), values 0 to 1, H and W at least 16.

    Returns:
        (B,), not negative.

    Raises:
        ValueError: shapes differ, or are too small.
    """
    _check(left, right)
    steep = [_prewitt(_halved(_yiq(picture)[:, :1])) for picture in (left, right)]
    return _alike(steep[0], steep[1], GMSD_C).flatten(1).std(1, correction=0)


def has_flip() -> bool:
    """Whether the package flip-evaluator is there."""
    return importlib.util.find_spec("flip_evaluator") is not None


def flip(left: Tensor, right: Tensor) -> Tensor:
    """Mean FLIP difference of each pair (Andersson et al., 2020; package flip-evaluator, its own viewing distance).

    left: (B, 3, H, W) pictures, values 0 to 1 (sRGB); right: what they are compared with.

    Returns:
        (B,) float32 in [0, 1], 0 for equal pictures.
    """
    from flip_evaluator import evaluate

    pairs = zip(right, left, strict=True)
    return torch.tensor([evaluate(_pixels(one), _pixels(other), "LDR", applyMagma=False)[1] for one, other in pairs])


def _pixels(picture: Tensor) -> np.ndarray:
    return np.ascontiguousarray(picture.float().cpu().numpy().transpose(1, 2, 0))


def _check(left: Tensor, right: Tensor) -> None:
    if left.shape != right.shape or left.ndim != 4 or left.shape[1] != 3:
        raise ValueError(f"pictures of {tuple(left.shape)} and {tuple(right.shape)} cannot be compared")
    if min(left.shape[-2:]) < 16:
        raise ValueError(f"pictures of {left.shape[-2]}x{left.shape[-1]}: at least 16x16 are needed")


def _yiq(picture: Tensor) -> Tensor:
    """(B, 3, H, W) from 0 to 255."""
    return torch.einsum("yc,bchw->byhw", picture.new_tensor(_YIQ), picture * 255)


def _halved(picture: Tensor) -> Tensor:
    """Means of 2 x 2; an odd side is filled up with zeros."""
    height, width = picture.shape[-2:]
    return avg_pool2d(pad(picture, (0, width % 2, 0, height % 2)), 2)


def _haar(picture: Tensor, scale: int) -> Tensor:
    """Magnitudes (B, 2, H, W) of the horizontal and vertical Haar details, as large as the picture."""
    side = 2**scale
    kernel = picture.new_full((side, side), 1 / side)
    kernel[side // 2 :] *= -1
    margin = (side // 2 - 1, side // 2)
    return conv2d(pad(picture, margin * 2), torch.stack([kernel, kernel.T])[:, None]).abs()


def _prewitt(picture: Tensor) -> Tensor:
    """Magnitudes of the gradient, (B, 1, H, W)."""
    kernel = picture.new_tensor([[1.0, 0.0, -1.0]] * 3) / 3
    return conv2d(picture, torch.stack([kernel, kernel.T])[:, None], padding=1).square().sum(1, keepdim=True).sqrt()


def _alike(one: Tensor, other: Tensor, constant: float) -> Tensor:
    return (2 * one * other + constant) / (one.square() + other.square() + constant)
