"""One tiny model with classes and a VAE, from nothing to an engine directory that is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from html_pages import Page
from tiny_engines import save_dit_pipeline

from dipgo_deploy.backends.tensorrt_cuda import NoDeviceError
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.cli.optimize import main
from dipgo_deploy.optimize import after, run
from dipgo_deploy.optimize.effort import Effort

pytestmark = pytest.mark.usefixtures("traced_once")
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
    assert facts["engines"] == [] and facts["report"] == str(target / "report.html")
    page = Page((target / "report.html").read_bytes())
    assert page.said("SSIM to the pictures of the full run (DDIMScheduler, 8 steps)") and "quality-0" in page.charts
    assert any("3 launches" in row and f"{facts['quality']['ssim']['value']:.4f}" in " ".join(row) for row in page.rows)
    # The schedule that came out, given: nothing is searched, and the same is judged.
    again = tmp_path / "again"
    given = ["--schedule", str(target / "schedule.json"), "--class-labels", "0,1", "--minutes", "9", "--no-check"]
    assert main([str(model), *given, "--no-report", "--json", "-o", str(again)]) == 0
    same = json.loads(capsys.readouterr().out)
    assert Bundle.open(again).load_schedule() == schedule and same["effort"] is None
    assert (same["launches"], same["evaluations"]) == (3, 8) and not (again / "report.html").exists()


def test_the_fewest_launches_of_a_quality(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "quality"
    arguments = [str(model), *ARGUMENTS, "--no-check", "-o", str(target)]
    assert main([*arguments, "--quality", "0.05", "--granularity", "layer", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["launches"] == 2 and facts["quality_met"] is True
    assert Bundle.open(target).manifest.model.granularity == "layer"
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
        (("--schedule", "fashion-dit-ddim50"), "--sampler: the schedule that --schedule gives has its own"),
    ],
)
def test_what_cannot_be_is_one_line(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(run, "load_problem", lambda *given: pytest.fail("was loaded"))
    assert main([str(model), *ARGUMENTS, *arguments, "-o", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_model_without_a_vae_is_judged_by_no_quality(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_problem", lambda *given: pytest.fail("was loaded"))
    assert main([str(model / "transformer"), *ARGUMENTS, "-o", str(tmp_path / "x")]) == 2
    assert "has no VAE to judge pictures with; give --launches or --speedup" in capsys.readouterr().err


def test_engines_are_built_where_a_tensorrt_and_a_gpu_are(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(Path("engines/x"), Manifest.model_construct())
    found: set[str] = set()
    monkeypatch.setattr(after.importlib.util, "find_spec", lambda name: name if name in found else None)
    assert after.engines_for(bundle) == ((), "")

    def none() -> Any:
        raise NoDeviceError("no NVIDIA GPU here")

    monkeypatch.setattr(after, "find_device", none)
    found.add("tensorrt")
    assert after.engines_for(bundle) == ((), "no engines were built: no NVIDIA GPU here")
    found.add("tensorrt_rtx")
    backends, line = after.engines_for(bundle)
    assert not backends and line.endswith(
        "for other machines: dipgo-build --engine-dir engines/x --backend tensorrt-rtx"
    )
    monkeypatch.setattr(after, "find_device", lambda: "a GPU")
    assert after.engines_for(bundle) == (("tensorrt", "tensorrt-rtx"), "")


def test_a_directory_that_is_there_is_refused_before_the_model_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_problem", lambda *given: pytest.fail("was loaded"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    assert main([str(model), *ARGUMENTS, "--launches", "3", "-o", str(tmp_path / "there")]) == 2
    assert "there" in capsys.readouterr().err
