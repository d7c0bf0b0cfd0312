"""How far a tensor is from what it should be."""

from __future__ import annotations

import math

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


def relative_rms(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference over that of ``wanted``; infinite where it is not finite."""
    wanted = wanted.astype(np.float64)
    difference = float(np.sqrt(np.mean(np.square(found.astype(np.float64) - wanted))))
    size = float(np.sqrt(np.mean(np.square(wanted))))
    return difference / size if math.isfinite(difference) and size else (0.0 if difference == 0 else math.inf)
