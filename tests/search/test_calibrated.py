"""Schedules with a solver of their own that the package ships."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_checks import loop_report

import dipgo_deploy
from dipgo_deploy.calibrate.core import FIRST_SEED
from dipgo_deploy.export.exporter import ExportOptions, export_bundle
from dipgo_deploy.models.target import check_schedule
from dipgo_deploy.schedule.document import Schedule

FOLDER = Path(dipgo_deploy.__file__).parent / "assets/schedules/calibrated"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def test_there_is_one_for_each_model_and_number_of_launches() -> None:
    assert {f"{model}-ddim50-{count}" for model in ("fashion-dit", "fashion-sd") for count in (4, 5, 7, 10, 17)} == set(
        FILES
    )


@pytest.mark.parametrize("name", FILES)
def test_it_fits_its_model_and_says_what_it_was_fitted_to(name: str) -> None:
    schedule = Schedule.load(FILES[name])
    check_schedule(schedule, name.partition("-ddim50")[0])
    assert schedule.solver is not None and schedule.steps == int(name.rpartition("-")[2])
    known = schedule.solver.provenance
    assert known["reference"] == {"sampler": "DDIMScheduler", "num_inference_steps": 50}
    assert known["guidance_scales"] == (4.0,)
    # Searched and fitted on images that no measurement uses.
    assert known["seeds"] == (FIRST_SEED, FIRST_SEED + known["images"] - 1)


def test_its_loop_is_the_supernets(tmp_path: Path) -> None:
    schedule = Schedule.load(FILES["fashion-dit-ddim50-5"])
    export_bundle("fashion-dit", schedule, tmp_path / "engine", ExportOptions(components=False))
    report = loop_report(tmp_path / "engine")
    assert report.first_failure() is None and report.results is not None
