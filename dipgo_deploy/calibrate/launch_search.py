"""Which evaluations of a full run are launched, under the solver that is fitted to them. numpy only.

A few even grids are tried, then launches are moved one at a time as long as the fitted final latent comes closer on
images held aside. A fit costs as many launches as it has, less those before the one that moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dipgo_deploy.calibrate.core import Group, Launch, Report
from dipgo_deploy.calibrate.rows import KnownLaunches, Predict, fit_rows
from dipgo_deploy.calibrate.runs import Runs
from dipgo_deploy.errors import UserError

Positions = tuple[int, ...]
# Launches whose predictions are kept for candidates that begin alike.
KNOWN = 128


@dataclass(frozen=True)
class LaunchSearchOptions:
    """How launches are searched.

    Attributes:
        images: of the calibration's that candidates are fitted to, and as many of those held aside that judge them.
        budget: fits for each number of launches.
    """

    images: int = 40
    budget: int = 120


def search_launches(
    runs: Runs,
    predict: Predict,
    timesteps: Sequence[float],
    counts: Sequence[int],
    options: LaunchSearchOptions,
    report: Report = lambda stage, done, total: None,
) -> Iterator[tuple[int, tuple[tuple[Launch, ...], int]]]:
    """For each number of launches, from the smallest on, the launches found and how many fits it took.

    Args:
        runs: with the latents of all evaluations.
        predict: makes the predictions of whole launches.
        timesteps: of the full run's evaluations.
        counts: numbers of launches, see ``check_counts``.
        options: see there.
        report: told (stage, fits so far, budget).
    """
    total = len(timesteps)
    known = KnownLaunches(KNOWN)
    groups = _some(runs.groups, options.images)

    def residual(positions: Positions) -> float:
        return fit_rows(runs, launches_at(positions, timesteps), predict, groups=groups, known=known).residual

    before: Positions = ()
    for count in sorted(set(counts)):

        def told(fits: int, count: int = count) -> None:
            report(f"searching {count} launches", fits, options.budget)

        starts = [*even_grids(count, total), *with_one_more(before, count, total)]
        search = _Search(residual, total, options.budget, told)
        before = search.run(starts)
        yield count, (launches_at(before, timesteps), search.fits)


def check_counts(counts: Sequence[int], total: int) -> None:
    """Refuse (UserError) more launches than a full run of ``total`` evaluations has, or less than one."""
    for count in counts:
        if not 1 <= count <= total:
            raise UserError(f"--launches {count}: the full run has {total} evaluations; give 1 to {total}")


def launches_at(positions: Sequence[int], timesteps: Sequence[float]) -> tuple[Launch, ...]:
    """Whole launches at these evaluations of the full run."""
    return tuple(Launch(float(timesteps[position]), position, True) for position in positions)


def even_grids(count: int, total: int) -> list[Positions]:
    """Launches in the middle of even parts, at their beginnings, and from the first evaluation to the last."""
    middle = [int((place + 0.5) * total / count) for place in range(count)]
    first = [int(place * total / count) for place in range(count)]
    spread = [round(place) for place in np.linspace(0, total - 1, count)]
    return [tuple(grid) for grid in (middle, first, spread)]


def with_one_more(positions: Positions, count: int, total: int) -> list[Positions]:
    """Launches that were found for one less, with one more in each of their gaps; none for another number."""
    if len(positions) != count - 1 or not positions:
        return []
    edges = (-1, *positions, total)
    middles = [(low + high) // 2 for low, high in zip(edges[:-1], edges[1:], strict=True) if high - low > 1]
    return [tuple(sorted((*positions, middle))) for middle in middles]


def moves(positions: Positions, place: int, total: int) -> list[Positions]:
    """One launch moved by one, two or three evaluations."""
    low = positions[place - 1] if place else -1
    high = positions[place + 1] if place + 1 < len(positions) else total
    moved = (positions[place] + shift for shift in (-1, 1, -2, 2, -3, 3))
    return [(*positions[:place], to, *positions[place + 1 :]) for to in moved if low < to < high]


class _Search:
    """Descent by single moves.

    fits: candidates tried so far.
    """

    def __init__(
        self, residual: Callable[[Positions], float], total: int, budget: int, told: Callable[[int], None]
    ) -> None:
        self._residual, self._total, self._budget, self._told = residual, total, budget, told
        self._tried: dict[Positions, float] = {}

    @property
    def fits(self) -> int:
        return len(self._tried)

    def run(self, starts: Sequence[Positions]) -> Positions:
        """The best launches that the budget reaches; all ``starts`` are tried."""
        best = min(dict.fromkeys(starts), key=self._try)
        while True:
            better = self._swept(best)
            if better == best:
                return best
            best = better

    def _swept(self, best: Positions) -> Positions:
        """One sweep over the launches, the last ones first, because those before them are known."""
        for place in reversed(range(len(best))):
            while True:
                # Not a list: each one that is tried takes from the budget.
                candidates = (moved for moved in moves(best, place, self._total) if self._affordable(moved))
                nearest = min(candidates, key=self._try, default=best)
                if self._try(nearest) >= self._try(best):
                    break
                best = nearest
        return best

    def _affordable(self, positions: Positions) -> bool:
        return positions in self._tried or len(self._tried) < self._budget

    def _try(self, positions: Positions) -> float:
        if positions not in self._tried:
            self._told(len(self._tried))
            self._tried[positions] = self._residual(positions)
        return self._tried[positions]


def _some(groups: Sequence[Group], images: int) -> list[Group]:
    """Whole groups of at least so many images that are fitted to, and that are held aside; all if there are less."""
    chosen: list[Group] = []
    for aside in (False, True):
        count = 0
        for group in groups:
            if group.held_aside == aside and count < images:
                chosen.append(group)
                count += len(group.pairs)
    return chosen
