"""Every block at evenly spread evaluations, nothing in between."""

from __future__ import annotations

from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.baselines.base import Task, closest, spread_rows
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.postprocess import unreachable


def uniform_gates(costs: Costs, target: float) -> Gates:
    """As many full evaluations as come nearest to the target."""
    count = costs.width
    candidates = [
        costs.clean(spread_rows(costs.steps, kept, (True,) * count, (False,) * count))
        for kept in range(1, costs.steps + 1)
    ]
    return closest(candidates, costs, target)


def alternating_gates(costs: Costs, target: float) -> Gates:
    """As many evaluations at even distances as come nearest to the target, every second of them conditional only; for
    costs whose last gate is the unconditional half."""
    guided, half, empty = (True,) * costs.width, (*(True,) * (costs.width - 1), False), (False,) * costs.width
    candidates = []
    for kept in range(1, costs.steps + 1):
        places = {place * costs.steps // kept: place for place in range(kept)}
        rows = [(guided, half)[places[step] % 2] if step in places else empty for step in range(costs.steps)]
        candidates.append(costs.clean(rows))
    return closest(candidates, costs, target)


class Uniform:
    """The uniform interval, where the number of full evaluations need not divide T."""

    def search(self, task: Task) -> Gates:
        """See `Method.search`; needs no evaluation."""
        gates = uniform_gates(task.costs, task.target)
        ratio = task.costs.ratio(gates)
        if abs(ratio - task.target) > task.tolerance:
            raise UserError(unreachable(task.target, ratio, task.tolerance))
        return gates

    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}
