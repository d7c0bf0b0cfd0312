"""A genetic search on loss and cost with non-dominated sorting (NSGA-II, Deb et al. 2002), the paper's comparison."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.baselines.base import Task
from dipgo_deploy.search.baselines.random_search import random_gates
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.moves import Band, propose, repair
from dipgo_deploy.search.postprocess import unreachable


@dataclass(frozen=True)
class Genetic:
    """population: size. slack: how far ratios may stray from the target while searching. mutation: moves a child."""

    population: int = 24
    slack: float = 0.05
    mutation: int = 1

    def search(self, task: Task) -> Gates:
        """See `Method.search`. Starts at random schedules; the uniform interval is not among them."""
        rng, costs, start = random.Random(task.seed), task.costs, task.objective.evaluations
        band = Band(max(0.0, task.target - self.slack), task.target + self.slack)
        people = [
            random_gates(costs, task.target, rng, task.tolerance)
            for _ in range(min(self.population, max(2, task.budget)))
        ]
        for person in people:
            task.objective(person)
        idle = 0
        while not task.spent(start) and idle < 10 * self.population:
            ranked = order(people, [_aims(task, person) for person in people])
            before = task.objective.evaluations
            children: list[Gates] = []
            while len(children) < len(people) and not task.spent(start) and idle < 10 * self.population:
                idle += 1
                child = self._child(ranked, costs, band, rng)
                if child is not None:
                    task.objective(child)
                    children.append(child)
            if task.objective.evaluations > before:
                idle = 0
            pool = list(dict.fromkeys([*people, *children]))
            people = order(pool, [_aims(task, person) for person in pool])[: len(people)]
        usable = [person for person in people if abs(costs.ratio(person) - task.target) <= task.tolerance]
        if not usable:
            # All of the last generation strayed: bring its best back.
            for person in people:
                returned = repair(person, costs, task.band, rng)
                if returned is not None:
                    return returned
            ratio = min((costs.ratio(person) for person in people), key=lambda value: abs(value - task.target))
            raise UserError(unreachable(task.target, ratio, task.tolerance))
        return min(usable, key=task.objective)

    def _child(self, ranked: Sequence[Gates], costs: Costs, band: Band, rng: random.Random) -> Gates | None:
        """Rows of two parents, each the better of two drawn, then mutated and brought into the band."""
        mother, father = (
            ranked[min(int(rng.random() * len(ranked)), int(rng.random() * len(ranked)))] for _ in range(2)
        )
        rows = tuple(a if rng.random() < 0.5 else b for a, b in zip(mother, father, strict=True))
        child = repair(rows, costs, band, rng)
        for _ in range(self.mutation):
            if child is not None:
                child = propose(child, costs, band, rng)
        return child

    def parameters(self) -> dict[str, Any]:
        """Population, slack and mutation."""
        return asdict(self)


def _aims(task: Task, gates: Gates) -> tuple[float, float]:
    return task.objective(gates), 1 - task.costs.ratio(gates)


def order(people: Sequence[Gates], aims: Sequence[tuple[float, ...]]) -> list[Gates]:
    """By non-dominated front, within one the least crowded first. All aims are to be small."""
    left = list(range(len(people)))
    ranked: list[Gates] = []
    while left:
        front = [i for i in left if not any(dominates(aims[j], aims[i]) for j in left)]
        crowd = crowding([aims[i] for i in front])
        ranked += [
            people[i] for _, i in sorted(zip(crowd, front, strict=True), key=lambda entry: (-entry[0], entry[1]))
        ]
        left = [i for i in left if i not in front]
    return ranked


def dominates(left: Sequence[float], right: Sequence[float]) -> bool:
    """No aim worse, one better."""
    return all(a <= b for a, b in zip(left, right, strict=True)) and tuple(left) != tuple(right)


def crowding(aims: Sequence[Sequence[float]]) -> list[float]:
    """Crowding distance of each member of a front; infinite at the ends."""
    distance = [0.0] * len(aims)
    for aim in range(len(aims[0])):
        places = sorted(range(len(aims)), key=lambda i: aims[i][aim])
        width = aims[places[-1]][aim] - aims[places[0]][aim]
        distance[places[0]] = distance[places[-1]] = float("inf")
        for before, place, after in zip(places, places[1:], places[2:], strict=False):
            if width > 0:
                distance[place] += (aims[after][aim] - aims[before][aim]) / width
    return distance
