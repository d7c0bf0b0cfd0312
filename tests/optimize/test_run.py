"""One tiny model with classes and a VAE, from nothing to an engine directory that is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_engines import save_dit_pipeline

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli.optimize import main
from dipgo_deploy.optimize import run
from dipgo_deploy.optimize.effort import Effort

ARGUMENTS = ("--sampler", "ddim", "--steps", "8", "--class-labels", "0,1", "--minutes", "0.5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit") / "model"
    save_dit_pipeline(folder, layers=2)
    return folder


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same effort on every machine."""
    monkeypatch.setattr(run, "effort", lambda *given: Effort(12, 3, 2, 8, 0.1))


def test_launches_are_searched_fitted_exported_and_judged(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "three"
    assert main([str(model), *ARGUMENTS, "--launches", "3", "--json", "-o", str(target)]) == 0
    facts = json.loads(capsys.readouterr().out)
    bundle = Bundle.open(target)
    schedule = bundle.load_schedule()
    assert schedule.solver is not None and schedule.steps == 3
    assert facts["launches"] == len(bundle.manifest.plan.launches) == 3 and facts["evaluations"] == 8
    assert facts["quality_met"] is None  # none was asked for
    assert facts["quality"]["ssim"]["low"] <= facts["quality"]["ssim"]["value"] <= 1
    assert {"loading", "searching launches", "judging", "exporting"} <= facts["seconds"].keys()


def test_the_fewest_launches_of_a_quality(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "quality"
    arguments = [str(model), *ARGUMENTS, "--no-check", "-o", str(target)]
    assert main([*arguments, "--quality", "0.05", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["launches"] == 2 and facts["quality_met"] is True
    assert "2 launches: SSIM" in captured.err and "3 launches" not in captured.err
    # Nothing is written where no number of launches reaches it.
    other = tmp_path / "never"
    assert main([*arguments[:-1], str(other), "--quality", "0.9999999"]) == 2
    assert "launches reach" in capsys.readouterr().err and not other.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--launches", "3", "--speedup", "2"), "--launches and --speedup: give one of"),
        (("--launches", "8"), "--launches 8: not of a full run of 8 evaluations"),
    ],
)
def test_what_cannot_be_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main([str(model), *ARGUMENTS, *arguments, "-o", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_directory_that_is_there_is_refused_before_the_model_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_problem", lambda *given: pytest.fail("was loaded"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    assert main([str(model), *ARGUMENTS, "--launches", "3", "-o", str(tmp_path / "there")]) == 2
    assert "there" in capsys.readouterr().err
