"""Local refinement of given gates on the true objective: gates change places at equal cost, and stay if it helps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.baselines.base import Task
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.moves import Band, propose, repair
from dipgo_deploy.search.postprocess import unreachable

# How many gates change places at a time, in turn, and how many random moves are tried when none of that helps.
_SIZES = (16, 8, 4, 2, 1)
_RANDOM_MOVES = 10


def refine(task: Task, starts: Sequence[Gates]) -> Gates:
    """The best gates found from the best of several starts; they cost no more than the target allows, or that start.

    A start further from the target than the tolerance is brought there first. Then, in turn: the gradient of the loss
    with respect to the gates names the kept ones that matter least and the removed ones that are missed most, and
    several of each change places; fewer and fewer until it helps. When even one pair does not help, random moves are
    tried. Only what lowers the true loss is kept. Without a gradient all moves are random.

    Raises:
        UserError: no start can be brought to the target.
    """
    source, begun = random.Random(task.seed), task.objective.evaluations
    repaired = [
        start
        if abs(task.costs.ratio(start) - task.target) <= task.tolerance
        else repair(start, task.costs, task.band, source)
        for start in starts
    ]
    usable = [gates for gates in repaired if gates is not None and task.allows(gates)]
    if not usable:
        ratios = [task.costs.ratio(start) for start in starts]
        nearest = min(ratios, key=lambda ratio: abs(ratio - task.target))
        raise UserError(unreachable(task.target, nearest, task.tolerance))
    best = min(usable, key=task.objective)
    band = Band(min(task.band.low, task.costs.ratio(best)), task.band.high)
    # Moves to gates that were tried before are free, so the number of rounds is limited too.
    for _ in range(4 * task.budget):
        if task.spent(begun):
            break
        for moved in _proposals(task, best, band, source):
            if task.spent(begun):
                break
            if task.allows(moved) and task.objective(moved) < task.objective(best):
                best = moved
                break
    return best


def _proposals(task: Task, gates: Gates, band: Band, source: random.Random) -> Iterator[Gates]:
    if task.gradient is not None:
        gradient = task.gradient(gates)
        for size in _SIZES:
            moved = exchange(task.costs, gates, gradient, size, band, source)
            if moved is not None and moved != gates:
                yield moved
    for _ in range(_RANDOM_MOVES):
        moved = propose(gates, task.costs, band, source)
        if moved is not None:
            yield moved


def exchange(
    costs: Costs, gates: Gates, gradient: np.ndarray, size: int, band: Band, source: random.Random
) -> Gates | None:
    """The ``size`` removed gates that the loss falls most with are kept, and as much is removed that it rises least by.

    Most and least for their cost. gradient: of the loss (T, N). Returns None when that does not lead into the
    band.
    """
    gradient = gradient / np.maximum(np.array(costs.own), 1e-9)
    kept = np.array(gates)
    kept[0] = True
    cells = [(step, block) for step in range(1, len(gates)) for block in range(kept.shape[1])]
    missed = sorted((cell for cell in cells if not kept[cell]), key=lambda cell: gradient[cell])
    added = missed[:size]
    for cell in added:
        kept[cell] = True
    # What was just added stays; of the rest, the gates whose removal (-1 times the gradient) costs least go first.
    order = sorted((cell for cell in cells if kept[cell] and cell not in added), key=lambda cell: -gradient[cell])
    for cell in order:
        if costs.ratio(_gates(kept)) >= band.low - 1e-9:
            break
        kept[cell] = False
    return repair(_gates(kept), costs, band, source)


def _gates(kept: np.ndarray) -> Gates:
    return tuple(tuple(row) for row in kept.tolist())
