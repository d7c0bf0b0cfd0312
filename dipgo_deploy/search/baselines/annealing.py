"""Simulated annealing of which evaluations run in full, at a fixed number of them, on the final output (as BudCache
does)."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.baselines.base import Task
from dipgo_deploy.search.baselines.uniform import Uniform


@dataclass(frozen=True)
class Annealing:
    """hot, cold: temperatures at start and end as shares of the uniform schedule's loss; reach: farthest move."""

    hot: float = 0.1
    cold: float = 0.005
    reach: int = 5

    def search(self, task: Task) -> Gates:
        """See `Method.search`. Starts at the uniform interval; a move shifts one full evaluation to an empty place."""
        rng, start = random.Random(task.seed), task.objective.evaluations
        current = Uniform().search(task)
        loss = task.objective(current)
        best, best_loss, scale = current, loss, loss
        # Moves to gates that were tried before are free, so the number of tries is limited too.
        for turn in range(4 * task.budget):
            if task.spent(start):
                break
            used = max(turn / (4 * task.budget), (task.objective.evaluations - start) / max(1, task.budget))
            temperature = scale * self.hot * (self.cold / self.hot) ** used
            moved = self._move(current, rng)
            new = task.objective(moved)
            if new <= loss or rng.random() < math.exp((loss - new) / max(temperature, 1e-12)):
                current, loss = moved, new
            if loss < best_loss:
                best, best_loss = current, loss
        return best

    def _move(self, gates: Gates, rng: random.Random) -> Gates:
        full = [step for step in range(1, len(gates)) if any(gates[step])]
        if not full:
            return gates
        step = full[int(rng.random() * len(full))]
        places = [
            place
            for place in range(max(1, step - self.reach), min(len(gates), step + self.reach + 1))
            if not any(gates[place])
        ]
        if not places:
            return gates
        other = places[int(rng.random() * len(places))]
        rows = list(gates)
        rows[step], rows[other] = rows[other], rows[step]
        return tuple(rows)

    def parameters(self) -> dict[str, Any]:
        """Temperatures and reach."""
        return asdict(self)
