"""Random gates: the best of as many draws as the budget allows (one draw: plainly random)."""

from __future__ import annotations

import random
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.baselines.base import Task
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.postprocess import select

# In a small model few draws have gates at a given ratio.
_ATTEMPTS = 50


def random_gates(costs: Costs, target: float, rng: random.Random, tolerance: float) -> Gates:
    """Random keep scores, post-processed as the pruner's are: removal goes on to what is computed for nothing.

    Raises:
        UserError: none of many draws has gates at the ratio.
    """
    for attempt in range(_ATTEMPTS):
        scores = [[rng.random() for _ in range(costs.width)] for _ in range(costs.steps)]
        try:
            return select(scores, costs, target, tolerance=tolerance).gates
        except UserError:
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


class RandomSearch:
    """The lowest loss of several random schedules."""

    def search(self, task: Task) -> Gates:
        """See `Method.search`."""
        rng = random.Random(task.seed)
        draws = [random_gates(task.costs, task.target, rng, task.tolerance) for _ in range(max(1, task.budget))]
        return draws[0] if len(draws) == 1 else min(draws, key=task.objective)

    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}
