"""DeepCache (Ma et al., CVPR 2024) and its like: full evaluations evenly spread, and a shallow path at the evaluations
between."""

from __future__ import annotations

from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.baselines.base import Task, closest, spread_rows
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.postprocess import unreachable


def shallow_rows(costs: Costs) -> list[tuple[bool, ...]]:
    """What may run between full evaluations.

    A model where the removal of one block makes others useless (a UNet, or a chain with output caches) tells it
    itself: what is left then. One where it does not (a transformer with residual caches) runs its outer blocks: the
    first and last m, m = 1, 2, ..., because the middle ones change least from evaluation to evaluation.
    """
    count = len(costs.blocks)
    guided = (True,) * (costs.width - count)
    rows = [row for row in costs.patterns() if 0 < sum(row[:count]) < count - 1 and row[count:] == guided]
    if rows:
        return rows
    return [(*(k < m or k >= count - m for k in range(count)), *guided) for m in range(1, (count + 1) // 2)]


class DeepCache:
    """The combination of a shallow path and a number of full evaluations with the lowest loss at the ratio."""

    def search(self, task: Task) -> Gates:
        """See `Method.search`; one evaluation for each shallow path that has gates at this ratio."""
        costs, count = task.costs, task.costs.width
        nearest = []
        for row in shallow_rows(costs):
            candidates = [
                costs.clean(spread_rows(costs.steps, kept, (True,) * count, row)) for kept in range(1, costs.steps)
            ]
            nearest.append(closest(candidates, costs, task.target))
        usable = [gates for gates in nearest if abs(costs.ratio(gates) - task.target) <= task.tolerance]
        if not usable:
            ratio = costs.ratio(closest(nearest, costs, task.target)) if nearest else 0.0
            raise UserError(f"deepcache: {unreachable(task.target, ratio, task.tolerance)}")
        return min(usable[: max(1, task.budget)], key=task.objective)

    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}
