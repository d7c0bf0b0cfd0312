"""What a search method is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.evaluate import Objective
from dipgo_deploy.search.moves import Band
from dipgo_deploy.search.postprocess import TOLERANCE


@dataclass(frozen=True)
class Task:
    """A ratio to reach, and the means.

    Attributes:
        target: share of the cost to save.
        objective: loss of gates.
        budget: how often it may be called.
        seed: of all that is drawn.
        tolerance: how far the ratio may be off.
        path_costs: lazily, for a method that looks at those instead of the objective, (T, T + 1) costs of computing
            nothing between two evaluations (see ``search.paths``).
        max_variants: most distinct graphs that ``refine`` may make of its gates.
        gradient: of the loss with respect to hard gates (T, `Costs.width`), on other images each time, for ``refine``.
    """

    target: float
    objective: Objective
    budget: int
    seed: int = 0
    tolerance: float = TOLERANCE
    path_costs: Callable[[], np.ndarray] | None = None
    max_variants: int | None = None
    gradient: Callable[[Gates], np.ndarray] | None = None

    @property
    def costs(self) -> Costs:
        """What gates cost."""
        return self.objective.costs

    @property
    def band(self) -> Band:
        """Ratios from the target on: a search on the objective never spends more than was asked for.

        With a limit on graphs, which few ratios meet, the whole tolerance is used.
        """
        low = self.target if self.max_variants is None else self.target - self.tolerance
        return Band(low, self.target + self.tolerance)

    def allows(self, gates: Gates) -> bool:
        """Whether ``gates`` need no more graphs than allowed."""
        return self.max_variants is None or self.costs.variants(gates) <= self.max_variants

    def spent(self, start: int) -> bool:
        """Whether the budget is used up, counted from ``start`` evaluations."""
        return self.objective.evaluations - start >= self.budget


class Method(Protocol):
    """A way to find gates."""

    def search(self, task: Task) -> Gates:
        """Gates, T rows of `Costs.width`, whose ratio is the target within the tolerance.

        Raises:
            UserError: the method has no gates at this ratio; the message names the closest it has.
        """
        ...

    def parameters(self) -> dict[str, Any]:
        """Its settings, for the provenance."""
        ...


def spread_rows(steps: int, kept: int, on: Sequence[bool], off: Sequence[bool]) -> Gates:
    """``kept`` rows ``on``, evenly spread from evaluation 0, and ``off`` in between."""
    places = {place * steps // kept for place in range(kept)}
    return tuple(tuple(on) if step in places else tuple(off) for step in range(steps))


def closest(candidates: Sequence[Gates], costs: Costs, target: float) -> Gates:
    """The candidate whose ratio is nearest to the target; of two equally near, the cheaper."""
    return min(candidates, key=lambda gates: (round(abs(costs.ratio(gates) - target), 9), -costs.ratio(gates)))
