"""Weights of a sum of tensors by least squares, from sums that are gathered batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Relative to the mean squared column. The columns nearly cancel: 1e-4 is too much on every model seen so far.
RIDGES = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)


class Sums:
    """The normal equations of ``columns @ weights = target``, in float64; their size does not grow with the data.

    columns: how many.
    """

    def __init__(self, columns: int) -> None:
        self.gram: Floats = np.zeros((columns, columns))
        self.moments: Floats = np.zeros(columns)
        self.square = 0.0
        self.count = 0

    def add(self, columns: np.ndarray, target: np.ndarray) -> None:
        """Take further data: ``columns`` (n, c) and ``target`` (n,)."""
        wide, goal = columns.astype(np.float64), target.astype(np.float64)
        self.gram += wide.T @ wide
        self.moments += wide.T @ goal
        self.square += float(goal @ goal)
        self.count += len(goal)

    def solve(self, ridge: float) -> Floats:
        """The weights (c,); ridge: relative to the mean squared column."""
        size = len(self.moments)
        eased = self.gram + ridge * np.trace(self.gram) / size * np.eye(size)
        return np.asarray(np.linalg.lstsq(eased, self.moments, rcond=None)[0])

    def residual(self, weights: Floats) -> float:
        """Root of the mean squared error of ``weights``, relative to the target's own root mean square."""
        error = float(weights @ self.gram @ weights - 2 * weights @ self.moments) + self.square
        return float(np.sqrt(max(error, 0.0) / self.square)) if self.square else 0.0


@dataclass(frozen=True)
class Fit:
    """Weights (c,), the ridge they were fitted with, and their relative residual on data held aside."""

    weights: Floats
    ridge: float
    residual: float


def best_fit(training: Sums, held_aside: Sums, ridges: Sequence[float] = RIDGES) -> Fit:
    """The fit to ``training`` whose ridge loses least on ``held_aside``; of equal ones that with the largest ridge."""
    fits = []
    for ridge in sorted(ridges, reverse=True):
        weights = training.solve(ridge)
        fits.append(Fit(weights, ridge, held_aside.residual(weights)))
    return min(fits, key=lambda fit: fit.residual)
