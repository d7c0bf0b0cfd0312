"""Schedules that a search found and the package ships."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from family_checks import loop_report

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli.compare import main as compare
from dipgo_deploy.cli.export import main as export
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, replan
from dipgo_deploy.models.target import check_sampler, check_schedule
from dipgo_deploy.sampler import SAMPLERS
from dipgo_deploy.schedule.document import Schedule

SEARCHED = Path(__file__).parents[2] / "dipgo_deploy" / "assets" / "schedules" / "searched"
FILES = {path.stem: path for path in sorted(SEARCHED.glob("*.json"))}
MODELS = ("fashion-dit", "fashion-sd")


def model_of(name: str) -> str:
    return next(model for model in MODELS if name.startswith(model))


@cache
def planned_once(model: str, kinds: frozenset[str]) -> PlannedExport:
    """One trace a model and kind of cache."""
    name = next(name for name in FILES if model_of(name) == model and caches(Schedule.load(FILES[name])) == kinds)
    return plan_export(model, Schedule.load(FILES[name]), ExportOptions(timestep_tables=False, layout="variants"))


def caches(schedule: Schedule) -> frozenset[str]:
    return frozenset(schedule.cache_kinds.values())


def reference_steps(schedule: Schedule) -> int:
    """Evaluations of the full DDIM run that it stands for."""
    reference = schedule.provenance["parameters"].get("reference")
    if reference is None:
        assert schedule.sampler.class_name == "DDIMScheduler"
        return len(schedule.gates)
    assert reference["sampler"] == "DDIMScheduler"
    return int(reference["steps"])


def test_there_is_one_for_each_model_number_of_steps_and_ratio() -> None:
    wanted = {f"{model}-ddim{steps}-refine{r}" for model in MODELS for steps in (20, 50) for r in (40, 60, 80, 85)}
    assert wanted <= set(FILES)
    others = [name for name in FILES if name not in wanted]
    assert {name.rpartition("-")[0] for name in others} <= wanted  # and at most one with another sampler
    assert len({name.rpartition("-")[0] for name in others}) == len(others)


@pytest.mark.parametrize("name", FILES)
def test_it_fits_the_model_it_is_named_for_and_says_how_it_was_found(name: str) -> None:
    schedule = Schedule.load(FILES[name])
    check_schedule(schedule, model_of(name))
    check_sampler(schedule)
    parameters = schedule.provenance["parameters"]
    assert abs(parameters["achieved_ratio"] - parameters["target_ratio"]) <= 0.0125
    stands_for = f"{model_of(name)}-ddim{reference_steps(schedule)}-refine{round(100 * parameters['target_ratio'])}"
    own = schedule.sampler
    short = next(key for key, (class_name, _) in SAMPLERS.items() if class_name == own.class_name)
    suffix = f"-{short}{own.num_inference_steps}" if "reference" in parameters else ""
    assert name == stands_for + suffix
    assert "/" not in str(parameters)  # no path of the machine it was found on


@pytest.mark.parametrize("name", FILES)
def test_its_plan_saves_what_it_says_and_runs_just_its_gates(name: str) -> None:
    schedule = Schedule.load(FILES[name])
    plan = replan(planned_once(model_of(name), caches(schedule)), schedule).plan
    assert plan.keep == schedule.gates
    assert plan.promoted == ()
    saved = 1 - plan.macs_run / (reference_steps(schedule) * plan.macs_full)
    assert saved == pytest.approx(schedule.provenance["parameters"]["achieved_ratio"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "-*"], ids=["ddim", "other-sampler"])
@pytest.mark.parametrize("model", MODELS)
def test_it_goes_through_export_and_compare(
    model: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,), folder = SEARCHED.glob(f"{model}-ddim20-refine85{ending}.json"), tmp_path / "engine"
    assert export(["--model", model, "--schedule", str(path), "--engine-dir", str(folder)]) == 0
    assert compare(["--engine-dir", str(folder), "--threads", "1"]) == 0
    assert "everything is within" in capsys.readouterr().out


def test_late_steps_with_large_weights_agree_with_the_supernet(tmp_path: Path) -> None:
    """Weights of the stack up to 130 that cancel: as one float32 sum, evaluation 48 was 1.5e-4 from the supernet."""
    path = FILES["fashion-dit-ddim50-refine40"]
    assert export(["--model", "fashion-dit", "--schedule", str(path), "--engine-dir", str(tmp_path / "engine")]) == 0
    plan = Bundle.open(tmp_path / "engine").manifest.plan
    assert max(abs(weight) for launch in plan.launches for weight in launch.coefficients) > 100
    report = loop_report(tmp_path / "engine", variants=False)
    assert report.passed, report
