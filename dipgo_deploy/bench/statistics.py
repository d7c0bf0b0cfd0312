"""Intervals for means, shares and distances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NORMAL = 1.96
"""Standard errors of a 95% interval."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def mean(values: np.ndarray) -> Estimate:
    """The mean of independent values (n,), n >= 2, with the normal interval of its standard error."""
    centre = float(np.mean(values))
    half = NORMAL * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Estimate(centre, centre - half, centre + half)


def share(successes: int, trials: int) -> Estimate:
    """A share of trials with Wilson's score interval."""
    value, squared = successes / trials, NORMAL**2 / trials
    centre = (value + squared / 2) / (1 + squared)
    half = NORMAL * (value * (1 - value) / trials + squared / (4 * trials)) ** 0.5 / (1 + squared)
    return Estimate(value, centre - half, centre + half)


def bootstrap(statistic: Callable[[np.ndarray], float], groups: np.ndarray, draws: int = 200) -> Estimate:
    """A statistic of rows (given as an index array), with plus and minus 1.96 standard errors of a bootstrap.

    groups: (n,) the group of each row; rows are redrawn within their group.
    """
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    redrawn = [statistic(np.concatenate([rng.choice(rows, size=len(rows)) for rows in members])) for _ in range(draws)]
    value = statistic(np.arange(len(groups)))
    half = NORMAL * float(np.std(redrawn, ddof=1))
    return Estimate(value, value - half, value + half)
