"""Refinement by gradients: closer on images held aside, or nothing is changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from family_checks import loop_report

from dipgo_deploy.calibrate.core import CalibrationOptions
from dipgo_deploy.calibrate.fit import calibrate
from dipgo_deploy.calibrate.least_squares import Sums
from dipgo_deploy.calibrate.refine import RefineOptions, _orthonormal
from dipgo_deploy.export.exporter import ExportOptions, export_bundle
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.search.problem import Problem

SMALL = CalibrationOptions(images=12, held_aside=1 / 3, batch=4)


def pruned(problem: Problem) -> Schedule:
    """Whole launches, one with removed blocks, and nothing in between."""
    rows = ((True,) * 3, (False,) * 3, (True, False, True), (False,) * 3, (True,) * 3)
    return problem.target.schedule(rows, "by hand", {})


@pytest.fixture(scope="module")
def refined(problem: Problem) -> Schedule:
    return calibrate(problem, pruned(problem), SMALL, refine=RefineOptions(iterations=12, lr=1e-2))


def test_it_comes_closer_and_says_so(problem: Problem, refined: Schedule) -> None:
    plain = calibrate(problem, pruned(problem), SMALL)
    assert refined.solver is not None and plain.solver is not None
    known = refined.solver.provenance
    assert known["method"] == "least squares, refined by gradients"
    assert known["refined"]["residual"] < 0.95 * known["residuals"][-1]
    assert known["residuals"] == plain.solver.provenance["residuals"]
    assert refined.keep == plain.keep
    assert refined.solver.timesteps != plain.solver.timesteps
    full = problem.matrix.timesteps
    assert all(min(full) <= timestep <= max(full) for timestep in refined.solver.timesteps)


def test_what_does_not_help_is_not_kept(problem: Problem) -> None:
    plain = calibrate(problem, pruned(problem), SMALL)
    assert calibrate(problem, pruned(problem), SMALL, refine=RefineOptions(iterations=3, lr=1e3)) == plain


def test_timesteps_off_the_grid_are_exported(dit_folder: Path, refined: Schedule, tmp_path: Path) -> None:
    export_bundle(str(dit_folder), refined, tmp_path / "engine", ExportOptions(components=False))
    report = loop_report(tmp_path / "engine")
    assert report.first_failure() is None and report.results is not None


def test_a_step_of_one_changes_the_latent_by_its_own_size() -> None:
    random = np.random.default_rng(0)
    columns = random.normal(size=(500, 3)) @ random.normal(size=(3, 3))
    sums = Sums(3)
    sums.add(columns, columns @ [1.0, -2.0, 0.5])
    basis = _orthonormal(sums).numpy()
    moved = columns @ basis
    size = np.square(columns @ [1.0, -2.0, 0.5]).sum()
    np.testing.assert_allclose(moved.T @ moved / size, np.eye(3), atol=1e-6)


def test_options_are_told(problem: Problem) -> None:
    stages: list[tuple[str, int, int]] = []
    calibrate(
        problem,
        pruned(problem),
        replace(SMALL, images=6),
        refine=RefineOptions(iterations=2),
        report=lambda *told: stages.append(told),
    )
    assert stages[-1] == ("refining", 2, 2)
