"""How far two tensors are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dipgo_deploy.difference import peak, relative_error

# Relative error of latents and pictures in fewer bits beyond which something is certainly broken.
WHOLE = 1.0


class Agreement(NamedTuple):
    """The largest relative error, the smallest PSNR (dB over the reference's largest value) and the smallest cosine."""

    relative: float
    psnr: float
    cosine: float

    def __str__(self) -> str:
        return (
            f"largest error {self.relative:.1e} of the largest value, PSNR {self.psnr:.1f} dB, cosine {self.cosine:.7f}"
        )


def agreement(actual: np.ndarray, expected: np.ndarray) -> Agreement:
    """Of one tensor; NaN or infinity in it is an infinite error and PSNR -inf."""
    relative = relative_error(actual, expected)
    if not math.isfinite(relative):
        return Agreement(math.inf, -math.inf, math.nan)
    found, wanted = (array.astype(np.float64).ravel() for array in (actual, expected))
    mean = float(np.mean(np.square(found - wanted)))
    psnr = math.inf if mean == 0 else 10 * math.log10(peak(expected) ** 2 / mean)
    norms = float(np.linalg.norm(found) * np.linalg.norm(wanted))
    return Agreement(relative, psnr, float(found @ wanted) / norms if norms else float(not found.any()))


def worst(agreements: Iterable[Agreement]) -> Agreement:
    """The largest error, the smallest PSNR and the smallest cosine of several."""
    relative, psnr, cosine = zip(*agreements, strict=True)
    return Agreement(max(relative), min(psnr), min(cosine))


@dataclass(frozen=True)
class Tolerance:
    """When a tensor passes: its largest absolute error is at most ``relative`` of the reference's largest absolute
    value, or at most ``absolute``."""

    relative: float
    absolute: float = 0.0


@dataclass(frozen=True)
class TensorError:
    """One tensor against its reference.

    Attributes:
        max_absolute: largest absolute difference.
        relative: that over the reference's largest absolute value. Both are infinite where the tensor has NaN or
            infinity, or another shape.
        cosine: -1 to 1.
        psnr: in dB over the reference's largest value.
        limit: the largest relative error that passes by itself.
        made: where a launch inherits an error from its latent, the relative error that it makes itself, beside the
            model on that very latent; None where none was looked for.
        carried: what it inherits, in a comparison crosswise: how far the reference's own two results are apart.
    """

    name: str
    max_absolute: float
    relative: float
    cosine: float
    psnr: float
    passed: bool
    limit: float
    made: float | None = None
    carried: float | None = None


def tensor_error(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: Tolerance) -> TensorError:
    """How far a tensor is from its reference, and whether that is within tolerance."""
    if actual.shape != expected.shape:
        return TensorError(name, math.inf, math.inf, math.nan, -math.inf, passed=False, limit=tolerance.relative)
    found = agreement(actual, expected)
    absolute = found.relative * peak(expected)
    passed = found.relative <= tolerance.relative or absolute <= tolerance.absolute
    return TensorError(name, absolute, found.relative, found.cosine, found.psnr, passed, tolerance.relative)


def image_errors(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: Tolerance) -> tuple[TensorError, ...]:
    """Of pictures (B, H, W, 3); of videos (B, F, H, W, 3) also of the frame that is worst, over the largest value of
    all, so that it is judged as the whole is."""
    whole = tensor_error(name, actual, expected, tolerance)
    if actual.ndim != 5 or actual.shape != expected.shape:
        return (whole,)
    frames = [
        _of_frame(f"{name}, frame {place}", place, actual, expected, tolerance) for place in range(len(actual[0]))
    ]
    return whole, max(frames, key=lambda frame: (frame.relative, -frame.psnr))


def _of_frame(name: str, place: int, actual: np.ndarray, expected: np.ndarray, tolerance: Tolerance) -> TensorError:
    found = agreement(actual[:, place], expected[:, place])
    share = peak(expected[:, place]) / peak(expected)
    relative, absolute = found.relative * share, found.relative * peak(expected[:, place])
    passed = relative <= tolerance.relative or absolute <= tolerance.absolute
    psnr = found.psnr - 20 * math.log10(share)
    return TensorError(name, absolute, relative, found.cosine, psnr, passed, tolerance.relative)


def inherited(error: TensorError, own: TensorError) -> TensorError:
    """``error`` of a launch in a loop, judged by the error that it makes on the latent that it got, ``own``."""
    return replace(error, passed=own.passed, made=own.relative)
