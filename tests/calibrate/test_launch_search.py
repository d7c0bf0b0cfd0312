"""Launches are searched under their fitted solver: the grids to start at, the moves, and what the search finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipgo_deploy.calibrate.core import CalibrationOptions
from dipgo_deploy.calibrate.fit import calibrated_launches
from dipgo_deploy.calibrate.launch_search import (
    LaunchSearchOptions,
    _Search,
    even_grids,
    moves,
    with_one_more,
)
from dipgo_deploy.errors import UserError
from dipgo_deploy.search.evaluate import full_latents, sample
from dipgo_deploy.search.problem import Pair, Problem, with_schedule

SMALL = CalibrationOptions(images=12, held_aside=1 / 3, batch=4)
FRESH = [Pair(place % 2, 91_000 + place) for place in range(6)]


@given(st.integers(1, 60), st.data())
def test_grids_and_moves_are_launches_in_order(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total))
    grids = even_grids(count, total)
    nexts = [moved for grid in grids for place in range(count) for moved in moves(grid, place, total)]
    more = [one for grid in grids for one in with_one_more(grid, count + 1, total)]
    for positions, size in [(p, count) for p in grids + nexts] + [(p, count + 1) for p in more]:
        assert len(positions) == size and list(positions) == sorted(set(positions))
        assert positions[0] >= 0 and positions[-1] < total
    assert bool(more) == (count < total)


@given(st.integers(2, 5), st.integers(0, 10_000))
def test_descent_ends_where_no_single_move_is_better(count: int, seed: int) -> None:
    weights = np.random.default_rng(seed).normal(size=(count, 12))
    told: list[int] = []

    def residual(positions: tuple[int, ...]) -> float:
        return float(sum(weights[place, position] for place, position in enumerate(positions)))

    search = _Search(residual, 12, 10_000, told.append)
    best = search.run(even_grids(count, 12))
    around = [moved for place in range(count) for moved in moves(best, place, 12)]
    assert all(residual(moved) >= residual(best) for moved in around)
    assert search.fits == len(told)


def test_the_budget_ends_a_search() -> None:
    search = _Search(lambda positions: float(-sum(positions)), 50, 10, lambda fits: None)
    search.run(even_grids(4, 50))
    assert search.fits == 10


def error(problem: Problem, schedule: object) -> float:
    from dipgo_deploy.schedule.document import Schedule

    assert isinstance(schedule, Schedule)
    wanted = full_latents(problem, FRESH)
    got = sample(with_schedule(problem, schedule), schedule.gates, FRESH)
    return float((got - wanted).norm() / wanted.norm())


def test_more_launches_come_closer_on_other_images(unet_problem: Problem, tmp_path: Path) -> None:
    told: list[int] = []
    schedules = calibrated_launches(
        unet_problem,
        (3, 2),
        SMALL,
        search=LaunchSearchOptions(images=4, budget=12),
        folder=tmp_path,
        found=lambda count, schedule: told.append(count),
    )
    assert told == [2, 3]
    for count, schedule in schedules.items():
        assert schedule.steps == count and schedule.solver is not None
        assert set(schedule.solver.timesteps) <= set(unet_problem.matrix.timesteps)
        assert schedule.solver.provenance["searched"]["fits"] <= 12
    assert error(unet_problem, schedules[3]) < error(unet_problem, schedules[2]) < 0.5
    # The full runs are there, so the same search makes none again.
    stages: list[tuple[str, int]] = []
    again = calibrated_launches(
        unet_problem,
        (2,),
        SMALL,
        search=LaunchSearchOptions(images=4, budget=12),
        folder=tmp_path,
        resume=True,
        report=lambda stage, done, total: stages.append((stage, done)),
    )
    assert again[2] == schedules[2]
    assert stages[0] == ("full runs", 12)


def test_more_launches_than_evaluations_are_refused(problem: Problem) -> None:
    with pytest.raises(UserError, match="--launches 6: the full run has 5 evaluations"):
        calibrated_launches(problem, (6,), SMALL)
