"""Schedules that a search found and the package ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from dipgo_deploy.models.target import check_sampler, check_schedule
from dipgo_deploy.schedule.document import Schedule

SEARCHED = Path(__file__).parents[2] / "dipgo_deploy" / "assets" / "schedules" / "searched"


@pytest.mark.parametrize("path", sorted(SEARCHED.glob("*.json")), ids=lambda path: path.stem)
def test_it_fits_the_model_it_is_named_for_and_says_how_it_was_found(path: Path) -> None:
    schedule = Schedule.load(path)
    check_schedule(schedule, "fashion-sd" if path.stem.startswith("fashion-sd") else "fashion-dit")
    check_sampler(schedule)
    parameters = schedule.provenance["parameters"]
    assert abs(parameters["achieved_ratio"] - parameters["target_ratio"]) <= 0.0125
    assert "/" not in str(parameters)  # no path of the machine it was found on


def test_there_is_one() -> None:
    assert list(SEARCHED.glob("*.json"))
