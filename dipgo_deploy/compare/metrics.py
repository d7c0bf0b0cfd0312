"""How far two tensors are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Below this a reference tensor counts as zero: nothing is relative to it.
_SMALLEST_PEAK = 1e-12


def peak(expected: np.ndarray) -> float:
    """Largest absolute value of a reference tensor (at least 1e-12): what errors in it are relative to."""
    return max(float(np.abs(expected).max(initial=0.0)), _SMALLEST_PEAK)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute expected value; NaN and infinity count as infinite."""
    if not np.isfinite(actual).all():
        return float("inf")
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    return float(difference.max(initial=0.0) / peak(expected))


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


def worst(found: Iterable[Agreement]) -> Agreement:
    """The largest error, the smallest PSNR and the smallest cosine of several."""
    relative, psnr, cosine = zip(*found, strict=True)
    return Agreement(max(relative), min(psnr), min(cosine))
