"""What it costs to go from one computed evaluation to the next on reused blocks: measured along the real path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dipgo_deploy.schedule.document import Gates
from dipgo_deploy.search.evaluate import LaunchedSupernet
from dipgo_deploy.search.problem import Batch, Pair, Problem
from dipgo_deploy.supernet import Evaluation

# The skip that the sensitivity is measured with, and from how many evaluations to the next one.
_SKIP = 3
_STRIDE = 5


def path_costs(problem: Problem, pairs: Sequence[Pair]) -> np.ndarray:
    """Estimated squared error in the final latent from computing evaluations i and j whole and nothing in between.

    The error that such a skip makes in the latent at j is measured for every i and j, by T loops that stop computing
    after evaluation i. What becomes of an error at j until the end is measured at some evaluations, by loops with one
    skip only, and interpolated: errors made early are mostly healed by the evaluations behind them.

    Returns:
        (T, T + 1) float64; [i, j] for j <= i is infinite, [i, i + 1] is 0.
    """
    steps = problem.steps
    batch = problem.batch(pairs)
    full = _path(problem, batch, range(steps))
    costs = np.full((steps, steps + 1), np.inf)
    for i in range(steps):
        stopped = _path(problem, batch, range(i + 1))
        for j in range(i + 1, steps + 1):
            costs[i, j] = _error(stopped[j], full[j]) if j > i + 1 else 0.0
    return costs * _survival(problem, batch, full) ** 2


def _survival(problem: Problem, batch: Batch, full: Sequence[Tensor]) -> np.ndarray:
    """(T + 1,): the share of an error in the latent at each evaluation that is left in the final one."""
    steps = problem.steps
    places, shares = [float(steps)], [0.0]
    for j in range(_SKIP + 1, steps, _STRIDE):
        skipped = _path(problem, batch, [step for step in range(steps) if not j - _SKIP <= step < j])
        before, after = _error(skipped[j], full[j]), _error(skipped[steps], full[steps])
        if before > 0 and after > 0:
            places.append(float(j))
            shares.append(0.5 * float(np.log(after / before)))
    order = np.argsort(places)
    known = np.array(places)[order], np.array(shares)[order]
    return np.exp(np.interp(np.arange(steps + 1), *known))


@torch.no_grad()
def _path(problem: Problem, batch: Batch, computed: Sequence[int]) -> list[Tensor]:
    """The model input at every evaluation, and the final latent, when only these evaluations are computed."""
    kept, count = set(computed), problem.costs.width
    gates: Gates = tuple((step in kept,) * count for step in range(problem.steps))
    analysis = problem.costs.analyse(gates)
    inputs: list[Tensor] = []

    def record(evaluation: Evaluation) -> None:
        inputs.append(evaluation.model_input)

    final = problem.run(batch, analysis.kept, LaunchedSupernet(problem.supernet, analysis), record=record)
    return [*inputs, final]


def _error(left: Tensor, right: Tensor) -> float:
    return float((left - right).double().square().mean())
