from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from search_models import STEPS, save_dit

from dipgo_deploy.bench.baselines import baseline_cases, taylor, without_solver
from dipgo_deploy.bench.plot import check_plot
from dipgo_deploy.bench.quality import (
    REFERENCE,
    SAME_RATIO,
    Case,
    Row,
    evaluations_worth,
    fewest_launches,
    judged_labels,
    measure,
    schedule_cases,
    solver_case,
)
from dipgo_deploy.bench.strip import strip, worst
from dipgo_deploy.cli.bench import main
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import CacheKind
from dipgo_deploy.report.measured import Quality, read_measured
from dipgo_deploy.sampler import make_scheduler
from dipgo_deploy.schedule.builders import full, uniform
from dipgo_deploy.schedule.forecast import RuleForecast
from dipgo_deploy.search.problem import Problem, ProblemOptions, load_problem, with_cache, with_sampler
from dipgo_deploy.search.samples import Pair

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")


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
    assert [row.name for row in told] == [row.name for row in rows]  # told before it is known what they are against
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


def test_plain_solvers_are_what_schedules_with_as_many_launches_are_compared_with(problem: Problem) -> None:
    plain, left_out = baseline_cases(problem, [3, 2, 3])
    assert not left_out
    kinds = ["ddim", "ddim-trailing", "dpm++2m", "dpm++2m-karras", "dpm++2m-trailing", "deis", "unipc"]
    named = [f"{kind}, 3 steps" for kind in kinds] + ["heun, 2 steps", f"taylor-1, 3 of {STEPS}"]
    assert [case.name for case in plain if case.group == 3] == named
    assert {case.group for case in plain} == {2, 3}
    half = Case("half", uniform(STEPS, 3, 2))
    assert evaluations_worth(problem, half) == 3  # of five launches, two of which only read caches
    rows = measure(problem, [half, *plain], 2)
    assert not rows[0].baseline and all(row.baseline for row in rows[1:])
    assert all(row.launches in (case.group, case.group - 1) for row, case in zip(rows[1:], plain, strict=True))
    best = max(rows[1 : 1 + len(named)], key=lambda row: row.ssim.value)
    assert rows[0].against == best.name
    for name in ("ssim", "psnr"):
        paired = rows[0].per_image[name] - best.per_image[name]
        assert rows[0].differences[name].value == pytest.approx(float(paired.mean()))
        assert rows[0].differences[name].high - rows[0].differences[name].value == pytest.approx(
            1.96 * float(paired.std(ddof=1)) / len(paired) ** 0.5
        )
    with pytest.raises(UserError, match="--launches 9: give 1 to 5"):
        baseline_cases(problem, [9])


def test_a_number_of_steps_that_a_solver_cannot_do_is_left_out_and_said(problem: Problem) -> None:
    plain, left_out = baseline_cases(problem, [1])
    assert len(plain) + len(left_out) == 8 and all("left out" in line for line in left_out)


def test_taylor_extrapolates_the_prediction_along_the_full_runs_steps(problem: Problem) -> None:
    """By hand: the scheduler's own loop, told predictions on the line through the last two launched ones."""
    schedule = taylor(problem, 3)
    made: list[torch.Tensor] = []
    scheduler = make_scheduler(problem.target.sampler.class_name, problem.target.sampler.config)
    scheduler.set_timesteps(STEPS)
    at = [0, 1, 3]
    assert schedule.solver is not None
    assert list(schedule.solver.timesteps) == [float(scheduler.timesteps[step]) for step in at]
    latent = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise, inputs = latent.clone(), []
    for step, timestep in enumerate(scheduler.timesteps):
        if step in at:
            inputs.append(latent)
            made.append(torch.sin(3 * latent) + len(made))
        if len(made) == 1:
            prediction = made[0]
        else:
            before, last = at[len(made) - 2], at[len(made) - 1]
            prediction = made[-1] + (made[-1] - made[-2]) * (step - last) / (last - before)
        latent = scheduler.step(prediction, timestep, latent, return_dict=False)[0]
    stack = torch.stack([noise, *made])
    for row, wanted in zip((*schedule.solver.rows, schedule.solver.final), (*inputs, latent), strict=True):
        got = torch.einsum("s,sbchw->bchw", torch.tensor(row, dtype=torch.float64), stack)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_fitted_schedule_is_measured_without_its_solver_too(problem: Problem) -> None:
    fitted = taylor(problem, 3)  # launches at the evaluations 0, 1 and 3
    case, line = without_solver(problem, "a.json", fitted)
    assert case is not None and not line and case.name == "a.json, without its solver"
    kept = [step for step, row in enumerate(case.gates or ()) if any(row)]
    assert kept == [0, 1, 3] and case.fitted is None and case.solver is None
    assert fitted.solver is not None
    late = fitted.solver.model_copy(update={"timesteps": tuple(t - 150 for t in fitted.solver.timesteps)})
    case, line = without_solver(problem, "a.json", fitted.with_solver(late))
    assert case is None and line.startswith("a.json, without its solver: left out (its launches lie on no 3 steps")
    other, line = without_solver(with_cache(problem, "output"), "a.json", fitted)
    assert other is None and "other caches" in line
    forecast = fitted.with_forecast(RuleForecast(kind="taylor", order=1))
    case, line = without_solver(problem, "a.json", forecast)
    assert case is None and "its forecast is one of its own launches" in line
    # A schedule with a forecast is run as it is, with a solver of its own or without.
    plain = problem.target.schedule(((True,) * 3, *((False,) * 3,) * 4), "by hand", {})
    for schedule in (forecast, plain.with_forecast(RuleForecast(kind="taylor", order=1))):
        assert schedule_cases([("a.json", schedule)], problem)[0].fitted == schedule
    assert schedule_cases([("a.json", plain)], problem)[0].fitted is None


def test_fewest_launches_are_of_those_that_are_good_enough(problem: Problem) -> None:
    rows = measure(problem, [Case("full", full(STEPS, 3)), replace(solver_case("ddim:2"), group=2)], 2)
    at = {"guidance_scale": problem.guidance_scale}
    assert fewest_launches(rows, 0.999) == [{**at, "ssim": 0.999, "ours": STEPS, "baseline": None}]
    other = [replace(row, guidance_scale=9.0, launches=1) for row in rows]
    assert fewest_launches([*rows, *other], -1.0) == [
        {**at, "ssim": -1.0, "ours": STEPS, "baseline": 2},
        {"guidance_scale": 9.0, "ssim": -1.0, "ours": 1, "baseline": 1},
    ]
    assert rows[0].against is None and not rows[0].differences  # no plain solver costs as much as the full run
    assert rows[1].against == rows[1].name


def test_an_interrupted_measurement_goes_on_to_the_same_result(problem: Problem, tmp_path: Path) -> None:
    cases = [Case("half", uniform(STEPS, 3, 2)), solver_case("ddim:3")]
    whole = measure(problem, cases, 2, with_full=True)

    class Stop(Exception):
        pass

    def stop(row: Row) -> None:
        raise Stop

    with pytest.raises(Stop):
        measure(problem, cases, 2, with_full=True, folder=tmp_path, notify=stop)
    with pytest.raises(UserError, match="give --resume"):
        measure(problem, cases, 2, folder=tmp_path)
    with pytest.raises(UserError, match=r"was begun with seeds \[1000000, 1000003\], now it is"):
        measure(problem, cases, 2, seed=9, folder=tmp_path, resume=True)
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.np*")}
    again = measure(problem, cases, 2, with_full=True, folder=tmp_path, resume=True)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.np*")}.items() >= done.items()
    assert [row.name for row in again] == ["full run", "half", "ddim, 3 steps"]
    for one, other in zip(whole, again, strict=True):
        assert replace(one, milliseconds=0) == replace(other, milliseconds=0)


def test_pictures_are_shown_where_the_first_case_is_worst(problem: Problem) -> None:
    seen: dict[str, Any] = {}

    def look(rows: Sequence[Row], pictures: Mapping[str, np.ndarray], pairs: Sequence[Pair]) -> None:
        order = worst(rows[0].per_image["ssim"], 3)
        assert sorted(rows[0].per_image["ssim"])[:3] == [rows[0].per_image["ssim"][place] for place in order]
        shown = {row.name: pictures[row.name][order] for row in rows}
        seen["sheet"] = strip(pictures[REFERENCE][order], shown, [str(pairs[place].seed) for place in order])
        seen["full"], seen["half"] = pictures[REFERENCE][order], shown["half"]

    measure(problem, [Case("half", uniform(STEPS, 3, 2)), solver_case("ddim:3")], 2, strip=look)
    sheet, full_run, half = np.asarray(seen["sheet"]), seen["full"], seen["half"]
    side = full_run.shape[-1]
    scale = -(-96 // side)
    cell = side * scale + 4
    for row, pictures in enumerate((full_run, half)):
        for column in range(3):
            top, left = 16 + row * cell, 250 + column * cell
            there = sheet[top : top + side * scale : scale, left : left + side * scale : scale]
            np.testing.assert_array_equal(there, np.moveaxis(pictures[column], 0, -1))


def test_built_in_judges_know_the_class_of_a_condition(problem: Problem) -> None:
    def names(*given: str) -> Problem:
        return replace(problem, names=given, options=replace(problem.options, model="fashion-sd"))

    asked = ("a photo of a shirt", "a photo of a t-shirt", "a photo of an ankle boot")
    assert judged_labels(names(*asked)) == [6, 0, 9]
    assert judged_labels(names("8", "3")) == [8, 3]
    assert judged_labels(names("a dog")) is None
    assert judged_labels(problem) is None


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
    args += ["--baselines", "--calibrate", "8", "--guidance-scale", "3", "--guidance-scale", "2"]
    out, plot, sheet = tmp_path / "q.json", tmp_path / "q.png", tmp_path / "s.png"
    args += ["--strip", str(sheet), "--strip-images", "2"]
    assert main([*args, "--out", str(out), "--plot", str(plot), "--threads", "1", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts == json.loads(out.read_text())
    assert facts["images"] == 4
    assert facts["reference"] == {"sampler": "DDIMScheduler", "steps": STEPS}
    names = [row["name"] for row in facts["cases"]]
    assert names[:3] == [str(file), f"{file}, fitted", "ddim, 3 steps"] and names[-1] == "ddim, 2 steps"
    assert names[: len(names) // 2] == names[len(names) // 2 :]
    assert [row["guidance_scale"] for row in facts["full_run"]] == [3, 2]
    assert facts["cases"][0]["against"] in names and facts["cases"][0]["differences"]["gmsd"]["value"] != 0
    assert [line["ssim"] for line in facts["fewest_launches"]] == [0.99, 0.99, 0.995, 0.995]
    assert facts["cases"][0]["ssim"]["low"] <= facts["cases"][0]["ssim"]["value"]
    read = read_measured(out)  # as dipgo-report does
    assert isinstance(read, Quality) and [case.name for case in read.cases] == names
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert all((tmp_path / f"s-{scale}.png").read_bytes().startswith(b"\x89PNG") for scale in (2, 3))
    assert "SSIM" in captured.err and "fewest launches for SSIM 0.99" in captured.err


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
