from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from search_models import STEPS, save_dit

from dipgo_deploy.bench.plot import check_plot
from dipgo_deploy.bench.quality import SAME_RATIO, Case, measure, schedule_cases, solver_case
from dipgo_deploy.cli.bench import main
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import CacheKind
from dipgo_deploy.schedule.builders import full, uniform
from dipgo_deploy.search.problem import Problem, ProblemOptions, load_problem, with_cache, with_sampler

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def problem(dit_folder: Path) -> Problem:
    return load_problem(ProblemOptions(str(dit_folder), steps=STEPS, guidance_scale=3.0))


def test_the_full_run_is_itself_and_less_is_less(problem: Problem) -> None:
    cases = [
        Case("full", full(STEPS, 3)),
        Case("every second", uniform(STEPS, 3, 2)),
        solver_case("ddim:3"),
        solver_case(f"ddim:{STEPS}"),
    ]
    told = []
    rows = measure(problem, cases, 2, notify=told.append)
    assert [row.name for row in rows] == ["full", "every second", "ddim, 3 steps", f"ddim, {STEPS} steps"]
    assert told == rows
    whole, half, fewer, same = rows
    assert whole.ratio == 0
    assert (whole.ssim.value, whole.psnr.value) == pytest.approx((1, 100), abs=1e-4)
    assert half.ratio == pytest.approx(problem.costs.ratio(uniform(STEPS, 3, 2)))
    assert half.ssim.value < 1
    assert half.difference.value == pytest.approx(half.ssim.value - 1, abs=1e-4)
    assert fewer.launches == 3
    assert fewer.ratio == pytest.approx(1 - 3 / STEPS)
    assert fewer.ssim.value < 1
    assert same.ssim.value == pytest.approx(1, abs=1e-4)
    assert whole.accuracy is None  # the judge knows the built-in models only


def test_differences_by_ratio_are_to_the_first_of_the_same_ratio(problem: Problem) -> None:
    cases = [Case("full", full(STEPS, 3)), Case("half", uniform(STEPS, 3, 2)), solver_case("ddim:3")]
    assert abs(problem.costs.ratio(uniform(STEPS, 3, 2)) - (1 - 3 / STEPS)) <= SAME_RATIO
    whole, half, fewer = measure(problem, cases, 2, by_ratio=True)
    assert whole.difference.value == half.difference.value == 0
    assert fewer.difference.value == pytest.approx(fewer.ssim.value - half.ssim.value, abs=1e-6)
    assert fewer.difference.value != 0


def test_gates_for_another_sampler_are_measured_against_the_same_full_run(problem: Problem) -> None:
    other = with_sampler(problem, "dpm++2m", STEPS).target.schedule(uniform(STEPS, 3, 2), "uniform", {})
    cases = [Case("half", uniform(STEPS, 3, 2)), *schedule_cases([("o.json", other)], problem, any_sampler=True)]
    half, measured = measure(problem, cases, 2)
    assert measured.ratio == half.ratio
    assert measured.difference.value != 0


def test_gates_are_measured_with_the_settings_of_their_own_sampler(problem: Problem) -> None:
    plain, karras = (with_sampler(problem, name, STEPS).target for name in ("dpm++2m", "dpm++2m-karras"))
    assert plain.sampler.class_name == karras.sampler.class_name
    files = [(target.sampler.class_name, target.schedule(full(STEPS, 3), "full", {})) for target in (plain, karras)]
    solvers = [solver_case(f"{name}:{STEPS}") for name in ("dpm++2m", "dpm++2m-karras")]
    rows = measure(problem, [*schedule_cases(files, problem, any_sampler=True), *solvers], 2)
    assert [row.ssim.value for row in rows[:2]] == [row.ssim.value for row in rows[2:]]
    assert rows[0].ssim.value != rows[1].ssim.value


def test_gates_for_other_caches_are_measured_with_those(problem: Problem) -> None:
    gates = uniform(STEPS, 3, 2)
    kinds: tuple[CacheKind, ...] = ("residual", "output")
    problems = [with_cache(problem, kind) for kind in kinds]
    files = [(kind, one.target.schedule(gates, "uniform", {})) for kind, one in zip(kinds, problems, strict=True)]
    mixed = files[0][1].model_copy(update={"blocks": (*files[0][1].blocks[:2], files[1][1].blocks[2])})
    with pytest.raises(UserError, match="output: has output caches, not those of the first schedule.*--any-cache"):
        schedule_cases(files, problem)
    with pytest.raises(UserError, match="mixed: has output and residual caches"):
        schedule_cases([("mixed", mixed)], problem, any_cache=True)
    rows = measure(problem, schedule_cases(files, problem, any_cache=True), 2)
    alone = [measure(one, [Case("gates", gates)], 2)[0] for one in problems]
    assert [row.ssim.value for row in rows] == pytest.approx([row.ssim.value for row in alone], abs=1e-6)
    assert rows[0].ssim.value != rows[1].ssim.value


def test_what_cannot_be_compared_is_refused(problem: Problem) -> None:
    schedule = problem.target.schedule(full(STEPS, 3), "full", {})
    other_model = schedule.model_copy(update={"model": schedule.model.model_copy(update={"config_hash": "0" * 64})})
    with pytest.raises(UserError, match="a.json: was made for another model"):
        schedule_cases([("a.json", other_model)], problem)
    sampler = schedule.sampler.model_copy(update={"num_inference_steps": 9})
    with pytest.raises(UserError, match="a.json: was made for DDIMScheduler with 9 steps"):
        schedule_cases([("a.json", schedule.model_copy(update={"sampler": sampler}))], problem)
    (allowed,) = schedule_cases(
        [("a.json", schedule.model_copy(update={"sampler": sampler}))], problem, any_sampler=True
    )
    assert allowed.solver == ("DDIMScheduler", 9)
    assert allowed.gates == schedule.gates
    for text in ("ddim", "ddim:x", ":5", "ddim:0"):
        with pytest.raises(UserError, match="as in ddim:10"):
            solver_case(text)
    with pytest.raises(UserError, match="nothing to measure"):
        measure(problem, [], 2)
    blind = replace(problem, source=replace(problem.source, pipeline=None))
    with pytest.raises(UserError, match="no VAE"):
        measure(blind, [Case("full")], 2)


def test_the_command_writes_table_json_and_plot(
    problem: Problem, dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "uniform.json"
    problem.target.schedule(uniform(STEPS, 3, 2), "uniform", {"interval": 2}).save(file)
    args = ["quality", str(file), "--model", str(dit_folder), "--solver", "ddim:2", "--per-condition", "2"]
    out, plot = tmp_path / "q.json", tmp_path / "q.png"
    assert main([*args, "--out", str(out), "--plot", str(plot), "--threads", "1", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts == json.loads(out.read_text())
    assert facts["images"] == 4
    assert facts["reference"] == {"sampler": "DDIMScheduler", "steps": STEPS}
    assert [row["name"] for row in facts["cases"]] == [str(file), "ddim, 2 steps"]
    assert facts["cases"][0]["ssim"]["low"] <= facts["cases"][0]["ssim"]["value"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "SSIM" in captured.err


def test_mistakes_are_found_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["quality", "--model", "fashion-dit", "--solver", "ddim:2"]
    assert main([*args, "--out", str(tmp_path / "nowhere" / "q.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["quality", str(tmp_path / "none.json"), "--model", "fashion-dit"]) == 2
    assert "none.json: no such file" in capsys.readouterr().err


def test_plots_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="ending in one of"):
        check_plot(tmp_path / "plot.docx")
    with pytest.raises(UserError, match="does not exist"):
        check_plot(tmp_path / "nowhere" / "plot.png")
