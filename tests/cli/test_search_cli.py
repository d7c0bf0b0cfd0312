from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from search_models import save_dit
from shared_traces import shared_traces

from dipgo_deploy.cli import search as cli
from dipgo_deploy.cli.schedule import main as schedule_main
from dipgo_deploy.cli.search import main, output_files, spread_ratios
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.forecast import RuleForecast
from dipgo_deploy.search.run import METHODS, SearchOptions

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with shared_traces():
        yield save_dit(tmp_path_factory.mktemp("dit"))


def test_choices_are_those_of_the_library() -> None:
    assert cli._METHODS == METHODS


def test_flags_of_earlier_releases_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    settings("--accumulate", "3", "--one-noise")
    assert capsys.readouterr().err == (
        "--accumulate as accumulation, --one-noise as one_noise: belongs into the file of --config; the flags go away "
        "with the next release\n"
    )
    with pytest.raises(UserError, match="alpha: Input should be greater than or equal to 0, not -1"):
        settings("--alpha", "-1")


def test_ratios_may_follow_each_other() -> None:
    args = ["--prune-ratio", "0.4", "0.6", "--steps", "5", "--prune-ratio", "0.8", "-o", "x"]
    expected = ["--prune-ratio", "0.4", "--prune-ratio", "0.6", "--steps", "5", "--prune-ratio", "0.8", "-o", "x"]
    assert spread_ratios(args) == expected


def test_one_file_a_ratio() -> None:
    assert output_files(Path("a/s.json"), [0.8]) == [Path("a/s.json")]
    assert output_files(Path("a/s.json"), [0.4, 0.85]) == [Path("a/s-0.40.json"), Path("a/s-0.85.json")]
    assert output_files(Path("s.json"), [0.801, 0.802]) == [Path("s-0.801.json"), Path("s-0.802.json")]
    with pytest.raises(click.UsageError, match="given twice"):
        output_files(Path("s.json"), [0.4, 0.4])


def test_a_search_writes_schedules_and_says_what_it_found(
    dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model", str(dit_folder), "--steps", "40", "--prune-ratio", "0.5", "0.75", "--iterations", "1"]
    args += ["--width-of-queries", "16", "--batch", "1", "--images", "1", "--method", "uniform", "--threads", "1"]
    args += ["--no-calibrate"]
    assert main([*args, "-o", str(tmp_path / "s.json"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["schedules"]
    assert [Path(one["file"]).name for one in said] == ["s-0.50.json", "s-0.75.json"]
    for one in said:
        assert one["achieved_ratio"] == pytest.approx(one["target_ratio"], abs=0.0125)
        assert Schedule.load(one["file"]).provenance["parameters"]["achieved_ratio"] == one["achieved_ratio"]


def test_refinement_takes_schedule_files_as_starts_if_they_fit(
    dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model", str(dit_folder), "--steps", "40", "--prune-ratio", "0.75", "--budget", "2", "--images", "1"]
    args += ["--threads", "1", "--no-calibrate"]
    for kind in ("output", "residual"):
        file = str(tmp_path / f"{kind}.json")
        assert main([*args, "--method", "uniform", "--cache", kind, "-o", file]) == 0
    refine = [*args, "--method", "refine", "--cache", "output", "-o", str(tmp_path / "s.json"), "--json"]
    capsys.readouterr()
    assert main([*refine, "--start", str(tmp_path / "output.json")]) == 0
    losses = Schedule.load(tmp_path / "s.json").provenance["parameters"]["start_losses"]
    assert losses["output"] == losses["uniform"]
    assert main([*refine, "--start", str(tmp_path / "residual.json")]) == 2
    assert "residual.json: was made for another model, or for other blocks or caches" in capsys.readouterr().err
    forecast = Schedule.load(tmp_path / "output.json").with_forecast(RuleForecast(kind="taylor", order=1))
    forecast.save(tmp_path / "forecast.json")
    assert main([*refine, "--start", str(tmp_path / "forecast.json")]) == 2
    assert "forecast.json: has a forecast, which a search does not run" in capsys.readouterr().err
    with pytest.raises(UserError, match="has a forecast, which a search does not run"):
        settings("--warm-start", str(tmp_path / "forecast.json"))


def test_a_search_may_leave_out_unconditional_halves(
    dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One schedule is searched, shown, and a start of the next search; a search without the option refuses it."""
    args = ["--model", str(dit_folder), "--steps", "8", "--prune-ratio", "0.3", "--images", "1", "--threads", "1"]
    args += ["--no-calibrate", "--cache", "output", "--budget", "1", "-o", str(tmp_path / "s.json")]
    assert main([*args, "--search-guidance", "--method", "random", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["schedules"]
    schedule = Schedule.load(tmp_path / "s.json")
    assert said["conditional_only"] == sum(schedule.conditional_only) > 0
    assert schedule_main(["show", str(tmp_path / "s.json"), "--model", str(dit_folder)]) == 0
    shown = capsys.readouterr().out
    assert "conditional only" in shown
    assert f"({1 - said['achieved_ratio']:.1%} launched)" in shown
    start = [*args, "--overwrite", "--method", "refine", "--start", str(tmp_path / "s.json")]
    assert main(start) == 2
    assert "s.json: has a guidance of its own, which a search does not run without --search-guidance" in (
        capsys.readouterr().err
    )
    assert main([*start, "--search-guidance"]) == 0
    assert "s" in Schedule.load(tmp_path / "s.json").provenance["parameters"]["start_losses"]
    schedule.with_guidance([0.5, *[1.0] * 7]).save(tmp_path / "share.json")
    with pytest.raises(UserError, match="share.json: has shares of the guidance, which a search does not run"):
        settings("--search-guidance", "--warm-start", str(tmp_path / "share.json"))


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        (["--prune-ratio", "1.0"], "1.0 is not in the range"),
        (["--prune-ratio", "0.5", "--resume"], "--resume: needs --checkpoint"),
        (["--prune-ratio", "0.5", "--class-labels", "a,b"], "is no list of numbers"),
        (["--prune-ratio", "0.5", "-o", "nowhere/s.json"], "the folder nowhere does not exist"),
        (["--prune-ratio", "0.5", "--method", "magic"], "'magic' is not one of"),
        (["--prune-ratio", "0.5", "--reference", "ddim:0"], "--reference ddim:0: give a sampler and its steps"),
        (["--prune-ratio", "0.5", "--reference", "magic:9"], "sampler 'magic' is unknown"),
        (
            ["--prune-ratio", "0.5", "--search-guidance", "--no-guidance"],
            "--search-guidance: there is no unconditional",
        ),
        (["--prune-ratio", "0.5", "--search-guidance", "--method", "dp"], "--method dp leaves all evaluations guided"),
    ],
)
def test_mistakes_are_one_line(
    dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], line: str
) -> None:
    assert main(["--model", str(dit_folder), "--steps", "4", "-o", str(tmp_path / "s.json"), *extra]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        ([], "give one of --prune-ratio, --launches and --front"),
        (["--launches", "3", "--front", "2:4"], "--launches and --front: give one of"),
        (["--front", "4"], "--front 4: is no range; give the least and the most launches, as in 4:10"),
        (["--front", "5:4"], "--front 5:4: is no range; give the least and the most launches"),
        (["--launches", "2", "--no-calibrate"], "--no-calibrate: launches are searched under their fitted solver"),
        (["--launches", "2", "--launches", "2"], "the same number is given twice"),
        (["--prune-ratio", "0.5", "--calibration-images", "2"], "--calibration-images 2: 0 of them"),
        (["--launches", "5"], "--launches 5: the full run has 4 evaluations"),
        (["--launches", "2", "--search-guidance"], "--search-guidance: launches are searched whole and guided"),
    ],
)
def test_what_is_searched_is_said_once(
    dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], targets: list[str], line: str
) -> None:
    assert main(["--model", str(dit_folder), "--steps", "4", "-o", str(tmp_path / "s.json"), *targets]) == 2
    assert line in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_front_of_launches_has_a_solver_each(
    dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model", str(dit_folder), "--steps", "6", "--front", "2:3", "--budget", "6", "--threads", "1"]
    args += ["--calibration-images", "10", "--refine-iterations", "2", "-o", str(tmp_path / "s.json"), "--json"]
    assert main(args) == 0
    said = json.loads(capsys.readouterr().out)["schedules"]
    assert [(Path(one["file"]).name, one["launches"]) for one in said] == [("s-2.json", 2), ("s-3.json", 3)]
    for one in said:
        schedule = Schedule.load(one["file"])
        assert schedule.solver is not None and list(schedule.solver.timesteps) == one["timesteps"]
    assert said[1]["residual"] < said[0]["residual"]


def test_a_search_of_gates_is_judged_and_written_with_a_solver(
    dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model", str(dit_folder), "--steps", "8", "--prune-ratio", "0.5", "--method", "random", "--budget", "2"]
    args += ["--images", "2", "--calibration-images", "6", "--refine-iterations", "0", "--threads", "1"]
    assert main([*args, "-o", str(tmp_path / "s.json"), "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["schedules"]
    schedule = Schedule.load(said["file"])
    assert schedule.solver is not None and said["launches"] == schedule.steps < 8
    assert said["achieved_ratio"] == schedule.provenance["parameters"]["achieved_ratio"]


def test_an_empty_prompts_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n \n", encoding="utf-8")
    args = ["--model", "fashion-sd", "--prompts", str(prompts), "--prune-ratio", "0.5", "-o", str(tmp_path / "s.json")]
    assert main(args) == 2
    assert "prompts.txt: holds no prompt" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


def settings(*args: str, class_name: str = "UNet2DConditionModel") -> SearchOptions:
    """The search options that a command line stands for."""
    context = cli.command.make_context("search", ["--model", "m", "--prune-ratio", "0.5", "-o", "s.json", *args])
    return cli._search_options(context.params, cli.pruner_config(context.params), class_name, None)


def test_presets_and_what_overrides_them(tmp_path: Path) -> None:
    paper = settings("--preset", "paper")
    assert (paper.size.width, paper.size.hidden) == (512, (128, 128))
    train = paper.train
    assert (train.optimizer, train.lr, train.iterations, train.alpha, train.weight_decay) == ("sgd", 0.1, 1000, 1, 1e-4)
    assert settings("--preset", "paper", class_name="DiTTransformer2DModel").train.lr == 10
    given = settings("--preset", "paper", "--lr", "2", "--alpha", "0.1", "--heads", "shared", "--accumulate", "3")
    assert (given.train.lr, given.train.alpha, given.train.accumulation, given.size.heads) == (2, 0.1, 3, "shared")
    assert settings().size.width == 64
    file = tmp_path / "pruner.json"
    file.write_text('{"lr": 2, "alpha": 0.1, "heads": "shared", "accumulation": 3, "pool": 8, "temperature": [2, 0.5]}')
    read = settings("--preset", "paper", "--config", str(file))
    assert read.train == replace(given.train, temperature=(2, 0.5)) and read.size == given.size and read.pool == 8
    above = settings("--preset", "paper", "--config", str(file), "--lr", "3", "--iterations", "7")
    assert above.train == replace(read.train, lr=3, iterations=7)
    with pytest.raises(UserError, match="none.json: no such file"):
        settings("--warm-start", str(tmp_path / "none.json"))


def test_another_run_may_be_the_reference(dit_folder: Path, tmp_path: Path) -> None:
    args = [
        "--model",
        str(dit_folder),
        "--sampler",
        "dpm++2m",
        "--steps",
        "20",
        "--method",
        "uniform",
        "--threads",
        "1",
        "--images",
        "2",
        "--calibration-images",
        "8",
    ]
    file, launches = tmp_path / "s.json", []
    for reference, steps in (("ddim:40", 40), ("ddim", 20)):
        assert main([*args, "--reference", reference, "--prune-ratio", "0.75", "-o", str(file), "--overwrite"]) == 0
        schedule = Schedule.load(file)
        launches.append(sum(map(any, schedule.gates)))
        parameters = schedule.provenance["parameters"]
        assert parameters["reference"] == {"sampler": "DDIMScheduler", "steps": steps}
        assert parameters["achieved_ratio"] == pytest.approx(0.75, abs=0.0125)
    # A quarter of 40 evaluations, less the little that each step costs, and a quarter of 20.
    assert launches == [9, 4]
