from __future__ import annotations

import json
from pathlib import Path

import pytest
from search_models import save_dit

from dipgo_deploy.schedule.document import Schedule
from tools.bench.search_sweep import LOG, main, stem

pytestmark = pytest.mark.usefixtures("traced_once")


def test_a_sweep_keeps_schedules_and_a_log_and_refines_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(save_dit(tmp_path / "dit")), tmp_path / "out"
    args = ["--model", model, "--steps", "40", "--cache", "output", "--images", "1", "--out", str(out)]
    args += ["--budget", "2", "--baseline-budget", "2", "--ratio", "0.75", "--ratio", "0.5"]
    assert main([*args, "--method", "refine", "--method", "annealing"]) == 0
    log = {(row["method"], row["ratio"]): row for row in json.loads((out / LOG).read_text(encoding="utf-8"))}
    refined = log["refine", 0.75]
    assert refined["start_losses"]["annealing"] == pytest.approx(log["annealing", 0.75]["loss"])
    assert refined["loss"] <= min(refined["start_losses"].values())
    schedule = Schedule.load(out / refined["file"])
    assert schedule.provenance["parameters"]["achieved_ratio"] == refined["achieved"]
    assert log["annealing", 0.75]["evaluations"] <= 2
    assert main([*args, "--method", "uniform"]) == 0
    assert len(json.loads((out / LOG).read_text(encoding="utf-8"))) == len(log) + 2


def test_names() -> None:
    assert stem("fashion-dit", "ddim", 50, "dipgo+refine", 0.85) == "fashion-dit-ddim50-refine85"
    assert stem("fashion-sd", "ddim", 20, "dp", 0.4) == "fashion-sd-ddim20-dp40"
    assert stem("fashion-dit", "deis", 14, "dipgo+refine", 0.85, ("ddim", 50)) == "fashion-dit-ddim50-refine85-deis14"


def test_a_sweep_may_stand_for_the_run_of_another_sampler(tmp_path: Path) -> None:
    model, out = str(save_dit(tmp_path / "dit")), tmp_path / "out"
    args = ["--model", model, "--sampler", "deis", "--steps", "10", "--reference", "ddim:40", "--cache", "output"]
    args += ["--images", "1", "--budget", "2", "--ratio", "0.85", "--method", "refine", "--out", str(out)]
    assert main(args) == 0
    schedule = Schedule.load(out / "dit-ddim40-refine85-deis10.json")
    assert (schedule.sampler.class_name, len(schedule.gates)) == ("DEISMultistepScheduler", 10)
    assert schedule.provenance["parameters"]["reference"] == {"sampler": "DDIMScheduler", "steps": 40}
    assert schedule.provenance["parameters"]["achieved_ratio"] == pytest.approx(0.85, abs=0.0125)
