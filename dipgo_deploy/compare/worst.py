"""The pictures of a comparison that differ most, kept to be looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dipgo_deploy.difference import relative_error

Seen = Callable[[str, np.ndarray, np.ndarray], None]
"""Takes pictures of both sides, float32 ([...,] H, W, 3) in [0, 1]: place, actual, expected."""

_COUNT = 4


def nobody(place: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Takes none."""


@dataclass(frozen=True)
class Pair:
    """One picture of both sides, float32 (H, W, 3) in [0, 1]. error: the largest difference over the largest value."""

    place: str
    actual: np.ndarray
    expected: np.ndarray
    error: float


class WorstPictures:
    """Takes pictures and keeps the four pairs that differ most, of a video its worst frame, the worst first."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    def take(self, place: str, actual: np.ndarray, expected: np.ndarray) -> None:
        """Look at pictures float32 ([...,] H, W, 3) in [0, 1] of one place; those of other shapes are left out."""
        if actual.shape != expected.shape or actual.shape[-1] != 3:
            return
        shape = (-1, *actual.shape[-3:])
        frames = zip(np.asarray(actual).reshape(shape), np.asarray(expected).reshape(shape), strict=True)
        found = [Pair(place, ours, theirs, relative_error(ours, theirs)) for ours, theirs in frames]
        worst = max(found, key=lambda pair: pair.error)
        self.pairs = sorted([*self.pairs, worst], key=lambda pair: pair.error, reverse=True)[:_COUNT]
