"""Which evaluations run in full, by dynamic programming over a path-aware cost of skipping the evaluations between (as
DPCache)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.baselines.base import Task
from dipgo_deploy.search.baselines.uniform import uniform_gates
from dipgo_deploy.search.postprocess import unreachable


def best_path(costs: np.ndarray, kept: int) -> tuple[int, ...]:
    """The ``kept`` evaluations, 0 among them, with the smallest sum of costs from each to the next and from the last to
    T."""
    steps = len(costs)
    if not 1 <= kept <= steps:
        raise ValueError(f"{kept} of {steps} steps cannot be kept")
    reach = np.full((kept + 1, steps + 1), np.inf)
    before = np.zeros((kept + 1, steps + 1), dtype=int)
    reach[0, 0] = 0.0
    for count in range(1, kept + 1):
        # reach[count, j]: the cheapest way to cover the evaluations below j with `count` kept ones, the next at j.
        through = reach[count - 1, :steps, None] + costs
        before[count] = through.argmin(axis=0)
        reach[count] = through.min(axis=0)
    path, place = [], steps
    for count in range(kept, 0, -1):
        place = int(before[count, place])
        path.append(place)
    return tuple(reversed(path))


class DynamicProgramming:
    """As many full evaluations as the uniform interval has, at the places that cost least."""

    def search(self, task: Task) -> Gates:
        """See `Method.search`; needs the costs of paths and no evaluation."""
        if task.path_costs is None:
            raise ValueError("dynamic programming needs the costs of paths")
        uniform = uniform_gates(task.costs, task.target)
        ratio = task.costs.ratio(uniform)
        if abs(ratio - task.target) > task.tolerance:
            raise UserError(unreachable(task.target, ratio, task.tolerance))
        path = set(best_path(task.path_costs(), sum(any(row) for row in uniform)))
        count = task.costs.width
        return task.costs.clean([(step in path,) * count for step in range(task.costs.steps)])

    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}
