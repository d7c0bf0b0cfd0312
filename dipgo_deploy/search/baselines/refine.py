"""Local refinement of given gates on the true objective: gates change places at equal cost, and stay if it helps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.baselines.base import Task
from dipgo_deploy.search.baselines.uniform import uniform_gates
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.moves import Band, moved_places, propose, repair
from dipgo_deploy.search.postprocess import unreachable

# How many gates change places at a time, in turn.
_SIZES = (16, 8, 4, 2, 1)
# Moves of one kind that are tried in a row before it is another kind's turn.
_TRIES = 10
# Gradients in a row that may lead nowhere before no more are taken: where single gates have no effect (a chain with
# output caches) they never help, and each costs as much as several evaluations.
_FRUITLESS = 2

Proposals = Iterator[Gates]


def refine(task: Task, starts: Sequence[Gates]) -> Gates:
    """The best gates found from the best of several starts; they cost no more than the target or the uniform interval.

    A start that costs more, or is further from the target than the tolerance, is brought there first; its loss is that
    of what it becomes. (Uniform intervals cost a little more than their target where every evaluation costs something.)
    Three kinds of moves take turns, and a kind that helped goes on: launches move to other evaluations
    (`moved_places`); the gradient of the loss with respect to the gates names the kept ones that matter least and the
    removed ones that are missed most, and several of each change places, fewer and fewer; random moves (`propose`).
    Only what lowers the true loss is kept, so the result is no worse on the objective's images than any start.

    Raises:
        UserError: no start can be brought to the target.
    """
    rng, begun = random.Random(task.seed), task.objective.evaluations
    uniform = task.costs.ratio(uniform_gates(task.costs, task.target))
    near = abs(uniform - task.target) <= task.tolerance
    allowed = Band(min(task.band.low, uniform) if near else task.band.low, task.band.high)
    repaired = [
        start if allowed.holds(task.costs.ratio(start)) else repair(start, task.costs, allowed, rng) for start in starts
    ]
    usable = [gates for gates in repaired if gates is not None and task.allows(gates)]
    if not usable:
        ratios = [task.costs.ratio(start) for start in starts]
        nearest = min(ratios, key=lambda ratio: abs(ratio - task.target))
        raise UserError(unreachable(task.target, nearest, task.tolerance))
    best = min(usable, key=task.objective)
    kinds = _Kinds(task, allowed, rng)
    # Moves to gates that were tried before are free, so the number of rounds is limited too.
    for _ in range(4 * task.budget):
        if task.spent(begun):
            break
        moved = kinds.better(best, begun)
        if moved is None:
            kinds.turn()
        else:
            best = moved
    return best


class _Kinds:
    """The kinds of moves and whose turn it is."""

    def __init__(self, task: Task, band: Band, rng: random.Random) -> None:
        self._task, self._band, self._rng = task, band, rng
        self._fruitless = 0
        self._kinds: list[Callable[[Gates], Proposals]] = [self._places, self._random]
        if task.gradient is not None:
            self._kinds.insert(1, self._exchanges)
        self._now = 0

    def turn(self) -> None:
        """It is the next kind's turn; gradients are given up when they were of no use."""
        if self._kinds[self._now] == self._exchanges:
            self._fruitless += 1
            if self._fruitless >= _FRUITLESS:
                self._kinds.remove(self._exchanges)
                self._now -= 1
        self._now = (self._now + 1) % len(self._kinds)

    def better(self, gates: Gates, begun: int) -> Gates | None:
        """Gates with a lower loss by a few moves of the kind whose turn it is."""
        task, loss, start = self._task, self._task.objective(gates), self._task.objective.evaluations
        for moved in self._kinds[self._now](gates):
            if task.spent(begun) or task.objective.evaluations - start >= _TRIES:
                break
            if self._holds(moved) and task.objective(moved) < loss:
                if self._kinds[self._now] == self._exchanges:
                    self._fruitless = 0
                return moved
        return None

    def _holds(self, gates: Gates) -> bool:
        return self._band.holds(self._task.costs.ratio(gates)) and self._task.allows(gates)

    def _places(self, gates: Gates) -> Proposals:
        return moved_places(gates, self._rng)

    def _exchanges(self, gates: Gates) -> Proposals:
        assert self._task.gradient is not None
        gradient = self._task.gradient(gates)
        for size in _SIZES:
            moved = exchange(self._task.costs, gates, gradient, size, self._band, self._rng)
            if moved is not None and moved != gates:
                yield moved

    def _random(self, gates: Gates) -> Proposals:
        for _ in range(2 * _TRIES):
            moved = propose(gates, self._task.costs, self._band, self._rng)
            if moved is not None:
                yield moved


def exchange(
    costs: Costs, gates: Gates, gradient: np.ndarray, size: int, band: Band, rng: random.Random
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
    return repair(_gates(kept), costs, band, rng)


def _gates(kept: np.ndarray) -> Gates:
    return tuple(tuple(row) for row in kept.tolist())
