"""From keep scores to gates at a target ratio: one global threshold, found by bisection (DiP-GO's algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.costs import Costs

TOLERANCE = 0.0125
# Where each threshold costs a compilation: how many are looked at on each side of the one bisection ends at, and in
# how many parts the whole range is divided.
_NEAR = 8


@dataclass(frozen=True)
class Selection:
    """Gates at a ratio: T x N without dead ones, the share of the cost they save, the scores they were cut at."""

    gates: Gates
    ratio: float
    threshold: float


def select(
    scores: Sequence[Sequence[float]],
    costs: Costs,
    target: float,
    *,
    tolerance: float = TOLERANCE,
    max_variants: int | None = None,
) -> Selection:
    """Remove every gate whose score lies below one global threshold, which is chosen to save ``target`` of the cost.

    What was computed for removed blocks only goes too, and counts as saved; the first evaluation is kept. With
    ``max_variants`` gates are re-enabled until so few graphs are left, and the ratio is what is saved then.

    Args:
        scores: (T, `Costs.width`) keep scores; those of the first evaluation are not looked at.
        target: share to save, 0 to 1. tolerance: how far from it the result may be.

    Raises:
        UserError: no threshold comes within the tolerance; the message names the closest ratio that one reaches.
    """
    levels = sorted({float(score) for row in scores[1:] for score in row})
    attempt = _memo(lambda removed: _cut(scores, costs, levels, removed, max_variants))
    # Removed levels from the lowest up. More removed saves more, with rare exceptions (a removal can bring an earlier
    # computation back to life), so bisection leads next to the target, and a look around makes sure of it.
    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        if attempt(middle).ratio < target:
            low = middle + 1
        else:
            high = middle
    around = [place for place in (low - 1, low) if place >= 0]
    best = min((attempt(place) for place in around), key=lambda found: abs(found.ratio - target))
    if abs(best.ratio - target) > tolerance:
        places = _places(len(levels), low, everywhere=max_variants is None)
        best = min((attempt(place) for place in places), key=lambda found: abs(found.ratio - target))
    if abs(best.ratio - target) > tolerance:
        raise UserError(unreachable(target, best.ratio, tolerance))
    return best


def unreachable(target: float, closest: float, tolerance: float = TOLERANCE) -> str:
    """The message for a ratio that cannot be reached."""
    return (
        f"--prune-ratio {target:g}: cannot be reached within {tolerance:g}; the closest reachable ratio is "
        f"{closest:.4f}: ask for that one"
    )


def highest_ratio(costs: Costs) -> float:
    """What is saved when only the first evaluation runs."""
    return costs.ratio([[False] * costs.width] * costs.steps)


def check_ratio(target: float, costs: Costs, tolerance: float = TOLERANCE) -> None:
    """Refuse (UserError) a ratio that no gates reach, before a search is spent on it."""
    if not 0 <= target < 1:
        raise UserError(f"--prune-ratio {target:g}: give a share of at least 0 and below 1")
    highest = highest_ratio(costs)
    if target > highest + tolerance:
        raise UserError(unreachable(target, highest, tolerance))


def _places(count: int, around: int, *, everywhere: bool) -> list[int]:
    """Where to look when bisection missed: at all thresholds, or near its end and here and there."""
    if everywhere:
        return list(range(count + 1))
    near = range(max(0, around - _NEAR), min(count, around + _NEAR) + 1)
    return sorted({*near, *range(0, count + 1, max(1, count // _NEAR))})


def _cut(
    scores: Sequence[Sequence[float]], costs: Costs, levels: Sequence[float], removed: int, max_variants: int | None
) -> Selection:
    threshold = levels[removed] if removed < len(levels) else float("inf")
    gates = costs.clean([[score >= threshold for score in row] for row in scores])
    if max_variants is not None:
        gates = costs.limited(gates, max_variants)
    return Selection(gates, costs.ratio(gates), threshold)


def _memo(function: Callable[[int], Selection]) -> Callable[[int], Selection]:
    known: dict[int, Selection] = {}

    def call(place: int) -> Selection:
        if place not in known:
            known[place] = function(place)
        return known[place]

    return call
