from __future__ import annotations

import json
from pathlib import Path

import pytest

from dipgo_deploy.cli.schedule import main
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.built_in import SCHEDULES, built_in_schedules
from dipgo_deploy.schedule.document import Schedule


def test_every_file_has_a_name_of_its_own() -> None:
    assert sorted(built_in_schedules().values()) == sorted(SCHEDULES.rglob("*.json"))


def test_a_name_stands_for_its_file() -> None:
    name = "fashion-sd-ddim50-5"
    assert Schedule.load(name) == Schedule.load(built_in_schedules()[name])


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Schedule.load("fashion-dit-uniform5").save("fashion-sd-ddim50-5")
    assert Schedule.load("fashion-sd-ddim50-5") == Schedule.load("fashion-dit-uniform5")


def test_neither_a_file_nor_a_name() -> None:
    with pytest.raises(UserError, match="nothing: no such file, and no built-in schedule, which `dipgo-schedule list`"):
        Schedule.load("nothing")


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--model", "fashion-dit", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["schedules"]]
    assert names == [name for name in built_in_schedules() if name.startswith("fashion-dit-")] and names
    assert main(["list", "--model", "other"]) == 2
    assert "no schedule comes with the package for it" in capsys.readouterr().err
