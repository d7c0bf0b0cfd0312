from __future__ import annotations

import numpy as np
import pytest

from dipgo_deploy.search.evaluate import full_latents, sample
from dipgo_deploy.search.paths import path_costs
from dipgo_deploy.search.problem import Pair, Problem

PAIRS = (Pair(0, 1), Pair(1, 2))


@pytest.mark.parametrize("which", ["problem", "unet_problem"])
def test_costs_of_paths(which: str, request: pytest.FixtureRequest) -> None:
    problem: Problem = request.getfixturevalue(which)
    costs, steps = path_costs(problem, PAIRS), problem.steps
    assert costs.shape == (steps, steps + 1)
    assert all(np.isinf(costs[i, j]) for i in range(steps) for j in range(i + 1))
    assert [costs[i, i + 1] for i in range(steps)] == [0.0] * steps
    assert all(costs[i, j] > 0 for i in range(steps) for j in range(i + 2, steps + 1))
    # Nothing computed after step i: what is left at the end is measured, not estimated.
    count = len(problem.target.blocks)
    for i in (0, 2):
        gates = [[step <= i] * count for step in range(steps)]
        error = (sample(problem, gates, PAIRS) - full_latents(problem, PAIRS)).double().square().mean().item()
        assert costs[i, steps] == pytest.approx(error, rel=1e-4)
