"""The calibrated objective: what gates lose under their fitted solver, for any method of the search."""

from __future__ import annotations

from pathlib import Path

import pytest

from dipgo_deploy.calibrate.core import CalibrationOptions
from dipgo_deploy.calibrate.fit import calibrate
from dipgo_deploy.calibrate.objective import calibrated_objective
from dipgo_deploy.schedule import builders
from dipgo_deploy.search.evaluate import image_objective
from dipgo_deploy.search.problem import Problem
from dipgo_deploy.search.run import SearchOptions, judged, search
from dipgo_deploy.search.train import TrainOptions


def test_it_is_the_loss_of_the_fitted_schedule(unet_problem: Problem, tmp_path: Path) -> None:
    objective = calibrated_objective(unet_problem, "latent-l2", tmp_path, images=4)
    plain = image_objective(unet_problem, judged(unet_problem, SearchOptions(images=4)), "latent-l2")
    gates = builders.uniform(unet_problem.steps, len(unet_problem.target.blocks), 2)
    full = builders.uniform(unet_problem.steps, len(unet_problem.target.blocks), 1)
    assert objective(full) < 1e-6 < objective(gates) < 0.5 * plain(gates)


def test_a_search_takes_it_and_fits_what_it_finds(problem: Problem, tmp_path: Path) -> None:
    fit = CalibrationOptions(images=8, held_aside=0.25, batch=4)
    options = SearchOptions(
        method="refine", ratios=(0.4,), budget=6, images=3, tolerance=0.2, train=TrainOptions(loss="latent-l2")
    )
    told: list[float] = []
    (found,) = search(
        problem,
        options,
        objective=lambda searched: calibrated_objective(
            searched, "latent-l2", tmp_path, images=3, on_evaluation=lambda count, best: told.append(best)
        ),
        finish=lambda schedule: calibrate(problem, schedule, fit),
    )
    assert found.schedule.solver is not None
    assert found.loss == pytest.approx(min(told))
